"""Non-maximum suppression of boxes that are turned about their centres."""

from __future__ import annotations

import torch
from torch import Tensor

from .box_iou_rotated import COLUMNS, iou_rotated
from .boxes import as_integers, check_scored_boxes, indices, loop, suppress_greedily
from .registry import define_op, is_proxy, not_scriptable, record_call


@not_scriptable
def nms_rotated(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """:func:`nms` of rotated boxes: those that overlap no better one by more than the threshold.

    Boxes are decided by falling score, equal ones in their order, NaN first. Overlaps are those of
    :func:`box_iou_rotated`, in float64, of the better box with the other. A box that overlaps none (without area, or
    with a number that is NaN or infinite) is always kept for a threshold of 0 or more.

    Args:
        boxes: ``[N, 5]``, rows of (x, y, width, height, angle), see :func:`box_iou_rotated`; float32, float64, bfloat16
            or float16.
        scores: ``[N]``, of any of these dtypes.
        iou_threshold: compared in float64.

    Returns:
        int64 ``[M]``, the indices of the boxes that are kept, best first. In a compiled graph M is a size that depends
        on data, and may be 0.

    Raises:
        RuntimeError: shapes, dtypes or devices do not go together.
    """
    if is_proxy(boxes, scores):
        return record_call(nms_rotated, **locals())
    return indices(_op(boxes, scores, None, iou_threshold))


@not_scriptable
def batched_nms_rotated(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """:func:`nms_rotated` in each class by itself.

    Args:
        boxes, scores, iou_threshold: see :func:`nms_rotated`.
        idxs: ``[N]``, the class of each box, of any dtype.

    Returns:
        int64 ``[M]``, the indices of the boxes that are kept, of all classes, best first.

    Raises:
        RuntimeError: shapes, dtypes or devices do not go together.
    """
    if is_proxy(boxes, scores):
        return record_call(batched_nms_rotated, **locals())
    return indices(_op(boxes, scores, as_integers(idxs), iou_threshold))


def _fake(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    check_scored_boxes("nms_rotated", boxes, scores, classes, COLUMNS)
    return boxes.new_empty(boxes.shape[0], dtype=torch.int64)


def _decomposition(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    """The indices of the boxes that are kept, best first, and then -1 up to the number of boxes."""
    check_scored_boxes("nms_rotated", boxes, scores, classes, COLUMNS)
    return suppress_greedily(boxes, scores, classes, iou_threshold, iou_rotated)


_op = define_op(
    "nms_rotated(Tensor boxes, Tensor scores, Tensor? classes, float iou_threshold) -> Tensor",
    family="nms_rotated",
    decomposition=_decomposition,
    fake=_fake,
    autocast=False,  # it computes in float64
    untraceable=loop,
)
