"""Small detectors of torchvision's kinds, and when two lists of detections are the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

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


class _RoIPool(nn.Module):
    """In the place of a pooler of several levels."""

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        from torchvision.ops import roi_pool

        return roi_pool(features["0"], boxes, 3, 1 / 8)


def _with_roi_pool(detector: nn.Module) -> nn.Module:
    detector.roi_heads.box_roi_pool = _RoIPool()
    return detector


def _one_level(channels: int) -> nn.Module:
    backbone = nn.Sequential(nn.Conv2d(3, channels, 8, stride=8), nn.BatchNorm2d(channels), nn.ReLU())
    backbone.out_channels = channels
    return backbone


def _resnet() -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d)


def _mobilenet() -> nn.Module:
    from torchvision.models import mobilenet_v2

    backbone = mobilenet_v2(weights=None).features[:7]  # a stride of 8, as the others
    backbone.out_channels = 32
    return backbone


def _heads(norm: Callable[[int], nn.Module]) -> dict[str, Any]:
    """Heads of a Faster R-CNN and of a Mask R-CNN, with a norm behind each convolution."""
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.ops import MultiScaleRoIAlign

    return {
        "box_head": FastRCNNConvFCHead((32, 3, 3), [16], [24], norm_layer=norm),
        "box_predictor": FastRCNNPredictor(24, 4),
        "mask_roi_pool": MultiScaleRoIAlign(["0", "1"], 4, 2),
        "mask_head": MaskRCNNHeads(32, (16,), 1, norm_layer=norm),
        "mask_predictor": MaskRCNNPredictor(16, 8, 4),
    }


def _hand_made(kind: str, backbone: nn.Module, levels: int = 1, **more: Any) -> nn.Module:
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    defaults: dict[str, Any] = {
        "num_classes": None if "box_predictor" in more else 4,
        "min_size": 64,
        "max_size": 100,
        "rpn_anchor_generator": AnchorGenerator(((16, 30),) * levels, ((0.5, 1.0),) * levels),
        "box_roi_pool": MultiScaleRoIAlign([str(level) for level in range(min(levels, 4))], 3, 2),
        "rpn_pre_nms_top_n_test": 60,
        "rpn_post_nms_top_n_test": 30,
        "box_score_thresh": 0.05,
        "box_detections_per_img": 7,
    }
    return getattr(detection, kind)(backbone, **{**defaults, **more})


def _identity() -> dict[str, Any]:
    """A box head of norms and of nothing, and a predictor behind it."""
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    head = nn.Sequential(nn.GroupNorm(4, 16), nn.Identity(), nn.Flatten(), nn.BatchNorm1d(16 * 9), nn.Identity())
    return {"box_head": head, "box_predictor": FastRCNNPredictor(16 * 9, 4)}


# Detectors as people put them together of torchvision's parts and their own, for images of about 100 pixels.
HAND_MADE: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: _hand_made("MaskRCNN", Backbone(), 2, **_heads(nn.BatchNorm2d)),
    "group norm": lambda: _hand_made("MaskRCNN", Backbone(), 2, **_heads(functools.partial(nn.GroupNorm, 4))),
    "identity": lambda: _hand_made("FasterRCNN", _one_level(16), **_identity()),
    "roi_pool": lambda: _with_roi_pool(_hand_made("FasterRCNN", Backbone(), 2, min_size=(48, 64))),
    "resnet18": lambda: _hand_made("FasterRCNN", _resnet(), 5, box_detections_per_img=3),
    "mobilenet": lambda: _hand_made("FasterRCNN", _mobilenet()),
}


def hand_made_detector(name: str) -> nn.Module:
    """One of ``HAND_MADE``, in eval mode, with random weights, the same at every call, and scores that differ."""
    torch.manual_seed(0)
    detector = HAND_MADE[name]().eval()
    _count_statistics(detector, torch.rand(3, 90, 120))
    spread(detector.rpn.head.cls_logits, 200)
    spread(detector.roi_heads.box_predictor.cls_score, 10)
    return detector


STOCK = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)


def stock_detector(name: str) -> tuple[nn.Module, Tensor]:
    """A model of torchvision's with random weights, and an image in which it detects something.

    ResNet-50 has one block of each kind instead of 16, and images are made small: what is compiled remains.
    """
    from inductor_vision.perf.suites.detectors import Problem
    from torchvision.models import detection, resnet

    def shallow(*, weights: Any, progress: bool = True, **options: Any) -> nn.Module:
        return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], **options)

    builder = getattr(detection, name)
    sizes = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 160}
    image = Problem(lambda: None, (96, 128)).image

    def make() -> nn.Module:
        with patch.dict(builder.__wrapped__.__globals__, {"resnet50": shallow}):
            detector = builder(weights=None, weights_backbone=None, **sizes).eval()
        _count_statistics(detector, image)
        return detector

    return Problem(make, (96, 128), (8, 16)).detector.detector, image


def _count_statistics(detector: nn.Module, image: Tensor) -> None:
    """Give batch norms the statistics of what they see, without which random weights would give the same everywhere."""

    def count(norm: Any, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        if x.numel() > x.shape[1]:
            norm.running_var, norm.running_mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1])

    norms = [layer for layer in detector.modules() if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]
    handles = [norm.register_forward_pre_hook(count) for norm in norms]
    with torch.no_grad():
        detector([image])
    for handle in handles:
        handle.remove()


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
