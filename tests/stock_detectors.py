"""Every detector that torchvision builds, compiled as one graph and as a package.

It takes an hour, so that it runs only where it is named: ``pytest tests/stock_detectors.py``, or ``-k retinanet``.
"""

from __future__ import annotations

import pytest
import torch
from inductor_vision import accelerate_torchvision, export_detector
from inductor_vision.tests.support.compiled import compile_and_run
from inductor_vision.tests.support.detectors import STOCK, assert_same_detections, stock_detector
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("torchvision", "unoptimized")


def test_these_are_all(torchvision):
    builders = torchvision.models.list_models(torchvision.models.detection)
    assert sorted(STOCK) == sorted(builders)


@pytest.fixture(params=STOCK)
def model(request) -> tuple[nn.Module, Tensor]:
    accelerate_torchvision()
    return stock_detector(request.param)


def test_is_one_graph(model):
    detector, image = model
    with torch.no_grad():
        compiled = compile_and_run(detector, [image])
        assert set(compiled.kinds) == {"template"}
        assert_right(compiled.result[0], detector, image)


def test_package(model, tmp_path):
    detector, image = model
    path = export_detector(detector, image, tmp_path / "detector.pt2", any_size=False)
    assert_right(torch._inductor.aoti_load_package(str(path))(image), detector, image)


def assert_right(ours: dict[str, Tensor], detector: nn.Module, image: Tensor) -> None:
    with torch.no_grad():
        (stock,) = detector([image])
    assert len(stock["boxes"]) > 4
    assert_same_detections(ours, stock)
