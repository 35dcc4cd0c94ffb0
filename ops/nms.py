"""Non-maximum suppression: of boxes that overlap, the best."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from .boxes import are_boxes, as_integers, check_scored_boxes, first, iou, loop, suppress_greedily
from .registry import (
    accumulate_dtype,
    define_op,
    is_proxy,
    not_scriptable,
    record_call,
    replaces_torchvision,
    serves_torchvision,
)


@overload
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor: ...


@overload
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, max_detections: int) -> tuple[Tensor, Tensor]: ...


@not_scriptable
def nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, max_detections: int | None = None
) -> Tensor | tuple[Tensor, ...]:
    r"""Keep the boxes that do not overlap a better one too much; a drop-in for :func:`torchvision.ops.nms`.

    Boxes are visited in order of decreasing score, equal scores in the order of the boxes, NaN first. A box is kept
    unless

    .. math::
        \text{IoU}(a, b) = \frac{|a \cap b|}{|a| + |b| - |a \cap b|} > \text{iou\_threshold}

    for a box that was kept before it. If the threshold is 0 or more, a box without area, or with a coordinate that is
    NaN or infinite, is always kept.

    Args:
        boxes: ``[N, 4]``, rows of (x1, y1, x2, y2), float32, float64, bfloat16 or float16; the last two are computed in
            float32.
        scores: ``[N]``, of any of these dtypes.
        iou_threshold: compared in float64, whatever the dtype of the boxes.
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
        return record_call(nms, **locals())
    padded = _op(boxes, scores, None, iou_threshold)
    if max_detections is not None:
        return first("nms", max_detections, padded)
    return padded[are_boxes("nms", padded)]


@overload
def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor: ...


@overload
def batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, max_detections: int
) -> tuple[Tensor, Tensor]: ...


@not_scriptable
def batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, max_detections: int | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Call :func:`nms` for the boxes of each class separately; a drop-in for :func:`torchvision.ops.batched_nms`.

    If there are few boxes, torchvision moves the classes apart, which rounds coordinates, and lets boxes of different
    classes suppress each other where coordinates are negative. Here the result is always that of :func:`nms` for each
    class.

    Args:
        boxes, scores, iou_threshold, max_detections: see :func:`nms`.
        idxs: ``[N]``, the class of each box, of any dtype.

    Returns:
        The indices of the boxes of all classes that are kept, best first, in the form of :func:`nms`. An empty
        ``boxes`` gives an empty result in eager mode, whatever the other arguments are.

    Raises:
        RuntimeError, ValueError: in the cases of :func:`nms`.
    """
    if is_proxy(boxes, scores):
        return record_call(batched_nms, **locals())
    # As torchvision does it, whatever the other arguments are; compiled, how many boxes there are may depend on data.
    if (boxes.dim() == 1 or not torch.compiler.is_compiling()) and boxes.numel() == 0:
        padded = boxes.new_empty(0, dtype=torch.int64)
    else:
        padded = _op(boxes, scores, as_integers(idxs), iou_threshold)
    if max_detections is not None:
        return first("batched_nms", max_detections, padded)
    return padded[are_boxes("batched_nms", padded)]


def _fake(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    check_scored_boxes("nms", boxes, scores, classes)
    return boxes.new_empty(boxes.shape[0], dtype=torch.int64)


def _decomposition(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    """The indices of the boxes that are kept, best first, and then -1 up to the number of boxes."""
    check_scored_boxes("nms", boxes, scores, classes)
    return suppress_greedily(boxes.to(accumulate_dtype(boxes.dtype)), scores, classes, iou_threshold, iou)


_op = define_op(
    "nms(Tensor boxes, Tensor scores, Tensor? classes, float iou_threshold) -> Tensor",
    decomposition=_decomposition,
    fake=_fake,
    autocast=False,  # it computes in float32 at least
    untraceable=loop,
)


# On other devices torchvision has kernels, and here is only the decomposition, a loop.


@serves_torchvision("nms")
def _torchvision(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return nms(dets, scores, iou_threshold) if dets.device.type == "cpu" else NotImplemented


# torchvision's operator tells compilers that at least two boxes are kept: exported models then refuse images with none.
@replaces_torchvision("ops.boxes.nms")
def _torchvision_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return (nms if boxes.is_cpu else torch.ops.torchvision.nms)(boxes, scores, iou_threshold)


@replaces_torchvision("ops.boxes.batched_nms")
def _torchvision_batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    if boxes.is_cpu:  # not `device`, which Dynamo cannot ask of torchvision's tv_tensors
        return batched_nms(boxes, scores, idxs, iou_threshold)
    from torchvision.ops.boxes import _batched_nms_coordinate_trick

    return _batched_nms_coordinate_trick(boxes, scores, idxs, iou_threshold)
