"""export_detector: a whole detector as one package, which runs alone and takes images of any size."""

from __future__ import annotations

import platform
import re

import pytest
import torch
from inductor_vision import accelerate_torchvision, accelerate_transformers, export_detector
from inductor_vision.export import _export_any_size
from inductor_vision.integrations.one_image import OneImage, one_image
from inductor_vision.perf.backends import Autocast
from inductor_vision.perf.suites.detectors import detections_error  # in any order of equal scores
from inductor_vision.tests.support.compiled import run_alone, run_python, source_of_package
from inductor_vision.tests.support.detectors import agreement, assert_same_detections, small_detector
from inductor_vision.tests.support.machine_code import assert_made_for
from inductor_vision.tests.support.transformers_models import inputs_of, small_model
from torch import Tensor, nn

SIZES = [(90, 120), (120, 90), (60, 60), (333, 500), (700, 1000), (50, 400), (300, 30), (2, 2)]


def test_runs_alone_on_images_of_any_size(detector_package, tmp_path):
    images = [torch.rand(3, *size) for size in SIZES]
    results = run_alone(detector_package, [(image,) for image in images], tmp_path)
    detector = small_detector("MaskRCNN")
    assert len(results) == len(SIZES)
    with torch.no_grad():
        for image, ours in zip(images, results):
            (stock,) = detector([image])
            assert len(stock["boxes"]) > 4
            assert_same_detections(ours, stock)


def test_package_says_what_it_returns_and_refuses_what_it_cannot_take(detector_package):
    detector = torch._inductor.aoti_load_package(str(detector_package))
    metadata = detector.loader.get_metadata()
    assert metadata["outputs"].split(",") == ["boxes", "labels", "scores", "masks"]
    assert metadata["labels"].split(",") == ["background", "cat", "dog", "cup"]
    for size in ((30, 301), (301, 30)):
        with pytest.raises(RuntimeError, match="more than 10 times as long as it is wide"):
            detector(torch.rand(3, *size))
    for image, message in {
        torch.rand(1, 3, 90, 120): "expected: 3, but got: 1",
        torch.rand(90, 120): "expected: 3, but got: 90",
        torch.rand(4, 90, 120): "expected: 3, but got: 4",
        torch.rand(3, 1, 1): "dim value is too small",
        torch.rand(3, 90, 120).double(): "unmatched dtype",
        torch.zeros(3, 90, 120, dtype=torch.uint8): "unmatched dtype",
        torch.rand(90, 120, 3).permute(2, 0, 1): "stride",
        torch.rand(3, 100, 130)[:, :90, :120]: "stride",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            detector(image)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "converted"), [("SSD", False), ("MaskRCNN", False), ("MaskRCNN", True)])
def test_bfloat16(torchvision_python, tmp_path, kind, converted):
    """With autocast in the model, or converted, which eager mode cannot run. Weights are in bfloat16, and in oneDNN's
    order where the processor has instructions for them."""
    detector, image = small_detector(kind), torch.rand(3, 90, 120)
    with torch.no_grad():
        (stock,) = detector([image])
    if converted:
        detector, image = detector.bfloat16(), image.bfloat16()
    else:
        detector = Autocast(detector)
    path = export_detector(detector, image, tmp_path / "detector.pt2", any_size=False)
    ours = torch._inductor.aoti_load_package(str(path))(image)
    assert ours["boxes"].dtype == ours["scores"].dtype == torch.bfloat16 and len(stock["boxes"]) > 4
    source = source_of_package(path)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        transposed = kind == "MaskRCNN"  # one, of as many regions as data say, which Inductor leaves to aten
        assert "mkldnn__convolution_pointwise(" in source
        assert source.count("aoti_torch_cpu_convolution(") == transposed
    weights = sum(parameter.numel() for parameter in detector.parameters())
    assert sum(map(int, re.findall(r"data_size = (\d+)", source))) < 3 * weights  # bytes
    assert list(ours) == list(stock) and agreement(ours, stock, iou=0.9, score=0.02) >= 0.85
    if kind == "MaskRCNN":
        same = torch.cdist(ours["boxes"].float(), stock["boxes"]).argmin(1)
        assert ours["masks"].shape[1:] == stock["masks"].shape[1:]
        assert (ours["masks"].float() - stock["masks"][same]).abs().mean() < 0.02


@pytest.mark.parametrize("kind", ["KeypointRCNN", "RetinaNet", "FCOS", "SSD"])
def test_nothing_is_decided_for_one_size(torchvision_python, kind):
    """The exported program, whose compilation takes longer, at sizes that its guards let through."""
    accelerate_torchvision()
    detector = small_detector(kind)
    image = torch.rand(3, 90, 120)
    with torch.no_grad():
        detector([image])
        exported = _export_any_size(OneImage(detector), image).module()
        for size in ((120, 90), (70, 300)):
            image = torch.rand(3, *size)
            assert_same_detections(exported(image), detector([image])[0])


def exporting_transformers(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of transformers, and what it is called with besides an image."""
    inputs = inputs_of(kind)
    del inputs["pixel_values"]
    return small_model(kind), inputs


@pytest.mark.slow
def test_transformers_nothing_is_decided_for_one_size(transformers):
    accelerate_transformers()
    model, inputs = exporting_transformers("deformable_detr")
    detector = one_image(model, -2.0, inputs)  # every query is a detection
    with torch.no_grad():
        exported = _export_any_size(detector, torch.rand(3, 128, 160)).module()
        for size in ((160, 128), (192, 352)):
            image = torch.rand(3, *size)
            assert detections_error(exported(image), detector(image)) < 1e-3


@pytest.mark.slow
def test_transformers_sizes_that_a_model_decides_on(transformers, tmp_path):
    """RF-DETR adds its embeddings of positions as they are to a square image."""
    model, _ = exporting_transformers("rf_detr")
    with pytest.raises(ValueError, match="does not allow images of any height and width; with any_size=False it can"):
        export_detector(model, torch.rand(3, 128, 160), tmp_path / "model.pt2")


@pytest.mark.slow
def test_transformers_package_runs_alone(transformers_package, tmp_path):
    """The other kinds are in tests/stock_transformers.py."""
    images = [torch.rand(3, *size) for size in ((128, 160), (192, 352))]
    detector = one_image(small_model("rt_detr_v2"), -2.0)
    results = run_alone(transformers_package, [(image,) for image in images], tmp_path)
    with torch.no_grad():
        for image, ours in zip(images, results):
            assert detections_error(ours, detector(image)) < 1e-3


class Bright(nn.Module):
    """The brightest pixel as a box, looked for in the left half only of large images."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        (image,) = images
        if image.shape[2] > 500:
            image = image[:, :, :250]
        brightness, place = image.mean(0).flatten().max(dim=0)
        x, y = place % image.shape[2], place // image.shape[2]
        return [{"boxes": torch.stack([x, y, x + 1, y + 1])[None], "scores": brightness[None]}]


DETECTS_WITH_FUSED_PAIRS = """
import sys
import torch
from collections import Counter
from inductor_vision import accelerate_torchvision, export_detector, fuse_depthwise_separable
from inductor_vision.paths import recorded_paths
from inductor_vision.perf.suites.detectors import detections_error  # in any order of equal scores
from inductor_vision.tests.support.detectors import spread
from torch import nn

accelerate_torchvision()  # before torchvision is imported, which may not load by itself
from torchvision.models import detection

OPERATORS = "depthwise_separable_conv2d", "inverted_residual_conv2d"
fuse_depthwise_separable()
torch.manual_seed(0)
name, path = sys.argv[1:]
sizes = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 160}
detector = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=5, **sizes).eval()
images = torch.rand(2, 3, 90, 120).unbind()
with torch.no_grad():
    for module in detector.modules():  # so that an image makes a difference behind so many layers
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = 1.0
    detector(images)
    detector.eval()
    if sizes:
        spread(detector.rpn.head.cls_logits, 8)
        spread(detector.roi_heads.box_predictor.cls_score, 8)
    getattr(detector, "roi_heads", detector).score_thresh = 0.4
    (stock,) = detector(images[:1])
assert len(stock["boxes"]) > 4
if path == "traced":
    from inductor_vision.tests.support.compiled import trace_and_run

    with torch.no_grad():
        traced = trace_and_run(detector, images[:1])
    paths, (found,) = traced.paths, traced.result
    nodes = [str(node.target) for graph in traced.graphs for node in graph.nodes if node.op == "call_function"]
    served = sum(any(op in target for op in OPERATORS) for target in nodes)  # internal operators, for the template
else:
    with recorded_paths() as paths:
        export_detector(detector, images[0], path, any_size=False)
    found = torch._inductor.aoti_load_package(path)(images[0])
    served = sum(path.op in OPERATORS and path.kind == "template" for path in paths)
pairs = Counter(path.kind for path in paths if path.op == "depthwise_separable_conv2d")
assert pairs["fused"] == served > 0, (pairs, served)
assert pairs.keys() <= {"fused", "left alone", "template"}, pairs
error = detections_error(found, stock)
assert error < 1e-4, error
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path"), [("ssdlite320_mobilenet_v3_large", "traced"), ("fasterrcnn_mobilenet_v3_large_fpn", "fused.pt2")]
)
def test_stock_models_of_depthwise_separable_pairs(torchvision_python, tmp_path, monkeypatch, name, path):
    """Operators on pairs, regions and boxes in one package; the pairs of all of a process are fused. The other model is
    only traced: it has the same backbone."""
    monkeypatch.chdir(tmp_path)
    run_python(DETECTS_WITH_FUSED_PAIRS, name, path)


def test_model_that_decides_by_size_and_target(tmp_path):
    detector, image = Bright().eval(), torch.rand(40, 50, 3).permute(2, 0, 1)  # in whichever order pixels lie
    with pytest.raises(ValueError, match=r"any height and width; with any_size=False .* 40 x 50 pixels"):
        export_detector(detector, image, tmp_path / "bright.pt2")
    assert not list(tmp_path.iterdir())
    target = "x86-64-v3" if platform.machine() == "x86_64" else None
    path = export_detector(detector, image, str(tmp_path / "folder" / "bright.pt2"), any_size=False, target=target)
    if target is not None:
        assert_made_for(target, path)
    package = torch._inductor.aoti_load_package(str(path))
    image = torch.rand(3, 40, 50)
    ours, (eager,) = package(image), detector([image])
    assert ours.keys() == eager.keys()
    assert torch.equal(ours["boxes"], eager["boxes"]) and torch.allclose(ours["scores"], eager["scores"])


class Wrong(nn.Module):
    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "detector.pt"}, r"path must end with .pt2, got 'detector.pt'"),
        ({"model": Bright()}, r"the model is in training mode; call its eval\(\) first"),
        ({"example_image": torch.rand(1, 3, 40, 50)}, r"example_image must be \[C, H, W\], got \(1, 3, 40, 50\)"),
        ({"labels": ["cat", "cup, bowl"]}, r"labels must not have commas, got \['cat', 'cup, bowl'\]"),
        ({"target": "armv8-a"}, r"^export_detector: target must be one of x86-64-v2, .*, got 'armv8-a'"),
        ({"model": Wrong().eval()}, r"must return a dictionary of tensors for each image, got Tensor"),
    ],
)
def test_wrong_arguments(tmp_path, change, message):
    arguments = {"model": Bright().eval(), "example_image": torch.rand(3, 40, 50), "path": tmp_path / "detector.pt2"}
    with pytest.raises(ValueError, match=message):
        export_detector(**{**arguments, **change})
    assert not list(tmp_path.iterdir())
