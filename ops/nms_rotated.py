"""Non-maximum suppression of boxes that are turned about their centres."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from .box_iou_rotated import COLUMNS, iou_rotated
from .boxes import are_boxes, as_integers, check_scored_boxes, first, loop, suppress_greedily
from .registry import define_op, is_proxy, not_scriptable, record_call


@overload
def nms_rotated(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor: ...


@overload
def nms_rotated(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, max_detections: int
) -> tuple[Tensor, Tensor]: ...


@not_scriptable
def nms_rotated(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, max_detections: int | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Keep the rotated boxes that do not overlap a better one by more than the threshold.

    Boxes are visited in order of decreasing score, equal scores in the order of the boxes, NaN first. The overlap is
    :func:`box_iou_rotated` of the better box with the other, in float64. If the threshold is 0 or more, a box that
    overlaps none (without area, or with a number that is NaN or infinite) is always kept.

    Args:
        boxes: ``[N, 5]``, rows of (x, y, width, height, angle), see :func:`box_iou_rotated`; float32, float64, bfloat16
            or float16.
        scores: ``[N]``, of any of these dtypes.
        iou_threshold: compared in float64.
        max_detections: the most boxes to keep, the best ones; results are padded to this size.

    Returns:
        int64 ``[M]``, the indices of the boxes that are kept, best first. In a compiled graph M is a size that depends
        on data, and may be 0. With ``max_detections``, no size depends on data: int64 ``[max_detections]``, these
        indices followed by -1, and an int64 scalar, the number of boxes kept.

    Raises:
        RuntimeError: shapes, dtypes or devices are not compatible.
        ValueError: ``max_detections`` is negative.
    """
    if is_proxy(boxes, scores):
        return record_call(nms_rotated, **locals())
    padded = _op(boxes, scores, None, iou_threshold)
    if max_detections is not None:
        return first("nms_rotated", max_detections, padded)
    return padded[are_boxes("nms_rotated", padded)]


@overload
def batched_nms_rotated(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor: ...


@overload
def batched_nms_rotated(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, max_detections: int
) -> tuple[Tensor, Tensor]: ...


@not_scriptable
def batched_nms_rotated(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, max_detections: int | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Call :func:`nms_rotated` for the boxes of each class separately.

    Args:
        boxes, scores, iou_threshold, max_detections: see :func:`nms_rotated`.
        idxs: ``[N]``, the class of each box, of any dtype.

    Returns:
        The indices of the boxes of all classes that are kept, best first, in the form of :func:`nms_rotated`.

    Raises:
        RuntimeError, ValueError: in the cases of :func:`nms_rotated`.
    """
    if is_proxy(boxes, scores):
        return record_call(batched_nms_rotated, **locals())
    padded = _op(boxes, scores, as_integers(idxs), iou_threshold)
    if max_detections is not None:
        return first("batched_nms_rotated", max_detections, padded)
    return padded[are_boxes("batched_nms_rotated", padded)]


def _fake(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    check_scored_boxes("nms_rotated", boxes, scores, classes, COLUMNS)
    return boxes.new_empty(boxes.shape[0], dtype=torch.int64)


def _decomposition(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    """The indices of the boxes that are kept, best first, and then -1 up to the number of boxes."""
    check_scored_boxes("nms_rotated", boxes, scores, classes, COLUMNS)
    return suppress_greedily(boxes, scores, classes, iou_threshold, iou_rotated)


_op = define_op(
    "nms_rotated(Tensor boxes, Tensor scores, Tensor? classes, float iou_threshold) -> Tensor",
    decomposition=_decomposition,
    fake=_fake,
    autocast=False,  # it computes in float64
    untraceable=loop,
)
