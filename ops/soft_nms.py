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
    r"""Lowers the scores of boxes that overlap better ones, instead of removing them.

    The box of the highest score is taken, of equal ones the first, and the score of every other box is multiplied by a
    weight that depends on its overlap :math:`x` with it (:func:`nms` says what that is). Then the same among those that
    are left, as long as there is one whose score is not less than ``min_score``.

    .. math::
        \text{linear: } \begin{cases} 1 - x & x > \text{iou\_threshold} \\ 1 & \text{otherwise} \end{cases}
        \qquad \text{gaussian: } e^{-x^2 / \text{sigma}}

    Scores are meant to be positive. One that is 0, negative or NaN is not changed; NaN comes first, and lowers others.
    A box without area, or with a coordinate that is NaN or infinite, overlaps none. The results have no gradient.

    Source: Bodla et al., "Soft-NMS: Improving Object Detection With One Line of Code", https://arxiv.org/abs/1704.04503.

    Args:
        boxes: ``[N, 4]``, rows of (x1, y1, x2, y2), float32, float64, bfloat16 or float16.
        scores: ``[N]``, of any of these dtypes. It is computed in float64 if either is float64, otherwise in float32.
        iou_threshold: of the linear weight; compared in float64.
        sigma: of the gaussian weight, greater than 0.
        min_score: boxes are dropped whose score is, or becomes, less than that; compared in float64, before scores are
            rounded to their dtype.
        method: "linear" or "gaussian".
        max_detections: at most so many boxes are taken, and results are of that size.

    Returns:
        int64 ``[M]``, the indices of the boxes that are not dropped, best first, and ``[M]``, their scores when they
        were taken, of the dtype of ``scores``. In a compiled graph M is a size that depends on data, and may be 0. With
        ``max_detections``, ``[max_detections]`` each, the indices and then -1, the scores and then 0, and an int64
        scalar, how many there are: no size depends on data.

    Raises:
        RuntimeError: shapes, dtypes or devices do not go together, ``sigma`` is not positive, there is no such method.
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
    """:func:`soft_nms` in each class by itself.

    Args:
        boxes, scores, iou_threshold, sigma, min_score, method, max_detections: see :func:`soft_nms`.
        idxs: ``[N]``, the class of each box, of any dtype.

    Returns:
        As :func:`soft_nms`, of all classes, best first.

    Raises:
        RuntimeError, ValueError: as :func:`soft_nms`.
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
