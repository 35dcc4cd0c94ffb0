"""Boxes with scores, and oracles, for the tests of what suppression means and compiles to."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

NAN, INF = math.nan, math.inf


@dataclasses.dataclass(frozen=True)
class Boxes:
    """What a call looks like: ``count`` boxes and scores of one of ``KINDS``."""

    count: int
    kind: str = "uniform"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.kind}-{self.count}-{str(self.dtype).removeprefix('torch.')}"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores, and one of five classes for each."""
        generator = torch.Generator().manual_seed(self.seed)
        centres = torch.rand(self.count, 2, generator=generator) * 100
        sides = torch.rand(self.count, 2, generator=generator) * 40 + 0.5
        boxes, scores = (
            torch.cat([centres - sides / 2, centres + sides / 2], dim=1),
            torch.rand(self.count, generator=generator),
        )
        classes = torch.randint(-2, 3, (self.count,), generator=generator)
        KINDS[self.kind](boxes, scores)
        return boxes.to(self.dtype), scores.to(self.dtype), classes


def _uniform(boxes: Tensor, scores: Tensor) -> None:
    pass


def _tied(boxes: Tensor, scores: Tensor) -> None:
    """Equal scores, and overlaps of exactly a half and a third."""
    boxes.div_(8).round_()
    scores.mul_(4).round_()


def _same(boxes: Tensor, scores: Tensor) -> None:
    boxes[1:] = boxes[:1].clone()


def _improper(boxes: Tensor, scores: Tensor) -> None:
    """Without area, inverted, NaN, infinite, with an area that is infinite."""
    boxes[0::9, 2] = boxes[0::9, 0]
    boxes[1::9] = boxes[1::9, [2, 1, 0, 3]]
    boxes[2::9] = boxes[2::9, [2, 3, 0, 1]]
    boxes[3::9, 1] = NAN
    boxes[4::9, 2] = INF
    boxes[5::9, :2] = -1e25
    boxes[5::9, 2:] = 1e25
    scores[::4] = NAN
    scores[1::8] = -INF
    scores[2::8] = -0.0
    scores[3::8] = 0.0


def _far(boxes: Tensor, scores: Tensor) -> None:
    """A few so far away that they would make one cell of all others, and coordinates that are negative."""
    boxes -= 60
    boxes[::40] += 1e4


def _tiny(boxes: Tensor, scores: Tensor) -> None:
    """Areas that float32 rounds to a few bits, or to zero."""
    boxes *= 1e-23


KINDS = {
    "uniform": _uniform,
    "tied": _tied,
    "same": _same,
    "improper": _improper,
    "far": _far,
    "tiny": _tiny,
}

THRESHOLDS = (0.0, 0.03, 0.1, 1 / 3, 0.5, 0.7, 1.0, 2.0, -0.5, NAN)

CALLS = [Boxes(count, kind) for kind in KINDS for count in (1, 2, 90)] + [Boxes(0), Boxes(400), Boxes(400, "tied")]


@dataclasses.dataclass(frozen=True)
class RotatedBoxes(Boxes):
    """The boxes as (x, y, width, height, angle), turned: "tied" ones by right angles, so that they stay so."""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, classes = dataclasses.replace(self, dtype=torch.float32).upright()
        low, high = boxes[:, :2], boxes[:, 2:]
        angles = torch.rand(self.count, 1, generator=torch.Generator().manual_seed(self.seed + 1)) * 800 - 400
        angles[1::3] = (angles[1::3] / 90).round() * 90
        if self.kind == "tied":
            angles = (angles / 90).round() * 90
        if self.kind == "improper":
            angles[6::9] = INF
        if self.kind == "same":
            angles[1:] = angles[:1].clone()
        boxes = torch.cat([(low + high) / 2, high - low, angles], dim=1)
        return boxes.to(self.dtype), scores.to(self.dtype), classes

    def upright(self) -> tuple[Tensor, Tensor, Tensor]:
        return super().tensors()


ROTATED_CALLS = [RotatedBoxes(call.count, call.kind) for call in CALLS]


def nms_oracle(boxes: Tensor, scores: Tensor, iou_threshold: float, classes: Tensor | None = None) -> list[int]:
    """Box by box, in the arithmetic of torchvision's kernel: everything but the comparison in the boxes' precision."""
    real = np.float64 if boxes.dtype == torch.float64 else np.float32
    corners = boxes.to(torch.float64 if real is np.float64 else torch.float32).numpy()
    overlaps = _iou(corners[:, None], corners, real).tolist()
    return _greedy(lambda j, i: overlaps[j][i], scores, iou_threshold, classes)


def nms_rotated_oracle(boxes: Tensor, scores: Tensor, iou_threshold: float, classes: Tensor | None = None) -> list[int]:
    rows = [tuple(row) for row in boxes.double().tolist()]
    return _greedy(lambda j, i: rotated_iou_oracle(rows[j], rows[i]), scores, iou_threshold, classes)


def _greedy(
    iou: Callable[[int, int], float], scores: Tensor, iou_threshold: float, classes: Tensor | None
) -> list[int]:
    ranks = [(0, 0.0) if math.isnan(score) else (1, -score) for score in scores.tolist()]
    of_class = [0] * len(ranks) if classes is None else classes.tolist()
    kept: list[int] = []
    for i in sorted(range(len(ranks)), key=ranks.__getitem__):
        others = [j for j in kept if of_class[j] == of_class[i]]
        if not any(iou(j, i) > iou_threshold for j in others):
            kept.append(i)
    return kept


@functools.lru_cache(maxsize=100_000)  # the same pairs meet at several thresholds
def rotated_iou_oracle(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Overlap of boxes (x, y, width, height, angle): a's polygon, clipped at one edge of b after the other."""
    areas = [box[2] * box[3] for box in (a, b)]
    if not all(math.isfinite(number) for number in (*a, *b)) or min(areas) <= 0:
        return 0.0
    polygon, clip = _polygon(a, a), _polygon(b, a)
    for (x0, y0), (x1, y1) in zip(clip, clip[1:] + clip[:1]):
        sides = [(x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) for x, y in polygon]
        left = []
        for k, (x, y) in enumerate(polygon):
            next_x, next_y = polygon[(k + 1) % len(polygon)]
            side, next_side = sides[k], sides[(k + 1) % len(polygon)]
            if side <= 0:
                left.append((x, y))
            if (side <= 0) != (next_side <= 0):
                part = side / (side - next_side)
                left.append((x + part * (next_x - x), y + part * (next_y - y)))
        polygon = left
    shifted = polygon[1:] + polygon[:1]
    intersection = abs(sum(x * next_y - y * next_x for (x, y), (next_x, next_y) in zip(polygon, shifted))) / 2
    intersection = min(intersection, *areas)
    return intersection / (sum(areas) - intersection)


def _polygon(box: Sequence[float], origin: Sequence[float]) -> list[tuple[float, float]]:
    """Corners relative to the centre of ``origin``, counter-clockwise to the eye."""
    x, y, width, height, angle = box
    exact = {0: (1.0, 0.0), 90: (0.0, 1.0), 180: (-1.0, 0.0), 270: (0.0, -1.0)}
    radians = math.radians(math.fmod(angle, 360))
    cos, sin = exact.get(angle % 360, (math.cos(radians), math.sin(radians)))
    ux, uy, vx, vy = width / 2 * cos, -width / 2 * sin, height / 2 * sin, height / 2 * cos
    x, y = x - origin[0], y - origin[1]
    return [(x + i * ux + j * vx, y + i * uy + j * vy) for i, j in ((1, 1), (1, -1), (-1, -1), (-1, 1))]


def _iou(a: np.ndarray, b: np.ndarray, real: type) -> np.ndarray:
    """Overlaps of boxes [..., 4] that are broadcast, in the arithmetic of torchvision's kernel."""

    def greater(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.where(x < y, y, x)

    def less(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.where(y < x, y, x)

    a, b = np.moveaxis(a, -1, 0), np.moveaxis(b, -1, 0)
    with np.errstate(all="ignore"):
        width = greater(real(0), less(a[2], b[2]) - greater(a[0], b[0]))
        height = greater(real(0), less(a[3], b[3]) - greater(a[1], b[1]))
        intersection = width * height
        return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


def soft_nms_oracle(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    classes: Tensor | None = None,
) -> dict[int, float]:
    """Box by box: the scores of those that are taken, in the order in which they are."""
    real = np.float64 if torch.float64 in (boxes.dtype, scores.dtype) else np.float32
    corners = boxes.double().numpy().astype(real)
    overlaps = _iou(corners[:, None], corners, real)
    current, of_class = scores.double().numpy().astype(real), None if classes is None else classes.numpy()
    left = np.full(len(boxes), True)
    taken: dict[int, float] = {}
    with np.errstate(all="ignore"):
        while (left := left & ~(current.astype(np.float64) < min_score)).any():
            best = min(np.flatnonzero(left), key=lambda i: (0, 0) if np.isnan(current[i]) else (1, -current[i]))
            taken[int(best)] = float(current[best])
            left[best] = False
            overlap = overlaps[best]
            lowered = left & (current > 0) & (overlap > 0)
            if of_class is not None:
                lowered &= of_class == of_class[best]
            if method == "gaussian":
                weight = np.exp(-overlap * overlap / real(sigma))
            else:
                weight = np.where(overlap.astype(np.float64) > iou_threshold, 1 - overlap, real(1))
            current = np.where(lowered, current * weight, current)
            current[lowered & np.isnan(current)] = 0
    return taken


def assert_taken(result: tuple[Tensor, Tensor], expected: dict[int, float]) -> None:
    """The boxes and, but for some roundings, the scores that are expected, best first.

    Not always in the order that is expected: the scores of two boxes may be equal but for a rounding.
    """
    indices, scores = (tensor.tolist() for tensor in result)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[result[1].dtype]
    assert len(indices) == len(expected) and set(indices) == set(expected)
    np.testing.assert_allclose(scores, [expected[i] for i in indices], rtol=tolerance, atol=tolerance / 100)
    ranks = [-INF if math.isnan(score) else -score for score in scores]
    assert ranks == sorted(ranks)
