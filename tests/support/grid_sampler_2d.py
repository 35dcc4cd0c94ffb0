"""Images and grids for the tests of what grid_sampler_2d means and compiles to. What is right is what aten computes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from typing import Any

import torch
from inductor_vision.tests.support.layouts import arrange
from torch import Tensor

OP = torch.ops.inductor_vision.grid_sampler_2d.default
BACKWARD = torch.ops.inductor_vision.grid_sampler_2d_backward.default

# In aten's numbers: bilinear, nearest, bicubic; zeros, border, reflection; align_corners.
MODES = tuple(itertools.product((0, 1, 2), (0, 1, 2), (False, True)))


@dataclasses.dataclass(frozen=True)
class Case:
    """What a call looks like.

    Attributes:
        size: of the input, ``(H, W)``.
        out: of the grid, and of the output.
        modes: one of ``MODES``.
        layout: memory layout of the input, one of ``LAYOUTS``.
        hostile: whether some coordinates are NaN, infinite, huge, or exactly on the border.
    """

    batch: int = 2
    channels: int = 3
    size: tuple[int, int] = (7, 10)
    out: tuple[int, int] = (12, 33)
    modes: tuple[int, int, bool] = MODES[0]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    hostile: bool = False

    def _random(self, what: str) -> torch.Generator:
        """Values depend on the description alone."""
        return torch.Generator().manual_seed(zlib.crc32(f"{what} {self!r}".encode()))

    def input(self) -> Tensor:
        values = torch.randn(self.batch, self.channels, *self.size, generator=self._random("input"))
        return arrange(values.to(self.dtype), self.layout)

    def grid(self) -> Tensor:
        """A quarter of it is outside of the image."""
        grid = torch.rand(self.batch, *self.out, 2, generator=self._random("grid")) * 2.6 - 1.3
        if self.hostile:
            values = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 1.0, -1.0, 0.0])
            places = grid.flatten()
            places[::5] = values.repeat(len(places))[: len(places[::5])]
        return grid.to(self.dtype)

    def grad(self) -> Tensor:
        return torch.randn(self.batch, self.channels, *self.out, generator=self._random("grad")).to(self.dtype)

    @property
    def positional(self) -> tuple[Any, ...]:
        return self.input(), self.grid(), *self.modes

    @property
    def positional_backward(self) -> tuple[Any, ...]:
        return self.grad(), *self.positional, [True, True]


CASES = {
    "few channels": Case(),
    "channels": Case(channels=19),
    "channels_last": Case(channels=19, layout="channels_last"),
    "one pixel": Case(size=(1, 1), out=(5, 4)),
    "one sample of each": Case(batch=150, channels=1, out=(1, 1)),
    "no samples": Case(out=(0, 3)),
    "no images": Case(batch=0),
    "small beside the image": Case(channels=20, size=(30, 40), out=(3, 5)),
}
