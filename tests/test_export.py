"""export_detector: a whole detector as one package, which runs alone and takes images of any size."""

from __future__ import annotations

import pytest
import torch
from inductor_vision import accelerate_torchvision, export_detector
from inductor_vision.export import _export_any_size
from inductor_vision.tests.support.compiled import run_python
from inductor_vision.tests.support.detectors import assert_same_detections, small_detector
from torch import Tensor, nn

RUN_PACKAGE = """
import sys
import torch

detector = torch._inductor.aoti_load_package(sys.argv[1])
results = [detector(image) for image in torch.load(sys.argv[2])]
present = {name.partition(".")[0] for name in sys.modules}
assert not present & {"inductor_vision", "torchvision"}, present
torch.save(results, sys.argv[3])
"""

SIZES = [(90, 120), (120, 90), (60, 60), (333, 500), (700, 1000), (50, 400), (300, 30), (2, 2)]


@pytest.mark.slow
def test_runs_alone_on_images_of_any_size(detector_package, tmp_path):
    images = [torch.rand(3, *size) for size in SIZES]
    torch.save(images, tmp_path / "images.pt")
    run_python(RUN_PACKAGE, str(detector_package), *(str(tmp_path / name) for name in ("images.pt", "results.pt")))
    results = torch.load(tmp_path / "results.pt")
    detector = small_detector("MaskRCNN")
    assert len(results) == len(SIZES)
    with torch.no_grad():
        for image, ours in zip(images, results):
            (stock,) = detector([image])
            assert len(stock["boxes"]) > 4
            assert_same_detections(ours, stock)


@pytest.mark.slow
def test_package_says_what_it_returns_and_refuses_what_it_cannot_take(detector_package, monkeypatch):
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "1")
    detector = torch._inductor.aoti_load_package(str(detector_package))
    metadata = detector.loader.get_metadata()
    assert metadata["outputs"].split(",") == ["boxes", "labels", "scores", "masks"]
    assert metadata["labels"].split(",") == ["background", "cat", "dog", "cup"]
    for size in ((30, 301), (301, 30)):
        with pytest.raises(RuntimeError, match="more than 10 times as long as it is wide"):
            detector(torch.rand(3, *size))
    for image in (torch.rand(1, 3, 90, 120), torch.rand(4, 90, 120), torch.rand(3, 90, 120, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="expected: "):
            detector(image)


@pytest.mark.parametrize("kind", ["KeypointRCNN", "RetinaNet", "FCOS", "SSD"])
def test_nothing_is_decided_for_one_size(torchvision, kind):
    """The exported program, whose compilation takes longer, at sizes that its guards let through."""
    accelerate_torchvision()
    detector = small_detector(kind)
    image = torch.rand(3, 90, 120)
    with torch.no_grad():
        detector([image])
        exported = _export_any_size(detector, image).module()
        for size in ((120, 90), (70, 300)):
            image = torch.rand(3, *size)
            assert_same_detections(exported(image), detector([image])[0])


class Bright(nn.Module):
    """The brightest pixel as a box, looked for in the left half only of large images."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        (image,) = images
        if image.shape[2] > 500:
            image = image[:, :, :250]
        brightness, place = image.mean(0).flatten().max(dim=0)
        x, y = place % image.shape[2], place // image.shape[2]
        return [{"boxes": torch.stack([x, y, x + 1, y + 1])[None], "scores": brightness[None]}]


def test_model_that_decides_by_size(tmp_path):
    detector, image = Bright().eval(), torch.rand(3, 40, 50)
    with pytest.raises(ValueError, match=r"any height and width; with any_size=False .* 40 x 50 pixels"):
        export_detector(detector, image, tmp_path / "bright.pt2")
    assert not list(tmp_path.iterdir())
    path = export_detector(detector, image, str(tmp_path / "folder" / "bright.pt2"), any_size=False)
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
        ({"model": Wrong().eval()}, r"must return a dictionary of tensors for each image, got Tensor"),
    ],
)
def test_wrong_arguments(torchvision, tmp_path, change, message):
    arguments = {"model": Bright().eval(), "example_image": torch.rand(3, 40, 50), "path": tmp_path / "detector.pt2"}
    with pytest.raises(ValueError, match=message):
        export_detector(**{**arguments, **change})
    assert not list(tmp_path.iterdir())
