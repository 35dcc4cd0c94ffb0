"""Every detector that torchvision builds, and some put together by hand, compiled as one graph and as a package.

It takes an hour, so that it runs only where it is named: ``pytest tests/stock_detectors.py``, or ``-k retinanet``.
"""

from __future__ import annotations

import copy

import pytest
import torch
from inductor_vision import accelerate_torchvision, export_detector
from inductor_vision.tests.support.compiled import compile_and_run, trace_and_run
from inductor_vision.tests.support.detectors import HAND_MADE, STOCK, hand_made_detector, stock_detector
from inductor_vision.tests.support.frozen import assert_norms_are_folded
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("torchvision")


def test_these_are_all(torchvision):
    builders = torchvision.models.list_models(torchvision.models.detection)
    assert sorted(STOCK) == sorted(builders)


@pytest.fixture(params=[*STOCK, *HAND_MADE])
def model(request) -> tuple[nn.Module, Tensor]:
    """A detector, and an image."""
    accelerate_torchvision()
    if request.param in STOCK:
        return stock_detector(request.param)
    return hand_made_detector(request.param), torch.rand(3, 90, 120)


@pytest.mark.parametrize("freezing", [True, False])
def test_is_one_graph(model, freezing):
    detector, image = model
    with torch.no_grad():
        compiled = compile_and_run(detector, [image], config={"freezing": freezing})
        assert set(compiled.kinds) == {"template"}
        assert_right(compiled.result[0], detector, image)


@pytest.mark.parametrize("converted", [False, True], ids=["autocast", "converted"])
def test_bfloat16(model, converted):
    """Traced. Random weights make so much of a rounding that detections cannot be compared; tests/test_detectors.py
    does so with small detectors."""
    detector, image = model
    with torch.no_grad():
        (stock,) = detector([image])
        if converted:
            detector, image = detector.bfloat16(), image.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not converted):
            (ours,) = trace_and_run(detector, [image]).result
    assert ours["boxes"].dtype == ours["scores"].dtype == torch.bfloat16 and ours["labels"].dtype == torch.int64
    assert list(ours) == list(stock) and len(ours["boxes"]) > 0
    begin, end = ours["boxes"].float().split(2, dim=1)
    assert (begin >= 0).all() and (begin <= end).all() and (end <= torch.tensor(image.shape[:0:-1])).all()
    assert all(ours[key].shape[1:] == stock[key].shape[1:] and ours[key].isfinite().all() for key in stock)


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_norms_are_folded(model, precision):
    assert_norms_are_folded(*model, precision)


def test_package(model, tmp_path, request):
    """For images of any size where no map of features can become a single pixel."""
    detector, image = model
    any_size = not any(name in request.node.name for name in (*STOCK, "resnet18"))
    path = export_detector(detector, image, tmp_path / "detector.pt2", any_size=any_size)
    package = torch._inductor.aoti_load_package(str(path))
    for given in (image, torch.rand(3, 70, 100)) if any_size else (image,):
        assert_right(package(given), detector, given)


def assert_right(ours: dict[str, Tensor], detector: nn.Module, image: Tensor) -> None:
    """As near to the detections of float64 as those of stock in float32, of which random weights and scores that are
    spread make errors that can be seen."""
    with torch.no_grad():
        (stock,), (exact,) = detector([image]), copy.deepcopy(detector).double()([image.double()])
    assert len(stock["boxes"]) > 2
    assert list(ours) == list(stock)
    assert torch.equal(ours["labels"], stock["labels"]) and torch.equal(exact["labels"], stock["labels"])
    for key, expected in exact.items():
        if key == "keypoints":  # the greatest of a heatmap, where random weights make others that are nearly as great
            far, stocks = (
                ((detections[key] - expected).abs() > 0.1).any(-1).double().mean() for detections in (ours, stock)
            )
            assert stocks < 0.05 and far <= 2 * stocks + 0.01, (
                f"{far:.1%} of the keypoints are others, {stocks:.1%} in stock"
            )
            continue
        error, stocks = ((detections[key] - expected).abs().max().item() for detections in (ours, stock))
        assert stocks < {"scores": 1e-2}.get(key, 0.1), key
        assert error <= 3 * stocks + 1e-5, f"{key}: error {error:.2g}, {stocks:.2g} in stock"
