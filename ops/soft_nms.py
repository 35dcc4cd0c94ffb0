"""Soft non-maximum suppression: boxes lose score to the better ones that they overlap."""

from __future__ import annotations

import torch
from torch import Tensor

from .boxes import are_boxes, as_integers, check_scored_boxes, first, iou, loop, pad
from .registry import accumulate_dtype, check, define_op, is_proxy, not_scriptable, record_call, register_no_gradient

METHODS = ("linear", "gaussian")


@not_scriptable
def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    *,
    max_detections: int | None = None,
) -> tuple[Tensor, ...]:
    r"""Lower the scores of boxes that overlap better ones, instead of removing the boxes.

    The box with the highest score is taken (the first of them, if scores are equal), and the score of every other box
    is multiplied by a weight that depends on :math:`x`, the overlap of the two (the IoU that :func:`nms` defines). This
    is repeated with the boxes that are left, until all of their scores are less than ``min_score``.

    .. math::
        \text{linear: } \begin{cases} 1 - x & x > \text{iou\_threshold} \\ 1 & \text{otherwise} \end{cases}
        \qquad \text{gaussian: } e^{-x^2 / \text{sigma}}

    Scores are meant to be positive. A score that is 0, negative or NaN is not changed; a box whose score is NaN comes
    first, and lowers others. A box without area, or with a coordinate that is NaN or infinite, overlaps none. The
    results have no gradient.

    Source: Bodla et al., "Soft-NMS: Improving Object Detection With One Line of Code", https://arxiv.org/abs/1704.04503.

    Args:
        boxes: ``[N, 4]``, rows of (x1, y1, x2, y2), float32, float64, bfloat16 or float16.
        scores: ``[N]``, of any of these dtypes. Computation is in float64 if either is float64, otherwise in float32.
        iou_threshold: threshold of the linear weight; compared in float64.
        sigma: width of the gaussian weight, greater than 0.
        min_score: a box whose score is, or becomes, less than this is dropped; compared in float64, before scores are
            rounded to their dtype.
        method: "linear" or "gaussian".
        max_detections: the most boxes to take; results are padded to this size.

    Returns:
        int64 ``[M]``, the indices of the boxes that are not dropped, best first, and ``[M]``, their scores when they
        were taken, in the dtype of ``scores``. In a compiled graph M is a size that depends on data, and may be 0. With
        ``max_detections``, no size depends on data: ``[max_detections]`` each, the indices followed by -1 and the
        scores followed by 0, and an int64 scalar, the number of boxes taken.

    Raises:
        RuntimeError: shapes, dtypes or devices are not compatible, ``sigma`` is not positive, or ``method`` is neither
            of the two.
        ValueError: ``max_detections`` is negative.
    """
    if is_proxy(boxes, scores):
        return record_call(soft_nms, **locals())
    padded, lowered = _op(boxes, scores, None, iou_threshold, sigma, min_score, method)
    if max_detections is not None:
        return first("soft_nms", max_detections, padded, lowered)
    taken = are_boxes("soft_nms", padded).nonzero()[:, 0]  # once: both results are of one size
    return padded[taken], lowered[taken]


@not_scriptable
def batched_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    *,
    max_detections: int | None = None,
) -> tuple[Tensor, ...]:
    """Call :func:`soft_nms` for the boxes of each class separately.

    Args:
        boxes, scores, iou_threshold, sigma, min_score, method, max_detections: see :func:`soft_nms`.
        idxs: ``[N]``, the class of each box, of any dtype.

    Returns:
        The boxes of all classes that are not dropped, best first, in the form of :func:`soft_nms`.

    Raises:
        RuntimeError, ValueError: in the cases of :func:`soft_nms`.
    """
    if is_proxy(boxes, scores):
        return record_call(batched_soft_nms, **locals())
    classes = as_integers(idxs)
    padded, lowered = _op(boxes, scores, classes, iou_threshold, sigma, min_score, method)
    if max_detections is not None:
        return first("batched_soft_nms", max_detections, padded, lowered)
    taken = are_boxes("batched_soft_nms", padded).nonzero()[:, 0]  # once: both results are of one size
    return padded[taken], lowered[taken]


def check_arguments(boxes: Tensor, scores: Tensor, classes: Tensor | None, sigma: float, method: str) -> None:
    check_scored_boxes("soft_nms", boxes, scores, classes)
    check("soft_nms", sigma > 0, f"sigma must be greater than 0, got {sigma}")
    check("soft_nms", method in METHODS, f"method must be one of {', '.join(METHODS)}; got {method!r}")


def _fake(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: str,
) -> tuple[Tensor, Tensor]:
    check_arguments(boxes, scores, classes, sigma, method)
    count = boxes.shape[0]
    return boxes.new_empty(count, dtype=torch.int64), scores.new_empty(count)


def _decomposition(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: str,
) -> tuple[Tensor, Tensor]:
    """Indices, and then -1, and scores, and then 0, up to the number of boxes."""
    check_arguments(boxes, scores, classes, sigma, method)
    dtype = accumulate_dtype(torch.promote_types(boxes.dtype, scores.dtype))
    boxes, current = boxes.to(dtype), scores.to(dtype, copy=True)
    left = torch.arange(len(boxes), device=boxes.device)
    indices, taken = [], []
    while True:
        left = left[~(current[left].double() < min_score)]
        if not len(left):
            break
        best = left[current[left].argmax()]  # NaN before all others, and the first of equal ones
        indices.append(best)
        taken.append(current[best])
        left = left[left != best]
        overlap = iou(boxes[best], boxes[left])
        if method == "linear":
            weight = torch.where(overlap.double() > iou_threshold, 1 - overlap, 1)
        else:
            weight = torch.where(overlap > 0, (-(overlap * overlap) / sigma).exp(), 1)
        if classes is not None:
            weight = weight.where(classes[left] == classes[best], 1)
        lowered = current[left] * weight
        lowered = lowered.where(~lowered.isnan(), 0)  # infinity times 0 is 0
        current[left] = lowered.where((current[left] > 0) & (weight < 1), current[left])
    padding = current.new_zeros(len(boxes) - len(taken))
    return pad(indices, left.new_empty(len(boxes))), torch.cat([*(s[None] for s in taken), padding]).to(scores.dtype)


_op = define_op(
    "soft_nms(Tensor boxes, Tensor scores, Tensor? classes, float iou_threshold, float sigma, float min_score, "
    "str method) -> (Tensor, Tensor)",
    decomposition=_decomposition,
    fake=_fake,
    autocast=False,  # it computes in float32 at least
    untraceable=loop,
)
register_no_gradient(_op)
