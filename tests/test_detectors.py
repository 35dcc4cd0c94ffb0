"""Stock detectors of torchvision, compiled as one graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from inductor_vision import accelerate_torchvision
from inductor_vision.ops.torchvision_detection import decode, paste_masks_in_image
from inductor_vision.tests.support.compiled import compile_and_run
from torch import Tensor, nn


class Backbone(nn.Module):
    """Two levels."""

    out_channels = 16

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 16, 8, stride=8), nn.Conv2d(16, 16, 2, stride=2)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        fine = self.fine(image).relu()
        return {"0": fine, "1": self.coarse(fine)}


@pytest.fixture
def detector(torchvision) -> Iterator[nn.Module]:
    """A small Mask R-CNN; without its mask head it is a Faster R-CNN."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    return MaskRCNN(
        Backbone(),
        num_classes=4,
        min_size=96,
        max_size=128,
        rpn_anchor_generator=AnchorGenerator(((24,), (48,)), ((0.5, 1.0, 2.0),) * 2),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 3, 2),
        mask_roi_pool=MultiScaleRoIAlign(["0", "1"], 4, 2),
        rpn_pre_nms_top_n_test=60,
        rpn_post_nms_top_n_test=30,
        box_score_thresh=0.05,
        box_detections_per_img=12,
    ).eval()


def assert_same_detections(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> None:
    assert ours.keys() == stock.keys()
    assert torch.equal(ours["labels"], stock["labels"])
    for key, tolerance in (("scores", 1e-5), ("boxes", 1e-2), ("masks", 1e-2)):
        assert ours[key].shape == stock[key].shape
        torch.testing.assert_close(ours[key], stock[key], rtol=1e-4, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_mask_rcnn_is_one_graph(detector, memory_format):
    accelerate_torchvision()
    detector.to(memory_format=memory_format)
    images = [torch.rand(3, 90, 120) for _ in range(2)]
    with torch.no_grad():
        stock = [
            detector([image])[0] for image in images
        ]  # first: the stock pooler keeps what it finds in its first call
        compiled = compile_and_run(detector, [images[0]])
        with torch._dynamo.config.patch(error_on_recompile=True):
            second = compiled.function([images[1]])
    assert sorted(path.op for path in compiled.paths) == ["nms", "nms", "roi_align", "roi_align"]
    assert set(compiled.kinds) == {"template"}
    assert len(stock[0]["boxes"]) > 4
    assert_same_detections(compiled.result[0], stock[0])
    assert_same_detections(second[0], stock[1])


@pytest.mark.slow
def test_nothing_is_detected(detector):
    accelerate_torchvision()
    detector.roi_heads.score_thresh = 2.0
    with torch.no_grad():
        compiled = compile_and_run(detector, [torch.rand(3, 90, 120)])
    assert set(compiled.kinds) == {"template"}
    shapes = {"boxes": (0, 4), "labels": (0,), "scores": (0,), "masks": (0, 1, 90, 120)}
    assert {key: tuple(value.shape) for key, value in compiled.result[0].items()} == shapes


def test_detectors_can_be_scripted(detector):
    accelerate_torchvision()
    images = [torch.rand(3, 90, 120)]
    with torch.no_grad():
        _, scripted = torch.jit.script(detector)(images)
        assert_same_detections(scripted[0], detector(images)[0])


def test_decode(torchvision):
    from torchvision.models.detection._utils import BoxCoder

    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    boxes = [torch.rand(count, 4).cumsum(1) * 50 for count in (5, 0, 3)]
    for classes in (1, 4):
        codes = torch.randn(8, 4 * classes)
        assert torch.equal(decode(coder, codes, boxes), coder.decode(codes, boxes))
        assert decode(coder, codes[:0], boxes[1:2]).shape == (0, classes, 4)


def masks_and_boxes(size: int) -> tuple[Tensor, Tensor]:
    boxes = (torch.rand(40, 2, 2).sort(dim=1).values * torch.tensor([110.0, 90.0])).flatten(1)
    boxes[0] = torch.tensor([0.0, 0, 110, 90])
    boxes[1] = torch.tensor([5.0, 6, 5, 6])
    boxes[2] = torch.tensor([0.0, 0, 0, 0])
    return torch.rand(40, 1, size, size), boxes


@pytest.mark.parametrize("size", [14, 28])
def test_paste_masks_in_image(torchvision, size):
    from torchvision.models.detection.roi_heads import paste_masks_in_image as stock

    masks, boxes = masks_and_boxes(size)
    ours = paste_masks_in_image(masks, boxes, (90, 110))
    torch.testing.assert_close(ours, stock(masks, boxes, (90, 110)), rtol=0, atol=2e-5)
    assert paste_masks_in_image(masks[:0], boxes[:0], (90, 110)).shape == (0, 1, 90, 110)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pasted_masks_keep_their_dtype_and_their_precision(torchvision, dtype):
    from torchvision.models.detection.roi_heads import paste_masks_in_image as stock

    masks, boxes = masks_and_boxes(28)
    masks = masks.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = paste_masks_in_image(masks, boxes, (90, 110))
    assert ours.dtype == dtype
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 2e-5)
    torch.testing.assert_close(ours.double(), stock(masks.double(), boxes, (90, 110)), rtol=0, atol=tolerance)
