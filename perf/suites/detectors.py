"""torchvision's detectors, from the image to its detections.

The reference is the stock model in eager mode, in float32: in float64 a model of this depth may rank and suppress
boxes in another way, and in bfloat16 it does. The limit is its convolutions and matrix products alone, one after the
other. Torchvision is accelerated, or not, for all of a process, and each library has threads of its own: so each
contender has its own process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...integrations.convolutions import use_winograd
from ...integrations.one_image import OneImage
from ...integrations.torchvision import accelerate_torchvision
from .. import backends
from ..models import REMARK, OnnxModel, contender, exported, runtimes
from ..one_image import MULTIPLYING, case, compiled, eager, multiplications, packaged, reference, shares, stock_compiled
from ..spec import Job, Prepared, Suite
from ..verify import relative_error

# Random weights give logits that are much the same everywhere, and boxes as large as the image. So what the last layers
# give is shifted and scaled: to these means in each channel, and these standard deviations.
_MEAN_AND_DEVIATION = {
    r"rpn\.head\.cls_logits": (0.0, 1.0),
    r"rpn\.head\.bbox_pred": (0.0, 0.2),
    r"roi_heads\.box_predictor\.cls_score": (0.0, 1.5),
    r"roi_heads\.box_predictor\.bbox_pred": (0.0, 1.0),
    r"roi_heads\.mask_predictor\.mask_fcn_logits": (0.0, 2.0),
    r"roi_heads\.keypoint_predictor\.kps_score_lowres": (0.0, 2.0),
    r"head\.classification_head\.cls_logits": (-8.0, 1.0),
    r"head\.classification_head\.module_list\.\d(\.1)?": (0.0, 1.5),
    r"FCOS\.head\.regression_head\.bbox_reg": (3.0, 1.0),
    r"RetinaNet\.head\.regression_head\.bbox_reg": (0.0, 0.3),
    r"head\.regression_head\.module_list\.\d(\.1)?": (0.0, 1.0),
    r"head\.regression_head\.bbox_ctrness": (0.0, 1.0),
}

# Operators of this package, and the functions of torchvision that they stand for.
_FUNCTIONS = {
    "roi_align": "torchvision.ops.poolers.MultiScaleRoIAlign.forward",
    "nms": "torchvision.ops.boxes.batched_nms",
    "decode": "torchvision.models.detection._utils.BoxCoder.decode",
    "paste_masks": "torchvision.models.detection.transform.paste_masks_in_image",
    "heatmaps_to_keypoints": "torchvision.models.detection.roi_heads.heatmaps_to_keypoints",
}
_RECORD = "operator "  # what these functions are called in a profile begins so
_TORCHVISION_KERNEL = r"torchvision::(\w+)"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A detector and an image.

    Attributes:
        make: the detector, with random weights.
        size: height and width of the image.
        detections: how many there are, at least and at most.
    """

    make: Callable[[], nn.Module]
    size: tuple[int, int] = (480, 640)
    detections: tuple[int, int] = (40, 60)

    @functools.cached_property
    def image(self) -> Tensor:
        """Smooth, with some noise."""
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(1, 3, *(-(-side // 32) for side in self.size), generator=generator)
        smooth = F.interpolate(coarse, size=self.size, mode="bicubic")[0]
        return (0.8 * smooth + 0.2 * torch.rand(3, *self.size, generator=generator)).clamp(0, 1)

    @functools.cached_property
    def detector(self) -> nn.Module:
        """Takes an image; detects something."""
        torch.manual_seed(0)
        detector = OneImage(self.make().eval())
        owner = getattr(detector.detector, "roi_heads", detector.detector)
        owner.score_thresh = 0.0
        with torch.no_grad(), _scaling(detector.detector):
            owner.score_thresh = threshold_in_a_gap(detector(self.image)["scores"], *self.detections)
        return detector


@contextlib.contextmanager
def _scaling(model: nn.Module) -> Iterator[None]:
    """Scale the last layers by what they compute in their first call."""
    scaled = set()

    def scale(layer: Any, inputs: Any, output: Tensor, mean: float, deviation: float) -> Tensor | None:
        if layer in scaled:  # it serves several levels
            return None
        scaled.add(layer)
        others = [d for d in range(output.dim()) if d != 1]
        means = output.mean(others)
        spread = (output - output.mean(others, keepdim=True)).std()
        factor = deviation / spread if spread > 1e-6 else 1.0  # a map of one pixel has none
        layer.weight.mul_(factor)
        layer.bias.sub_(means).mul_(factor).add_(mean)
        return layer.forward(*inputs)

    handles = []
    for name, layer in model.named_modules():
        if not isinstance(layer, MULTIPLYING):
            continue
        for pattern, (mean, deviation) in _MEAN_AND_DEVIATION.items():
            if re.search(rf"\b{pattern}$", f"{type(model).__name__}.{name}"):
                hook = functools.partial(scale, mean=mean, deviation=deviation)
                handles.append(layer.register_forward_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def threshold_in_a_gap(scores: Tensor, fewest: int, most: int) -> float:
    """A score in the widest gap between scores, best first, that leaves neither too few detections nor too many.

    Candidates below a threshold have no influence on what is detected above it.
    """
    among = scores[fewest - 1 : most + 1]
    gap = (among[:-1] - among[1:]).argmax()
    return among[gap : gap + 2].mean().item()


def _stock(name: str) -> nn.Module:
    """A model of torchvision, with the normalization of its trained models."""
    from torchvision.models import detection
    from torchvision.ops.misc import FrozenBatchNorm2d

    with patch.object(nn, "BatchNorm2d", FrozenBatchNorm2d):
        return getattr(detection, name)(weights=None, weights_backbone=None)


def detections_error(found: Any, right: Mapping[str, Tensor]) -> float:
    """The largest relative error of detections, wherever they are among those of about the same score.

    Scores are compared as they come, best first; then each detection with the nearest one of its class. Infinite for
    another number of detections or another class.

    A keypoint is where a map is highest, and a mask ends where a box does, in whole pixels: rounding may move either.
    Of these, one in a hundred is let off.
    """
    if not isinstance(found, Mapping) or found.keys() != right.keys() or found["boxes"].shape != right["boxes"].shape:
        return math.inf
    order = _nearest(found, right)
    if len(order.unique()) < len(order):
        return math.inf
    error = relative_error(found["scores"], right["scores"])
    for name, value in right.items():
        ours = found[name][order]
        if name in ("keypoints", "masks") and ours.shape == value.shape and ours.isfinite().all():
            far = (ours - value).abs() > 1e-3 * value.abs().max()
            ours = value.where(far, ours) if far.float().mean() < 0.01 else ours
        error = max(error, relative_error(ours, value))
    return error


def winograd_error(found: Any, right: Mapping[str, Tensor]) -> float:
    """The error of detections, or, where that is larger, the largest difference of scores, or of boxes in units of a
    hundred pixels: docs/numerics.md promises scores to 1e-4 and boxes to a hundredth of a pixel."""
    error = detections_error(found, right)
    if error == math.inf or not len(right["boxes"]):
        return error
    order = _nearest(found, right)
    scores, boxes = ((found[name][order] - right[name]).abs().max().item() for name in ("scores", "boxes"))
    return max(error, scores, boxes / 100)


def _nearest(found: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
    """For each of the right detections, the index of the one found of its class whose box is nearest.

    Of equal boxes, in which masks may differ, it is the one whose score is nearest.
    """
    if not len(right["boxes"]):
        return torch.empty(0, dtype=torch.int64)
    distance = torch.cdist(right["boxes"], found["boxes"], p=math.inf)
    distance = distance + (right["scores"][:, None] - found["scores"]).abs()  # much less than a pixel
    return distance.masked_fill(right["labels"][:, None] != found["labels"], math.inf).argmin(1)


def missed_share(found: Any, right: Mapping[str, Tensor]) -> float:
    """Which part of the detections of both has no counterpart in the other: one of the same class that overlaps it by
    half. Infinite for what are no detections."""
    from torchvision.ops import box_iou

    if not isinstance(found, Mapping) or found.keys() != right.keys() or not found["boxes"].isfinite().all():
        return math.inf
    alike = box_iou(found["boxes"].float(), right["boxes"].float()) > 0.5
    alike &= found["labels"][:, None] == right["labels"]
    return 1 - (alike.any(0).sum() + alike.any(1).sum()).item() / sum(alike.shape)


_stock_compiled = functools.partial(stock_compiled, pattern=_TORCHVISION_KERNEL)


def _packaged(job: Job, bfloat16: bool = False, converted: bool = False, winograd: bool = False) -> Prepared:
    if winograd:
        use_winograd()
    image, detector = job.inputs.image, job.inputs.detector.detector
    detector = backends.Autocast(detector) if bfloat16 else detector
    if converted:
        image, detector = image.bfloat16(), detector.bfloat16()
    return packaged(detector, image)


def _exported(job: Job) -> OnnxModel:
    """Export the model after ``accelerate_torchvision()``: ``torch.onnx.export`` alone cannot."""
    problem = job.inputs
    with torch.no_grad():
        names = list(problem.detector(problem.image))
    accelerate_torchvision()
    return exported(job.case.name, problem.detector, problem.image, names)


def _eager(job: Job, channels_last: bool = False) -> Prepared:
    prepared = eager(job, channels_last)
    return dataclasses.replace(prepared, shares=functools.partial(_shares_of_functions, prepared.call))


def _shares_of_functions(call: Callable[[], Any]) -> dict[str, float]:
    with contextlib.ExitStack() as stack:
        for operator, path in _FUNCTIONS.items():
            stack.enter_context(patch(path, _recorded(operator, pkgutil.resolve_name(path))))
        return shares(call, _RECORD + r"(\w+)")


def _recorded(operator: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(_RECORD + operator):
            return function(*args, **kwargs)

    return recorded


_MODELS = (
    "fasterrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
)

# bfloat16 decides otherwise where scores or overlaps are close: real models differ in 3 to 14 of 100 detections.
_LOW_PRECISION = {"error": missed_share, "tolerance": 0.3}

SUITE = Suite(
    name="detectors",
    description="torchvision's detectors with random weights, from the image to its detections",
    remark=f"{REMARK} converted: weights and image are in bfloat16. Of what computes in bfloat16, up to three in ten "
    "detections may differ.",
    reference=reference,
    error=detections_error,
    contenders=(
        contender("ours-frozen", "ours", compiled, compiled=True),
        contender("ours-compiled", "ours", functools.partial(compiled, freezing=False), compiled=True),
        contender("ours-channels-last", "ours", functools.partial(compiled, channels_last=True), compiled=True),
        contender("ours-aoti", "ours", _packaged, compiled=True),
        contender(
            "ours-winograd", "ours", functools.partial(compiled, winograd=True), compiled=True, error=winograd_error
        ),
        contender(
            "ours-aoti-winograd",
            "ours",
            functools.partial(_packaged, winograd=True),
            compiled=True,
            error=winograd_error,
        ),
        contender("ours-bf16", "ours", functools.partial(compiled, bfloat16=True), compiled=True, **_LOW_PRECISION),
        contender(
            "ours-aoti-bf16", "ours", functools.partial(_packaged, bfloat16=True), compiled=True, **_LOW_PRECISION
        ),
        contender(
            "ours-converted-bf16",
            "ours",
            functools.partial(compiled, converted=True),
            compiled=True,
            **_LOW_PRECISION,
        ),
        contender(
            "ours-aoti-converted-bf16",
            "ours",
            functools.partial(_packaged, converted=True),
            compiled=True,
            **_LOW_PRECISION,
        ),
        contender("stock", "peer", _eager),
        contender("stock-channels-last", "peer", functools.partial(_eager, channels_last=True)),
        contender("stock-compiled", "peer", _stock_compiled, compiled=True),
        contender(
            "stock-compiled-bf16",
            "peer",
            functools.partial(_stock_compiled, bfloat16=True),
            compiled=True,
            **_LOW_PRECISION,
        ),
        *runtimes(_exported, **_LOW_PRECISION),
        contender("multiplications", "limit", multiplications),
    ),
    cases=tuple(case(name, Problem(functools.partial(_stock, name))) for name in _MODELS),
)
