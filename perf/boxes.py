"""What the suites of the operators on boxes with scores share: boxes, this package as a contender, and the limit."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from . import backends
from .regions import compiled
from .spec import Case, Contender, Job, Prepared
from .verify import tensors as as_tensors

_IMAGE = 1000, 800  # width and height


@dataclasses.dataclass(frozen=True)
class Problem:
    """Boxes with centres anywhere on an image of 1000 x 800, or a larger one, and sides of up to 0.4 of 1000 x 800.

    Attributes:
        density: how many boxes there are on 1000 x 800; the image is as large as ``count`` of them need. None: all.
        classes: how many; None for the operator without.
        rotated: whether boxes are (x, y, width, height, angle), of any angle.
    """

    count: int
    threshold: float
    density: int | None = None
    classes: int | None = None
    rotated: bool = False

    def __str__(self) -> str:
        parts = [f"{self.count} boxes, threshold {self.threshold}"]
        parts += [f"{self.classes} classes"] if self.classes else []
        parts += [f"{self.density} on 1000x800"] if self.density else []
        return ", ".join(parts)

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Boxes, scores, no two of them equal and none 0, and classes if there are any."""
        generator = torch.Generator().manual_seed(0)
        uniform = functools.partial(torch.rand, self.count, 2, generator=generator)
        image = torch.tensor(_IMAGE) * math.sqrt(self.count / (self.density or self.count))
        centres, sides = uniform() * image, uniform() * 0.4 * torch.tensor(_IMAGE) + 4
        if self.rotated:
            boxes = torch.cat([centres, sides, torch.rand(self.count, 1, generator=generator) * 360], dim=1)
        else:
            boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
        scores = (torch.randperm(self.count, generator=generator) + 1) / self.count
        if self.classes is None:
            return boxes, scores
        return boxes, scores, torch.randint(self.classes, (self.count,), generator=generator)

    @functools.cached_property
    def right(self) -> Any:
        """What is right: what eager mode makes of it, in the same precision."""
        return backends.eager(self.ours, self.tensors).output

    def ours(self, *tensors: Tensor) -> Any:
        raise NotImplementedError


def reference(problem: Problem) -> Any:
    return problem.right


def _compiled(job: Job) -> Prepared:
    return compiled(job.inputs.ours, job.inputs.tensors)


def _packaged(job: Job) -> Prepared:
    return backends.packaged(backends.Function(job.inputs.ours), job.inputs.tensors)


def _decomposition(job: Job) -> Prepared:
    return backends.eager(job.inputs.ours, job.inputs.tensors)


def _copy(job: Job) -> Prepared:
    return backends.copy(sum(tensor.nbytes for tensor in (*job.inputs.tensors, *as_tensors(job.inputs.right))))


ALONE: dict[str, Any] = {"threads": 1, "default": False}
OURS = (
    Contender("ours-compiled", "ours", _compiled, compiled=True),
    Contender("ours-aoti", "ours", _packaged, compiled=True),
    Contender("ours-1-thread", "ours", _compiled, compiled=True, **ALONE),
)
COPY = Contender("copy", "limit", _copy)

# A loop over the boxes that are taken: for cases in which it does not take seconds.
DECOMPOSITION = Contender("decomposition", "peer", _decomposition, default=False)


def case(name: str, problem: Problem, *contenders: str, tolerance: float = 0.0) -> Case:
    return Case(name, str(problem), lambda: problem, tolerance, contenders)
