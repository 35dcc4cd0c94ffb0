"""What the suites of whole models share: files of ONNX that are made once."""

import pytest
import torch
from inductor_vision.ops.registry import OPS
from inductor_vision.perf import backends, models
from inductor_vision.perf.spec import Unavailable


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


def test_autocast_is_in_the_mode_of_its_module():
    """A detector in training mode cannot be packaged, and computes losses."""
    layer = torch.nn.Linear(2, 2)
    assert backends.Autocast(layer).training
    low = backends.Autocast(layer.eval())
    assert not low.training and not layer.training
    assert low(torch.ones(1, 2)).dtype == torch.bfloat16
    mixed = torch.nn.Sequential(layer)
    assert backends.Autocast(mixed).training and mixed.training and not layer.training


def test_what_onnx_does_not_have_is_no_failure(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class Overlaps(torch.nn.Module):
        def forward(self, boxes):
            return OPS["box_iou_rotated"](boxes, boxes)

    with pytest.raises(Unavailable, match=r"ONNX has not all that it computes: .*box_iou_rotated"):
        models.exported("overlaps", Overlaps(), torch.rand(3, 5))
    assert not list(models.cache_folder().iterdir())
