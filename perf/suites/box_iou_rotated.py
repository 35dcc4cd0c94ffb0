"""Overlaps of rotated boxes, all of one list with all of another.

The reference is the decomposition in float64. The limit is a copy of the bytes of boxes and result.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from ...ops.box_iou_rotated import box_iou_rotated
from ...ops.registry import OPS
from .. import backends
from ..boxes import COPY, DECOMPOSITION, OURS, Problem, case, reference
from ..regions import compiled
from ..spec import Contender, Job, Prepared, Suite


@dataclasses.dataclass(frozen=True)
class Overlaps(Problem):
    """Overlaps of so many boxes with as many; the threshold means nothing."""

    threshold: float = 0.0
    rotated: bool = True

    def __str__(self) -> str:
        return f"{self.count} boxes with {self.count}"

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        both = Problem(2 * self.count, 0.0, rotated=True).tensors[0]
        return both[: self.count], both[self.count :]

    @functools.cached_property
    def right(self) -> Tensor:
        return backends.eager(self.ours, [boxes.double() for boxes in self.tensors]).output

    def ours(self, *tensors: Tensor) -> Tensor:
        return box_iou_rotated(*tensors)


def _torchvision(job: Job) -> Prepared:
    return backends.eager(torch.ops.torchvision.box_iou_rotated, job.inputs.tensors)


def _compiled_decomposition(job: Job) -> Prepared:
    return compiled(OPS["box_iou_rotated"].decomposition, job.inputs.tensors)


_CONTENDERS = backends.with_triton(
    *OURS,
    Contender("torchvision", "peer", _torchvision, check=backends.needs_torchvision),
    Contender("decomposition-compiled", "peer", _compiled_decomposition, compiled=True),
    DECOMPOSITION,
    COPY,
)

SUITE = Suite(
    name="box_iou_rotated",
    description="overlaps of rotated boxes",
    reference=reference,
    contenders=_CONTENDERS,
    cases=(
        case("300", Overlaps(300), tolerance=1e-5),
        case("1000", Overlaps(1000), tolerance=1e-5),
        case("1000-1-thread", Overlaps(1000), "ours-1-thread", "torchvision", "copy", tolerance=1e-5),
        case("4000", Overlaps(4000), "ours-compiled", "ours-1-thread", "torchvision", "copy", tolerance=1e-5),
    ),
)
