"""Non-maximum suppression: of boxes that overlap, the best."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registry import accumulate_dtype, check, define_op, replaces_torchvision, serves_torchvision


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    r"""The boxes that overlap no better one too much; a drop-in for :func:`torchvision.ops.nms`.

    Boxes are decided by falling score, equal ones in their order, NaN first. A box is kept unless

    .. math::
        \text{IoU}(a, b) = \frac{|a \cap b|}{|a| + |b| - |a \cap b|} > \text{iou\_threshold}

    for a box that was kept before. A box without area, or with a coordinate that is NaN or infinite, is always kept for
    a threshold of 0 or more.

    Args:
        boxes: ``[N, 4]``, rows of (x1, y1, x2, y2), float32, float64, bfloat16 or float16; the last two are computed in
            float32.
        scores: ``[N]``, of any of these dtypes.
        iou_threshold: compared in float64, whatever the dtype of the boxes.

    Returns:
        int64 ``[M]``, the indices of the boxes that are kept, best first. In a compiled graph M is a size that depends
        on data, and may be 0.

    Raises:
        RuntimeError: shapes, dtypes or devices do not go together.
    """
    return _indices(_op(boxes, scores, None, iou_threshold))


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """:func:`nms` in each class by itself; a drop-in for :func:`torchvision.ops.batched_nms`.

    torchvision moves the classes apart where boxes are few, which rounds the coordinates differently, and lets classes
    meet where they are negative. Here the result is that of :func:`nms` for each class, always.

    Args:
        boxes, scores, iou_threshold: see :func:`nms`.
        idxs: ``[N]``, the class of each box, of any dtype.

    Returns:
        int64 ``[M]``, the indices of the boxes that are kept, of all classes, best first.

    Raises:
        RuntimeError: shapes, dtypes or devices do not go together.
    """
    return _indices(_op(boxes, scores, _as_integers(idxs), iou_threshold))


def _as_integers(classes: Tensor) -> Tensor:
    if not classes.is_floating_point():
        return classes.long()
    return classes.double().view(torch.int64).where(classes != 0, 0)  # equal where the numbers are; -0 is 0


def _indices(padded: Tensor) -> Tensor:
    return padded[padded >= 0]


def _check(boxes: Tensor, scores: Tensor, classes: Tensor | None) -> None:
    shape = tuple(boxes.shape)
    check("nms", boxes.dim() == 2 and shape[1] == 4, f"boxes must be [N, 4], rows of (x1, y1, x2, y2); got {shape}")
    check("nms", boxes.is_floating_point(), f"boxes must be of a floating dtype, got {boxes.dtype}")
    check("nms", scores.is_floating_point(), f"scores must be of a floating dtype, got {scores.dtype}")
    _check_each("scores", scores, boxes)
    if classes is not None:
        check("nms", classes.dtype == torch.int64, f"classes must be int64, got {classes.dtype}")
        _check_each("idxs", classes, boxes)


def _check_each(name: str, values: Tensor, boxes: Tensor) -> None:
    """One value for each box."""
    check("nms", values.dim() == 1, f"{name} must be [N], one for each box; got {tuple(values.shape)}")
    count, wanted = values.shape[0], boxes.shape[0]
    check("nms", count == wanted, f"{name} must be one for each box; there are {count} and {wanted} boxes")
    check("nms", values.device == boxes.device, f"{name} must be on {boxes.device}, got {values.device}")


def _fake(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    _check(boxes, scores, classes)
    return boxes.new_empty(boxes.shape[0], dtype=torch.int64)


def _decomposition(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    """The indices of the boxes that are kept, best first, and then -1 up to the number of boxes."""
    _check(boxes, scores, classes)
    order = scores.sort(stable=True, descending=True).indices
    x1, y1, x2, y2 = boxes[order].to(accumulate_dtype(boxes.dtype)).unbind(1)
    areas = (x2 - x1) * (y2 - y1)
    if classes is not None:
        classes = classes[order]

    left = torch.ones_like(order, dtype=torch.bool)
    kept = []
    for i in range(len(order)):
        if not left[i]:
            continue
        kept.append(order[i])
        width = _min(x2[i], x2[i + 1 :]) - _max(x1[i], x1[i + 1 :])
        height = _min(y2[i], y2[i + 1 :]) - _max(y1[i], y1[i + 1 :])
        intersection = _max(torch.zeros_like(width), width) * _max(torch.zeros_like(height), height)
        iou = intersection / (areas[i] + areas[i + 1 :] - intersection)
        suppressed = iou.double() > iou_threshold
        if classes is not None:
            suppressed &= classes[i + 1 :] == classes[i]
        left[i + 1 :] &= ~suppressed
    padding = order.new_full((len(order) - len(kept),), -1)
    return torch.cat([*(index[None] for index in kept), padding])


def _max(a: Tensor, b: Tensor) -> Tensor:
    """As C++ has it: the first where either is NaN."""
    return b.where(a < b, a)


def _min(a: Tensor, b: Tensor) -> Tensor:
    """As C++ has it: the first where either is NaN."""
    return b.where(b < a, a)


def _loop(*args: Any) -> str:
    return "a loop depends on which boxes are kept"


_op = define_op(
    "nms(Tensor boxes, Tensor scores, Tensor? classes, float iou_threshold) -> Tensor",
    family="nms",
    decomposition=_decomposition,
    fake=_fake,
    autocast=False,  # it computes in float32 at least
    untraceable=_loop,
)


# On other devices torchvision has kernels, and here is only the decomposition, a loop.


@serves_torchvision("nms")
def _torchvision(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return nms(dets, scores, iou_threshold) if dets.device.type == "cpu" else NotImplemented


# torchvision's operator tells compilers that at least two boxes are kept: exported models then refuse images with none.
@replaces_torchvision("ops.boxes.nms")
def _torchvision_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    on_cpu = boxes.device.type == "cpu"
    return (nms if on_cpu else torch.ops.torchvision.nms)(boxes, scores, iou_threshold)


@replaces_torchvision("ops.boxes.batched_nms")
def _torchvision_batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    if boxes.device.type == "cpu":
        return batched_nms(boxes, scores, idxs, iou_threshold)
    from torchvision.ops.boxes import _batched_nms_coordinate_trick

    return _batched_nms_coordinate_trick(boxes, scores, idxs, iou_threshold)
