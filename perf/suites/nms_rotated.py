"""Non-maximum suppression of rotated boxes.

The reference is the decomposition, a loop with the same overlaps. The limit is a copy of boxes, scores and result.
"""

from __future__ import annotations

from torch import Tensor

from ...ops.nms_rotated import batched_nms_rotated, nms_rotated
from .. import backends
from ..boxes import COPY, DECOMPOSITION, OURS, Problem, case, reference
from ..spec import Suite


class RotatedSuppression(Problem):
    def ours(self, *tensors: Tensor) -> Tensor:
        return (nms_rotated if self.classes is None else batched_nms_rotated)(*tensors, self.threshold)


def _problem(count: int, threshold: float, density: int | None = None, classes: int | None = None) -> Problem:
    return RotatedSuppression(count, threshold, density, classes, rotated=True)


SUITE = Suite(
    name="nms_rotated",
    description="non-maximum suppression of rotated boxes",
    reference=reference,
    contenders=backends.with_triton(*OURS, DECOMPOSITION, COPY),
    cases=(
        case("1000", _problem(1000, 0.5), "ours-compiled", "ours-aoti", "decomposition", "copy"),
        case("4000", _problem(4000, 0.7)),
        case("20000", _problem(20000, 0.5)),
        case("20000-1-thread", _problem(20000, 0.5), "ours-1-thread", "copy"),
        case("4000-80-classes", _problem(4000, 0.5, classes=80)),
        case("growth-50000", _problem(50000, 0.5, density=20000)),
    ),
)
