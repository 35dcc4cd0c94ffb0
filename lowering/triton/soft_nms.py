"""soft_nms as a Triton kernel."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ...ops import soft_nms
from ...ops.registry import accumulate_dtype
from ..common.registry import TritonProgram, triton_program_for
from .boxes import first_best, first_best_of_all
from .kernels import kernel, launch, positions, quotient, wait_for_stores

# Arguments of kernels have no types in Python.
# mypy: disable-error-code="no-untyped-def"


@kernel
def greater(a, b):
    """The second where either is NaN, as in C++'s std::max(b, a)."""
    return tl.where(b < a, a, b)


@kernel
def overlap(left, top, right, bottom, x1, y1, x2, y2):
    """Intersection over union of a box with others."""
    width = tl.where(x2 < right, x2, right) - greater(x1, left)
    height = tl.where(y2 < bottom, y2, bottom) - greater(y1, top)
    intersection = greater(width, 0.0) * greater(height, 0.0)
    union = (right - left) * (bottom - top) + (x2 - x1) * (y2 - y1) - intersection
    return quotient(intersection, union)


@kernel
def take(
    boxes,  # [number, 4]
    classes,  # [number], not read if not CLASSES
    current,  # [number], scores; as the kernel lowers them
    indices,  # [number], -1 to begin with
    taken,  # [number], the scores of the boxes that were taken
    left,  # [number], 1: boxes that can still be taken
    numbers,  # [3], IoU threshold, sigma, least score; not constants, which cannot be infinite or NaN
    number,
    CLASSES: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    GPU: tl.constexpr,
):
    """Take the best box, lower the scores of those it overlaps, until the best that is left is below the least score.

    The lowering for one box and the search for the next are one pass.
    """
    dtype = current.dtype.element_ty
    iou_threshold, sigma, min_score = tl.load(numbers), tl.load(numbers + 1).to(dtype), tl.load(numbers + 2)
    count = 0
    last = -1
    any_left = number
    while any_left > 0:
        box = boxes + positions(tl.maximum(last, 0), WIDE) * 4
        last_left, last_top = tl.load(box), tl.load(box + 1)
        last_right, last_bottom = tl.load(box + 2), tl.load(box + 3)
        best = tl.full([BLOCK], -float("inf"), dtype)
        best_place = tl.full([BLOCK], -1, tl.int32)
        for begin in range(0, number, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            exists = place < number
            available = (tl.load(left + place, mask=exists, other=0) != 0) & (place != last)
            score = tl.load(current + place, mask=exists, other=0.0)
            if last >= 0:
                at = boxes + positions(place, WIDE) * 4
                x1, y1 = tl.load(at, mask=exists, other=0.0), tl.load(at + 1, mask=exists, other=0.0)
                x2, y2 = tl.load(at + 2, mask=exists, other=0.0), tl.load(at + 3, mask=exists, other=0.0)
                iou = overlap(last_left, last_top, last_right, last_bottom, x1, y1, x2, y2)
                if GAUSSIAN:
                    weight = tl.where(iou > 0, tl.exp(-(iou * iou) / sigma), 1.0)
                else:
                    weight = tl.where(iou.to(tl.float64) > iou_threshold, 1 - iou, 1.0)
                if CLASSES:
                    same = tl.load(classes + place, mask=exists, other=0) == tl.load(classes + last)
                    weight = tl.where(same, weight, 1.0)
                lowered = score * weight
                lowered = tl.where(lowered != lowered, 0.0, lowered)  # infinity times 0 is 0
                score = tl.where((score > 0) & (weight < 1), lowered, score)
                tl.store(current + place, score, mask=exists)
            available = available & ~(score.to(tl.float64) < min_score)
            tl.store(left + place, available.to(tl.int32), mask=exists)
            best, best_place = first_best(score, tl.where(available, place, -1), best, best_place)
        last = first_best_of_all(best, best_place)
        any_left = tl.where(last >= 0, 1, 0)
        chosen = tl.max(tl.where(best_place == last, best, -float("inf")), 0)
        is_nan = tl.max(((best_place == last) & (best != best)).to(tl.int32), 0)
        if last >= 0:
            tl.store(indices + count, last.to(tl.int64))
            tl.store(taken + count, tl.where(is_nan > 0, float("nan"), chosen))
        count += 1
        wait_for_stores(GPU)


def _soft_nms(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: str,
) -> tuple[Tensor, Tensor]:
    soft_nms.check_arguments(boxes, scores, classes, sigma, method)
    dtype = accumulate_dtype(torch.promote_types(boxes.dtype, scores.dtype))
    number = boxes.shape[0]
    current = scores.to(dtype).contiguous()
    numbers = [current.new_full((1,), value, dtype=torch.float64) for value in (iou_threshold, sigma, min_score)]
    outputs = {
        "current": current,
        "indices": current.new_full((number,), -1, dtype=torch.int64),
        "taken": current.new_zeros(number),
        "left": current.new_ones(number, dtype=torch.int32),
    }
    _, indices, taken, _ = launch(
        take,
        (1,),
        outputs,
        boxes=boxes.to(dtype).contiguous(),
        classes=boxes if classes is None else classes.contiguous(),
        numbers=torch.cat(numbers),
        number=number,
        CLASSES=classes is not None,
        GAUSSIAN=method == "gaussian",
        BLOCK=512,
    )
    return indices, taken.to(scores.dtype)


triton_program_for("soft_nms", TritonProgram(_soft_nms))
