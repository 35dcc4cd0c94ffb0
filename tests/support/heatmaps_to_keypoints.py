"""Heatmaps with boxes, and an oracle, for the tests of what heatmaps_to_keypoints means and compiles to."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from inductor_vision.tests.support.compare import TOLERANCE
from inductor_vision.tests.support.layouts import arrange
from torch import Tensor

NAN, INF = math.nan, math.inf


@dataclasses.dataclass(frozen=True)
class Heatmaps:
    """What a call looks like.

    Attributes:
        size: of a map, ``(H, W)``.
        boxes: one of ``BOXES``.
        maps: one of ``MAPS``.
        layout: memory layout of the maps, one of ``LAYOUTS``.
    """

    count: int = 5
    keypoints: int = 3
    size: tuple[int, int] = (7, 10)
    boxes: str = "any"
    maps: str = "any"
    dtype: torch.dtype = torch.float32
    rois_dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.count}x{self.keypoints}x{height}x{width}-{self.boxes}-{self.maps}"

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Maps and boxes; they depend on the description alone."""
        generator = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        maps = torch.randn(self.count, self.keypoints, *self.size, generator=generator, dtype=torch.float64)
        begin = torch.rand(self.count, 2, generator=generator, dtype=torch.float64) * 60
        sides = torch.rand(self.count, 2, generator=generator, dtype=torch.float64) * 30 + 0.2
        rois = torch.cat([begin, begin + sides], dim=1)
        MAPS[self.maps](maps)
        BOXES[self.boxes](rois)
        return arrange(maps.to(self.dtype), self.layout), rois.to(self.rois_dtype)


def _any(tensor: Tensor) -> None:
    pass


def _no_area(rois: Tensor) -> None:
    """Or sides that are negative."""
    rois[0::3, 2] = rois[0::3, 0]
    rois[1::3] = rois[1::3, [2, 3, 0, 1]].clone()
    rois[2::3, 3] = rois[2::3, 1] - 9


def _outside(rois: Tensor) -> None:
    """On all sides of any image."""
    rois[:, :2] -= 50
    rois[:, 2:] -= 30
    rois[::2] += 900


def _whole(rois: Tensor) -> None:
    rois.round_()


def _wide(rois: Tensor) -> None:
    """Around where the kernel begins another stretch of columns."""
    widths = torch.tensor([255.0, 256, 257, 512, 600.5])
    rois[:, 2] = rois[:, 0].floor_() + widths.repeat(len(rois))[: len(rois)]


def _tall(rois: Tensor) -> None:
    rois[:, 3] += 300


BOXES = {"any": _any, "no_area": _no_area, "outside": _outside, "whole": _whole, "wide": _wide, "tall": _tall}


def _far_apart(maps: Tensor) -> None:
    maps *= 10 ** torch.linspace(-30, 30, maps.shape[1], dtype=maps.dtype)[:, None, None]


def _nan(maps: Tensor) -> None:
    """In the middle, in the first pixel, and in two corners of one map each, and in no other."""
    height, width = maps.shape[2:]
    for i, (row, column) in enumerate([(height // 2, width // 2), (0, 0), (height - 1, 0)]):
        maps[i % len(maps), i % maps.shape[1], row, column] = NAN
    maps[2 % len(maps), 2 % maps.shape[1], 0, width - 1] = NAN


def _zero(maps: Tensor) -> None:
    """The first of equal ones is the maximum."""
    maps.zero_()


def _minus_infinity(maps: Tensor) -> None:
    """Some weights are negative: what is interpolated is NaN."""
    maps.fill_(-INF)


MAPS = {"any": _any, "far_apart": _far_apart, "nan": _nan, "zero": _zero, "minus_infinity": _minus_infinity}

CALLS = (
    *(Heatmaps(boxes=boxes) for boxes in BOXES),
    *(Heatmaps(maps=maps) for maps in MAPS if maps != "any"),
    *(Heatmaps(maps=maps, boxes="wide") for maps in ("nan", "zero")),
    *(Heatmaps(size=size) for size in ((1, 1), (1, 9), (8, 1), (2, 2), (50, 40))),
    Heatmaps(count=0),
    Heatmaps(keypoints=0),
    Heatmaps(count=1, keypoints=1),
    Heatmaps(count=40, keypoints=2),
)

# Not finite, or too large.
NO_BOXES = (
    *([value if i == j else 5.0 * i for i in range(4)] for j in range(4) for value in (NAN, INF, -INF)),
    [-3e38, 0.0, 3e38, 9.0],
    [0.0, 0.0, 1.0, 2.0**31],
    [0.0, 0.0, 46341.0, 46341.0],
)


# The oracle


def _cubic(distance: float) -> float:
    """Keys, "Cubic convolution interpolation for digital image processing", with a = -0.75."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def _resized(line: list[float], size: int) -> list[float]:
    """Samples of a line between the centres of its pixels; beyond its ends are copies of the last pixels."""
    out = []
    for i in range(size):
        position = (i + 0.5) * len(line) / size - 0.5
        first = math.floor(position) - 1
        out.append(sum(_cubic(position - j) * line[min(max(j, 0), len(line) - 1)] for j in range(first, first + 4)))
    return out


def _resized_map(map: list[list[float]], height: int, width: int) -> np.ndarray:
    rows = [_resized(row, width) for row in map]
    return np.array([_resized(list(column), height) for column in zip(*rows)]).T


def _side(begin: Tensor, end: Tensor) -> tuple[int, float]:
    """In whole pixels, and how large they are. What is rounded up is in the precision of the boxes."""
    real = np.float64 if begin.dtype == torch.float64 else np.float32
    length = max(real(end.item()) - real(begin.item()), real(1))
    return math.ceil(length), float(length) / math.ceil(length)


def oracle(maps: Tensor, rois: Tensor) -> Iterator[tuple[int, int, np.ndarray, list[float], list[float]]]:
    """For each map: box and keypoint, the size that it is resized to, and the coordinates of its columns and rows."""
    for k, (x1, y1, x2, y2) in enumerate(rois):
        (width, column), (height, row) = _side(x1, x2), _side(y1, y2)
        xs = [x1.item() + (i + 0.5) * column for i in range(width)]
        ys = [y1.item() + (i + 0.5) * row for i in range(height)]
        for n in range(maps.shape[1]):
            yield k, n, _resized_map(maps[k, n].double().tolist(), height, width), xs, ys


def assert_keypoints(result: tuple[Tensor, Tensor], maps: Tensor, rois: Tensor) -> None:
    """Each is at the maximum, or where the heat is within rounding of it."""
    points, scores = result
    assert points.dtype == scores.dtype == torch.float32
    assert points.shape == (*maps.shape[:2], 3) and scores.shape == maps.shape[:2]
    assert (points[..., 2] == 1).all()
    tolerance = TOLERANCE[torch.float64 if maps.dtype == torch.float64 else torch.float32]
    for k, n, heat, xs, ys in oracle(maps, rois):
        x, y, _ = points[k, n].tolist()
        column, row = (int(np.abs(np.array(places) - place).argmin()) for places, place in ((xs, x), (ys, y)))
        for places, i, place in ((xs, column, x), (ys, row, y)):
            assert abs(places[i] - place) <= 3e-7 * max(abs(places[0]), abs(places[-1])), (k, n)
        score, best = scores[k, n].item(), np.unravel_index(heat.argmax(), heat.shape)  # the first, and NaN before all
        if np.isnan(heat[best]) or not maps[k, n].any():
            assert (row, column) == best, (k, n)
            assert score == 0 or np.isnan([score, heat[best]]).all(), (k, n)
        else:
            scale = maps[k, n].abs().max().item()
            assert heat[row, column] >= heat[best] - tolerance * scale, (k, n)
            assert abs(score - heat[best]) <= TOLERANCE[torch.float32] * scale, (k, n)
