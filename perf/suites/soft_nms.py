"""Soft non-maximum suppression, linear and gaussian, of one class and of many.

The reference is the decomposition, a loop, in the same precision; where it does not take seconds it takes part. The
limit is a copy of boxes, scores and results.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ...ops.soft_nms import batched_soft_nms, soft_nms
from .. import backends
from ..boxes import COPY, DECOMPOSITION, OURS, Problem, case, reference
from ..spec import Suite


@dataclasses.dataclass(frozen=True)
class SoftSuppression(Problem):
    method: str = "linear"

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.method}"

    def ours(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        function = soft_nms if self.classes is None else batched_soft_nms
        return function(*tensors, iou_threshold=self.threshold, method=self.method)


_WITH_DECOMPOSITION = ("ours-compiled", "ours-aoti", "decomposition", "copy")

SUITE = Suite(
    name="soft_nms",
    description="soft non-maximum suppression",
    reference=reference,
    contenders=backends.with_triton(*OURS, DECOMPOSITION, COPY),
    cases=tuple(
        case(name, problem, *contenders, tolerance=1e-5)
        for name, problem, *contenders in (
            ("1000", SoftSuppression(1000, 0.3), *_WITH_DECOMPOSITION),
            ("1000-gaussian", SoftSuppression(1000, 0.3, method="gaussian"), *_WITH_DECOMPOSITION),
            ("4000", SoftSuppression(4000, 0.3)),
            ("20000", SoftSuppression(20000, 0.3)),
            ("20000-80-classes", SoftSuppression(20000, 0.3, classes=80)),
            ("growth-50000", SoftSuppression(50000, 0.3, density=20000)),
        )
    ),
)
