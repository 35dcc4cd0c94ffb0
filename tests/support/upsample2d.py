"""Images to resize, and an oracle, for the tests of what upsample2d's operators mean and compile to."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import numpy as np
import torch
from inductor_vision.ops.registry import OPS, VisionOp
from inductor_vision.tests.support.layouts import arrange
from torch import Tensor

MODES = ("bilinear", "bicubic")


@dataclasses.dataclass(frozen=True)
class Case:
    """What a call looks like.

    Attributes:
        size: of the input, ``(H, W)``.
        to: what it is resized to.
        scales: of height and width, None where sizes count.
        padding: zeros below and at the right.
        layout: memory layout of the input, one of ``LAYOUTS``.
        mode: one of ``MODES``.
    """

    batch: int = 2
    channels: int = 3
    size: tuple[int, int] = (7, 10)
    to: tuple[int, int] = (12, 33)
    align_corners: bool = False
    scales: tuple[float | None, float | None] = (None, None)
    padding: tuple[int, int] = (3, 5)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    mode: str = "bilinear"

    @property
    def op(self) -> VisionOp:
        return OPS[f"upsample_{self.mode}2d"]

    def input(self) -> Tensor:
        """Values depend on the description alone."""
        generator = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        values = torch.randn(self.batch, self.channels, *self.size, generator=generator, dtype=torch.float64)
        return arrange(values.to(self.dtype), self.layout)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the operator takes after the input."""
        return list(self.to), self.align_corners, *self.scales, list(self.padding)

    @property
    def positional(self) -> tuple[Any, ...]:
        return self.input(), *self.arguments

    @property
    def positional_backward(self) -> tuple[Any, ...]:
        grad = torch.randn(self.batch, self.channels, *map(sum, zip(self.to, self.padding)), dtype=self.dtype)
        return grad, *self.arguments[:-1], [self.batch, self.channels, *self.size]


CASES = {
    "larger": Case(),
    "smaller": Case(size=(20, 45), to=(7, 18)),
    "same": Case(to=(7, 10)),
    "larger and smaller": Case(size=(5, 40), to=(17, 9)),
    "many rows": Case(batch=1, size=(60, 9), to=(97, 13)),
    "wide": Case(batch=1, channels=2, size=(3, 2100), to=(4, 3000)),
    "align_corners": Case(align_corners=True),
    "align_corners, smaller": Case(size=(20, 45), to=(7, 18), align_corners=True),
    "align_corners, to one": Case(to=(1, 1), align_corners=True),
    "to one": Case(to=(1, 1)),
    "from one": Case(size=(1, 1)),
    "scales": Case(scales=(1.75, 3.3)),
    "one scale": Case(scales=(None, 2.5)),
    "scale that leads beyond": Case(scales=(0.3, 0.01)),
    "align_corners, scales": Case(align_corners=True, scales=(1.5, 2.0)),
    "no padding": Case(padding=(0, 0)),
    "much padding": Case(padding=(70, 40)),
    "one channel": Case(channels=1),
    "vector of channels": Case(channels=16),
    "many channels": Case(channels=37),
    "channels in groups": Case(channels=70, size=(4, 60), to=(5, 90)),
    "no images": Case(batch=0),
}


def _taps(at: int, source: int, size: int, case: Case, scale: float | None) -> list[tuple[int, float]]:
    """Pixels and weights. Ratios and places are rounded to the precision of sums, as aten has them: in a row of 2000
    pixels float32 places have steps of 1e-4."""
    real = np.float64 if case.dtype == torch.float64 else np.float32
    if case.align_corners:
        place = real(at) * (real(source - 1) / real(size - 1) if size > 1 else real(0))
    else:
        ratio = real(source) / real(size) if scale is None else real(1 / scale)
        place = real(float(ratio) * (at + 0.5) - 0.5)  # rounded once
    if case.mode == "bilinear":
        place = min(max(float(place), 0.0), source - 1.0)
        low = math.floor(place)
        return [(low, 1 - (place - low)), (min(low + 1, source - 1), place - low)]
    low = min(math.floor(place), source - 1)
    fraction = min(max(float(place) - low, 0.0), 1.0)
    return [(min(max(low + i, 0), source - 1), _cubic(abs(fraction - i))) for i in range(-1, 3)]


def _cubic(distance: float) -> float:
    """Keys, "Cubic convolution interpolation for digital image processing", with a = -0.75."""
    a, x = -0.75, distance
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4)


def oracle(input: Tensor, case: Case) -> Tensor:
    """Row by row and column by column, in float64."""
    (height, width), (below, right) = case.to, case.padding
    out = torch.zeros(*input.shape[:2], height + below, width + right, dtype=torch.float64)
    lines = torch.zeros(*input.shape[:3], width, dtype=torch.float64)
    for x in range(width):
        for i, weight in _taps(x, case.size[1], width, case, case.scales[1]):
            lines[..., x] += weight * input[..., i].double()
    for y in range(height):
        for i, weight in _taps(y, case.size[0], height, case, case.scales[0]):
            out[:, :, y, :width] += weight * lines[:, :, i]
    return out
