"""Calls of multiscale_deformable_attention and an oracle, for the tests of what it means and of what it compiles to."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

OP = torch.ops.inductor_vision.multiscale_deformable_attention.default
OP_BACKWARD = torch.ops.inductor_vision.multiscale_deformable_attention_backward.default

LAYOUTS = ("natural", "channels_first", "heads_first", "stepped", "expanded")
TENSORS = ("value", "locations", "weights")  # in the order of their gradients


@dataclasses.dataclass(frozen=True)
class Case:
    """What a call looks like.

    Attributes:
        channels: of a head.
        sizes: height and width of each level.
        points: of each level.
        locations: where they are: "random", "inside", "borders", "integers", "smooth" (where there is a derivative) or
            "hostile".
        dtype: of ``value``; ``others``: of locations and weights.
        layout: of ``value``, one of ``LAYOUTS``; "channels_first" is what rf-detr has, ``[B, H, D, S]`` in memory.
        as_tensor: sizes are a tensor.
    """

    batch: int = 2
    heads: int = 3
    channels: int = 8
    queries: int = 5
    sizes: tuple[tuple[int, int], ...] = ((5, 7), (3, 4), (1, 2))
    points: tuple[int, ...] = (2, 2, 2)
    method: str = "default"
    locations: str = "random"
    dtype: torch.dtype = torch.float32
    others: torch.dtype | None = None
    layout: str = "natural"
    as_tensor: bool = False

    @property
    def pixels(self) -> int:
        return sum(height * width for height, width in self.sizes)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Value, locations and weights. Values depend on the description alone, without sizes' and layout's form."""
        described = dataclasses.replace(self, layout="natural", as_tensor=False)
        generator = torch.Generator().manual_seed(zlib.crc32(repr(described).encode()))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        value = normal(self.batch, self.pixels, self.heads, self.channels)
        points = (self.batch, self.queries, self.heads, sum(self.points))
        weights = normal(*points).softmax(-1)
        others = self.others or self.dtype
        locations = self._locations(points, generator).to(others)
        return arrange(value.to(self.dtype), self.layout), locations, weights.to(others)

    def _locations(self, points: tuple[int, ...], generator: torch.Generator) -> Tensor:
        def rand(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        if self.locations == "inside":
            return 0.1 + 0.8 * rand(*points, 2)
        if self.locations == "random":
            return 1.6 * rand(*points, 2) - 0.3
        each = [size for size, count in zip(self.sizes, self.points) for _ in range(count)]
        size = torch.tensor(each, dtype=torch.float64).flip(1)  # [K, 2], (x, y)
        pixel = (rand(*points, 2) * (size + 4) - 2).floor()  # -2 to 1 beyond the last
        if self.locations == "integers":
            return (pixel + 0.5) / size
        if self.locations == "smooth":
            return (pixel + 0.6 + 0.8 * rand(*points, 2)) / size
        if self.locations == "borders":
            near = torch.tensor([-1, -(2**-10), 0, 2**-10, 0.5], dtype=torch.float64)
            at = torch.where(rand(*points, 2) < 0.5, torch.full_like(pixel, -1), size.expand_as(pixel))
            return (at + near[torch.randint(5, (*points, 2), generator=generator)] + 0.5) / size
        if self.locations == "hostile":
            numbers = [math.nan, math.inf, 1e30, 2.0**31, 2.0**33, 2.0**63, 2.0**64, -math.inf, -1e30, -(2.0**63)]
            hostile = torch.tensor(numbers, dtype=torch.float64)
            hostile = hostile[torch.randint(len(hostile), (*points, 2), generator=generator)]
            return torch.where(rand(*points, 2) < 0.3, hostile, 1.6 * rand(*points, 2) - 0.3)
        raise ValueError(f"no locations {self.locations!r}")

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the public function takes."""
        value, locations, weights = self.tensors()
        shapes = torch.tensor(self.sizes) if self.as_tensor else self.sizes
        return value, shapes, locations, weights, self.points, self.method

    @property
    def positional(self) -> tuple[Any, ...]:
        """What the operator takes."""
        value, locations, weights = self.tensors()
        shapes = torch.tensor(self.sizes) if self.as_tensor else None
        sizes = [] if self.as_tensor else [length for size in self.sizes for length in size]
        return value, sizes, shapes, locations, weights, list(self.points), self.method

    @property
    def grad(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.queries, self.heads * self.channels)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

    @property
    def positional_backward(self) -> tuple[Any, ...]:
        return self.grad, *self.positional, [True, True, True]


def arrange(value: Tensor, layout: str) -> Tensor:
    """A tensor of these [B, S, H, D] values ("expanded": of the first image's) in this order in memory."""
    if layout == "natural":
        return value.contiguous()
    if layout == "channels_first":
        return value.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if layout == "heads_first":
        return value.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return value[:1].contiguous().expand(value.shape)
    if layout == "stepped":
        room = value.new_full((*value.shape[:3], 2 * value.shape[3] + 1), math.nan)
        return room[..., 1::2].copy_(value)
    raise ValueError(f"no layout {layout!r}; there are: {', '.join(LAYOUTS)}")


CASES = {
    "three levels": Case(),
    "points that differ": Case(points=(3, 6, 1), channels=32),
    "many points": Case(points=(9, 17, 1), queries=2),
    "one level": Case(sizes=((6, 5),), points=(4,), channels=16),
    "one point": Case(sizes=((6, 5),), points=(1,)),
    "many queries": Case(batch=1, heads=2, queries=70, channels=16),
    "64 channels": Case(channels=64),
    "one channel": Case(channels=1),
    "11 channels": Case(channels=11),
    "61 channels": Case(channels=61, queries=3),
    "one pixel": Case(sizes=((1, 1), (1, 1)), points=(2, 3)),
    "wide": Case(sizes=((1, 40), (33, 1)), points=(4, 4)),
    "integers": Case(locations="integers"),
    "borders": Case(locations="borders", queries=20),
    "hostile": Case(locations="hostile", queries=20),
    "discrete": Case(method="discrete", queries=20),
    "discrete, points that differ": Case(method="discrete", points=(3, 6, 1), channels=11),
    "discrete, hostile": Case(method="discrete", locations="hostile", queries=20),
    "tensor of sizes": Case(as_tensor=True),
    "channels_first": Case(layout="channels_first", channels=16),
    "channels_first, discrete": Case(layout="channels_first", method="discrete"),
    "heads_first": Case(layout="heads_first"),
    "stepped": Case(layout="stepped"),
    "expanded": Case(layout="expanded"),
    "no images": Case(batch=0),
    "no queries": Case(queries=0),
    "no heads": Case(heads=0),
}


def samples(case: Case, locations: Tensor) -> list[Any]:
    """For each point that counts its place (batch, query, head, point), its fractions in y and x, and its corners:
    pixel among those of all levels and whether it is the lower, the right one. Coordinates are rounded as the
    operator's are."""
    real = np.float64 if case.dtype == torch.float64 else np.float32
    levels, first = [], 0
    for (height, width), count in zip(case.sizes, case.points):
        levels += [(height, width, first)] * count
        first += height * width
    found: list[Any] = []
    for place in np.ndindex(*locations.shape[:4]):
        height, width, first = levels[place[3]]
        with np.errstate(all="ignore"):
            x, y = (real(at) * real(size) for at, size in zip(locations[place].tolist(), (width, height)))
            x, y = (float(at + real(0.5) if case.method == "discrete" else at - real(0.5)) for at in (x, y))
        if case.method == "discrete":
            if math.isfinite(x) and math.isfinite(y):
                column, row = min(max(int(x), 0), width - 1), min(max(int(y), 0), height - 1)
                found.append((place, (height, width), 0.0, 0.0, [(0, 0, first + row * width + column)]))
        elif -1 < x < width and -1 < y < height:
            row, column = math.floor(y), math.floor(x)
            corners = [
                (i, j, first + (row + i) * width + column + j)
                for i in (0, 1)
                for j in (0, 1)
                if 0 <= row + i < height and 0 <= column + j < width
            ]
            found.append((place, (height, width), y - row, x - column, corners))
    return found


def oracle(case: Case) -> Tensor:
    """Point by point, in float64."""
    value, locations, weights = (tensor.double() for tensor in case.tensors())
    out = torch.zeros(case.batch, case.queries, case.heads, case.channels, dtype=torch.float64)
    for (b, q, h, k), _, down, right, corners in samples(case, locations):
        for i, j, pixel in corners:
            share = (down if i else 1 - down) * (right if j else 1 - right)
            out[b, q, h] += weights[b, q, h, k] * share * value[b, pixel, h]
    return out.flatten(2)


def gradient_oracle(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Point by point, in float64."""
    value, locations, weights = (tensor.double() for tensor in case.tensors())
    grad = case.grad.double().reshape(case.batch, case.queries, case.heads, case.channels)
    of_value, of_locations, of_weights = (
        torch.zeros(t.shape, dtype=torch.float64) for t in (value, locations, weights)
    )
    for (b, q, h, k), (height, width), down, right, corners in samples(case, locations):
        g, weight = grad[b, q, h], weights[b, q, h, k]
        for i, j, pixel in corners:
            y, x = (down if i else 1 - down), (right if j else 1 - right)
            product = float(g @ value[b, pixel, h])
            of_value[b, pixel, h] += y * x * weight * g
            of_weights[b, q, h, k] += y * x * product
            if case.method == "default":
                of_locations[b, q, h, k, 0] += width * weight * y * (product if j else -product)
                of_locations[b, q, h, k, 1] += height * weight * x * (product if i else -product)
    return of_value, of_locations, of_weights
