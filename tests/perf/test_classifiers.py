"""The benchmark of classifiers, on small images: do contenders compute the same, with the fusion and without?"""

import importlib

import pytest
import torch
from inductor_vision import inference_options
from inductor_vision.lowering.passes.depthwise_separable import FuseDepthwiseSeparable
from inductor_vision.perf import backends
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
    return on


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


def test_cheap_calls(switches, monkeypatch):
    options = {}

    def compiled(module, tensors, **settings):
        options[len(options)] = backends._options.get()
        return backends.eager(module, tensors)

    monkeypatch.setattr(backends, "compiled", compiled)
    case = classifiers.case(PROBLEM)
    for contender in SUITE.contenders:
        if contender.name in ("ours-frozen", "ours-cheap-calls"):
            contender.prepare(Job(case, case.build(), 1))
    assert options == {0: {}, 1: inference_options()}


def test_models_and_images_are_the_same_at_every_call():
    first, second = PROBLEM.model(), PROBLEM.model()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert torch.equal(PROBLEM.images(), PROBLEM.images())


def test_results_depend_on_the_images():
    """Random weights would tell nothing apart if they gave the same logits for all."""
    logits = SUITE.reference(PROBLEM)
    assert relative_error(logits[0], logits[1]) > 1e-3
