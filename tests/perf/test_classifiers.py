"""The benchmark of classifiers, on small images: do contenders compute the same, with the fusion and without?"""

import importlib

import pytest
import torch
from inductor_vision.lowering.installation import installer
from inductor_vision.lowering.passes.depthwise_separable import FuseDepthwiseSeparable
from inductor_vision.ops.registry import OPS
from inductor_vision.perf import backends, models
from inductor_vision.perf.spec import Job, Unavailable
from inductor_vision.perf.suites import classifiers
from inductor_vision.perf.suites.classifiers import SUITE, Problem
from inductor_vision.perf.verify import relative_error
from torch._inductor import config

PROBLEM = Problem("mobilenet_v3_small", 2, 64)

pytestmark = pytest.mark.usefixtures("torchvision_python")


@pytest.fixture
def switches(monkeypatch):
    """Whether the fusion was on when each model was compiled, which is not done here."""
    importlib.import_module("torch._inductor.lowering")  # as each compilation does; what was asked for begins with it
    on = []

    def eager(module, tensors, **options):
        on.append(any(isinstance(other, FuseDepthwiseSeparable) for other in config.pre_grad_custom_pass or ()))
        return backends.eager(module, tensors)

    monkeypatch.setattr(backends, "compiled", eager)
    monkeypatch.setattr(backends, "packaged", eager)
    monkeypatch.setattr(installer, "_fuse_depthwise_separable", False)
    with config.patch(pre_grad_custom_pass=None):
        yield on


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory):
    """Where they are kept, for both that take them."""
    folder = tmp_path_factory.mktemp("onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.mark.parametrize(
    "contender",
    [
        pytest.param(c, id=c.name, marks=pytest.mark.slow if c.name.startswith(("onnx", "openvino")) else ())
        for c in SUITE.contenders
    ],
)
def test_contenders_agree_with_the_reference(contender, switches, onnx_files):
    case = classifiers.case(PROBLEM)
    try:
        contender.check()
    except Unavailable as reason:
        pytest.skip(str(reason))
    output = contender.prepare(Job(case, case.build(), 1)).output
    error, low_precision = relative_error(output, SUITE.reference(PROBLEM)), contender.tolerance is not None
    assert error < (contender.tolerance if low_precision else case.tolerance)
    if contender.name.endswith("bf16"):
        assert error > case.tolerance  # that is no float32
    assert switches == [contender.role == "ours"] * contender.compiled


def test_models_and_images_are_the_same_at_every_call():
    first, second = PROBLEM.model(), PROBLEM.model()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert torch.equal(PROBLEM.images(), PROBLEM.images())


def test_results_depend_on_the_images():
    """Random weights would tell nothing apart if they gave the same logits for all."""
    logits = SUITE.reference(PROBLEM)
    assert relative_error(logits[0], logits[1]) > 1e-3


class Scale(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return x * self.factor


def test_a_model_is_exported_once_for_the_same_weights(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    input = torch.ones(2, 3)
    first = models.exported("scale", Scale(2.0), input, ["scaled"])
    written = first.path.stat().st_mtime_ns
    assert first.path.is_relative_to(tmp_path)
    assert models.exported("scale", Scale(2.0), input, ["scaled"]).path.stat().st_mtime_ns == written
    other = models.exported("scale", Scale(3.0), input, ["scaled"])
    assert list(first.path.parent.iterdir()) == [other.path]  # what nobody asks for any more is removed
    assert models._fingerprint(Scale(3.0), torch.ones(2, 4)) != models._fingerprint(Scale(3.0), input)
    prepared = other.with_results(backends.onnxruntime(str(other.path), {"input": input}, 1))
    assert onnxruntime and torch.equal(prepared.output["scaled"], torch.full((2, 3), 3.0))


def test_what_onnx_does_not_have_is_no_failure(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class Heatmaps(torch.nn.Module):
        def forward(self, maps):
            return OPS["heatmaps_to_keypoints"](maps, torch.tensor([[0.0, 0.0, 9.0, 9.0]]))

    with pytest.raises(Unavailable, match=r"ONNX has not all that it computes: .*heatmaps_to_keypoints"):
        models.exported("heatmaps", Heatmaps(), torch.rand(1, 2, 7, 7))
    assert not list(models.cache_folder().iterdir())
