"""What the operators on boxes with scores share: checks, classes, results of a fixed size, suppression as a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .registry import check

CORNERS = "x1, y1, x2, y2"


def as_integers(classes: Tensor) -> Tensor:
    if not classes.is_floating_point():
        return classes.long()
    return classes.double().view(torch.int64).where(classes != 0, 0)  # equal where the numbers are; -0 is 0


# Operators on boxes have results of a fixed size: indices of boxes, which end in -1. Public functions select what these
# stand for in their own bodies: where Dynamo does not capture sizes that depend on data, it breaks the graph once for
# each function that it is in by then.


def are_boxes(op: str, padded: Tensor) -> Tensor:
    """Which indices are not -1.

    Raises:
        RuntimeError: they are those of several calls, under :func:`torch.vmap`.
    """
    # Compiled code has torch's own error: Dynamo would keep the question in its graph.
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(padded):
        raise RuntimeError(
            f"{op}: how many boxes are kept depends on data, which torch.vmap does not support; give max_detections"
        )
    return padded >= 0


def first(op: str, max_detections: int, indices: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """The results of an operator for at most that many boxes: indices, and then -1; values, and then 0; and how many.

    Raises:
        ValueError: ``max_detections`` is negative.
    """
    if max_detections < 0:
        raise ValueError(f"{op}: max_detections must not be negative, got {max_detections}")

    def of_all(tensor: Tensor, padding: int) -> Tensor:
        # Of this size whatever that of the tensor is, which may be dynamic.
        return torch.cat([tensor, tensor.new_full((max_detections,), padding)]).narrow(0, 0, max_detections)

    indices = of_all(indices, -1)
    return indices, *(of_all(value, 0) for value in values), (indices >= 0).sum()


def pad(indices: list[Tensor], like: Tensor) -> Tensor:
    """Single indices, and then -1, as many as ``like`` has."""
    return torch.cat([*(index[None] for index in indices), like.new_full((len(like) - len(indices),), -1)])


def check_boxes(op: str, name: str, boxes: Tensor, columns: str) -> None:
    shape, count = tuple(boxes.shape), columns.count(",") + 1
    check(op, boxes.dim() == 2 and shape[1] == count, f"{name} must be [N, {count}], rows of ({columns}); got {shape}")
    check(op, boxes.is_floating_point(), f"{name} must be of a floating dtype, got {boxes.dtype}")


def check_scored_boxes(op: str, boxes: Tensor, scores: Tensor, classes: Tensor | None, columns: str = CORNERS) -> None:
    """Raise RuntimeError unless there is a score for each box, and a class if there are any."""
    check_boxes(op, "boxes", boxes, columns)
    check(op, scores.is_floating_point(), f"scores must be of a floating dtype, got {scores.dtype}")
    _check_each(op, "scores", scores, boxes)
    if classes is not None:
        check(op, classes.dtype == torch.int64, f"classes must be int64, got {classes.dtype}")
        _check_each(op, "idxs", classes, boxes)


def _check_each(op: str, name: str, values: Tensor, boxes: Tensor) -> None:
    """One value for each box."""
    check(op, values.dim() == 1, f"{name} must be [N], one for each box; got {tuple(values.shape)}")
    count, wanted = values.shape[0], boxes.shape[0]
    check(op, count == wanted, f"{name} must be one for each box; there are {count} and {wanted} boxes")
    check(op, values.device == boxes.device, f"{name} must be on {boxes.device}, got {values.device}")


def iou(box: Tensor, others: Tensor, divide: Callable[[Tensor, Tensor], Tensor] = torch.div) -> Tensor:
    """The overlap of boxes, ``[..., 4]``, with others, in their dtype: intersection over union."""
    x1, y1, x2, y2 = others.unbind(-1)
    left, top, right, bottom = box.unbind(-1)
    width = _min(right, x2) - _max(left, x1)
    height = _min(bottom, y2) - _max(top, y1)
    intersection = _max(torch.zeros_like(width), width) * _max(torch.zeros_like(height), height)
    return divide(intersection, (right - left) * (bottom - top) + (x2 - x1) * (y2 - y1) - intersection)


def rounded_quotient(a: Tensor, b: Tensor | int) -> Tensor:
    """The quotient as a processor rounds it, which a GPU's division in float32 does not by itself: it decides where
    bins begin, and ties of an overlap with a threshold."""
    return (a.double() / b).to(a.dtype)


def _max(a: Tensor, b: Tensor) -> Tensor:
    """The maximum as C++ computes it: the first if either is NaN."""
    return b.where(a < b, a)


def _min(a: Tensor, b: Tensor) -> Tensor:
    """The minimum as C++ computes it: the first if either is NaN."""
    return b.where(b < a, a)


def suppress_greedily(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    iou_threshold: float,
    iou: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The indices of the boxes that are kept, best first, and then -1 up to the number of boxes.

    Args:
        iou: of a box with others.
    """
    order = scores.sort(stable=True, descending=True).indices
    boxes = boxes[order]
    if classes is not None:
        classes = classes[order]

    left = torch.ones_like(order, dtype=torch.bool)
    kept = []
    for i in range(len(order)):
        if not left[i]:
            continue
        kept.append(order[i])
        suppressed = iou(boxes[i], boxes[i + 1 :]).double() > iou_threshold
        if classes is not None:
            suppressed &= classes[i + 1 :] == classes[i]
        left[i + 1 :] &= ~suppressed
    return pad(kept, order)


def loop(**arguments: Any) -> str:
    """Why the decompositions that suppress cannot be traced."""
    return "a loop depends on which boxes are kept"
