"""Small detectors of torchvision's kinds, and when two lists of detections are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Backbone(nn.Module):
    """Two levels of 32 channels, as few as the head of an FCOS takes."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 32, 8, stride=8), nn.Conv2d(32, 32, 2, stride=2)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        fine = self.fine(image).relu()
        return {"0": fine, "1": self.coarse(fine)}


R_CNNS = ("FasterRCNN", "MaskRCNN", "KeypointRCNN")


def small_detector(kind: str) -> nn.Module:
    """An R-CNN, "RetinaNet", "FCOS" or "SSD" for images of about 100 pixels.

    Its weights are random, the same at every call; scores are not too near each other.
    """
    torch.manual_seed(0)
    return (_small_r_cnn if kind in R_CNNS else _small_one_shot_detector)(kind).eval()


def _small_r_cnn(kind: str) -> nn.Module:
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    def pooler(size: int) -> nn.Module:
        return MultiScaleRoIAlign(["0", "1"], size, 2)

    heads: dict[str, Any] = {"num_classes": 4}
    if kind == "MaskRCNN":
        heads |= {"mask_roi_pool": pooler(4)}
    if kind == "KeypointRCNN":
        heads |= {"keypoint_roi_pool": pooler(4), "num_keypoints": 5}
    detector = getattr(detection, kind)(
        Backbone(),
        **heads,
        min_size=96,
        max_size=128,
        rpn_anchor_generator=AnchorGenerator(((24,), (48,)), ((0.5, 1.0, 2.0),) * 2),
        box_roi_pool=pooler(3),
        rpn_pre_nms_top_n_test=60,
        rpn_post_nms_top_n_test=30,
        box_score_thresh=0.05,
        box_detections_per_img=12,
    )
    spread(detector.rpn.head.cls_logits, 200)
    spread(detector.roi_heads.box_predictor.cls_score, 20)
    return detector


def _small_one_shot_detector(kind: str) -> nn.Module:
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator

    if kind == "SSD":
        boxes = DefaultBoxGenerator([[2], [2]], steps=[8, 16])
        head = detection.ssd.SSDHead([Backbone.out_channels] * 2, boxes.num_anchors_per_location(), 4)
        detector = detection.ssd.SSD(
            Backbone(), boxes, (96, 96), 4, head=head, score_thresh=0.25, topk_candidates=40, detections_per_img=50
        )
    else:
        ratios = (1.0,) if kind == "FCOS" else (0.5, 1.0, 2.0)
        detector = getattr(detection, kind)(
            Backbone(),
            4,
            min_size=96,
            max_size=128,
            anchor_generator=AnchorGenerator(((24,), (48,)), (ratios,) * 2),
            score_thresh=0.01,
            topk_candidates=40,
        )
    for layer in detector.head.classification_head.modules():
        if isinstance(layer, nn.Conv2d):
            spread(layer, 8)
    return detector


def spread(layer: nn.Module, factor: float) -> None:
    """Have a layer give greater differences."""
    with torch.no_grad():
        layer.weight.mul_(factor)


def assert_same_detections(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> None:
    assert list(ours) == list(stock)
    assert torch.equal(ours["labels"], stock["labels"])
    for key in ours:
        assert ours[key].shape == stock[key].shape, key
        tolerance = {"scores": 1e-5, "masks": 1e-3}.get(key, 1e-2)
        torch.testing.assert_close(ours[key], stock[key], rtol=1e-4, atol=tolerance)


def agreement(ours: dict[str, Tensor], stock: dict[str, Tensor], iou: float, score: float) -> float:
    """The part of detections that has one among the others of its label, overlapping so much and scored so equally."""
    from torchvision.ops import box_iou

    near = box_iou(ours["boxes"].float(), stock["boxes"].float()) >= iou
    near &= (ours["scores"][:, None].float() - stock["scores"].float()).abs() <= score
    near &= ours["labels"][:, None] == stock["labels"]
    return min(near.any(0).float().mean().item(), near.any(1).float().mean().item())
