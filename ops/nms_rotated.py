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
    """:func:`nms` of rotated boxes: those that overlap no better one by more than the threshold.

    Boxes are decided by falling score, equal ones in their order, NaN first. Overlaps are those of
    :func:`box_iou_rotated`, in float64, of the better box with the other. A box that overlaps none (without area, or
    with a number that is NaN or infinite) is always kept for a threshold of 0 or more.

    Args:
        boxes: ``[N, 5]``, rows of (x, y, width, height, angle), see :func:`box_iou_rotated`; float32, float64, bfloat16
            or float16.
        scores: ``[N]``, of any of these dtypes.
        iou_threshold: compared in float64.
        max_detections: at most so many boxes are kept, the best, and results are of that size.

    Returns:
        int64 ``[M]``, the indices of the boxes that are kept, best first. In a compiled graph M is a size that depends
        on data, and may be 0. With ``max_detections``, int64 ``[max_detections]``, these indices and then -1, and an
        int64 scalar, how many there are before the -1: no size depends on data.

    Raises:
        RuntimeError: shapes, dtypes or devices do not go together.
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
    """:func:`nms_rotated` in each class by itself.

    Args:
        boxes, scores, iou_threshold, max_detections: see :func:`nms_rotated`.
        idxs: ``[N]``, the class of each box, of any dtype.

    Returns:
        As :func:`nms_rotated`, the indices of the boxes that are kept, of all classes, best first.

    Raises:
        RuntimeError, ValueError: as :func:`nms_rotated`.
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
