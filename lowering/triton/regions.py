"""What all operators on regions of interest do with the pixels of their bins, as Triton kernels.

A program of a kernel has one region, and a block of its bins by channels. It loops as often as the largest of these
bins has samples, or pixels, along each axis. Sizes: ``K`` regions, ``PH`` x ``PW`` bins, ``N`` bins and ``C`` channels
of a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ...ops import ps_roi_align, ps_roi_pool, roi_align, roi_pool
from ...ops.regions import MapSize, Pixels, PooledAxis, SampledAxis
from ...ops.registry import GRADIENTS
from ..common.registry import TritonProgram, triton_program_for
from .kernels import (
    adding_block,
    dense,
    in_format_of,
    kernel,
    launch,
    positions,
    power_of_two,
    quotient,
    refuse_if_deterministic,
)

# Arguments of kernels have no types in Python.
# mypy: disable-error-code="no-untyped-def"


@kernel
def block_of_bins(channels, PH: tl.constexpr, PW: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """Row and column of bins ``[1, N]``, channels ``[C, 1]``, and which of the block exist ``[C, N]``."""
    bin = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    channel = tl.program_id(2) * C + tl.arange(0, C)[:, None]
    return bin // PW, bin % PW, channel, (bin < PH * PW) & (channel < channels)


@kernel
def channel_in_map(channel, row, column, PH: tl.constexpr, PW: tl.constexpr, POSITION_SENSITIVE: tl.constexpr):
    """The channel of the map that each bin of a block reads."""
    return (channel * PH + row) * PW + column if POSITION_SENSITIVE else channel


@kernel
def sampled_axis(table, region, bin, BINS: tl.constexpr):
    """First point, length, and points in all, before the map and on it of each bin."""
    at = table + region * (5 * BINS) + tl.minimum(bin, BINS - 1)
    planes = tl.load(at), tl.load(at + BINS), tl.load(at + 2 * BINS), tl.load(at + 3 * BINS), tl.load(at + 4 * BINS)
    return planes


@kernel
def sample(first, size, count, skipped, step, length):
    """A point of each bin: whether it counts, and the pixels that it lies between with their weights."""
    i = skipped + step
    point = first + quotient((i + 0.5) * size, count)
    inside = (point >= -1) & (point <= length) & (i < count)  # NaN fails
    point = tl.maximum(tl.where(inside, point, 0.0), 0.0)
    low = tl.maximum(tl.minimum(point.to(tl.int32), length - 1), 0)
    high = tl.minimum(low + 1, length - 1)
    fraction = tl.where(low < length - 1, point - low, 0.0)
    return inside, low, high, 1 - fraction, fraction


@kernel
def add_corner(total, map, at, weight, share, mask, SPREAD: tl.constexpr):
    """``total`` and a pixel times its weight; or, of gradients, the share of the pixel, added to it."""
    if SPREAD:
        tl.atomic_add(map + at, weight * share, mask=mask, sem="relaxed")
    else:
        total += weight * tl.load(map + at, mask=mask, other=0.0).to(total.dtype)
    return total


@kernel
def sample_bins(
    map,  # [B, channels, height, width]
    bins,  # [K, C, PH, PW]
    image,  # [K]
    here,  # [K], not read if ALL
    divisor,  # [K]
    y_table,  # [K, 5, PH], see sampled_axis
    x_table,  # [K, 5, PW]
    channels,
    height,
    width,
    map_image,
    map_channel,
    map_row,
    map_column,
    bins_region,
    bins_channel,
    bins_row,
    bins_column,
    ALL: tl.constexpr,
    SPREAD: tl.constexpr,
    POSITION_SENSITIVE: tl.constexpr,
    WIDE: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """Bins become the means of their samples of a map; or, if ``SPREAD``, are spread to the samples, as gradients."""
    region = positions(tl.program_id(0), WIDE)
    row, column, channel, exists = block_of_bins(channels, PH, PW, N, C)
    if not ALL:
        exists = exists & (tl.load(here + region) != 0)
    y_first, y_size, y_count, y_skipped, y_needed = sampled_axis(y_table, region, row, PH)
    x_first, x_size, x_count, x_skipped, x_needed = sampled_axis(x_table, region, column, PW)
    count = tl.load(divisor + region)

    from_channel = positions(channel_in_map(channel, row, column, PH, PW, POSITION_SENSITIVE), WIDE)
    base = positions(tl.load(image + region).to(tl.int32), WIDE) * map_image + from_channel * map_channel
    of_bin = region * bins_region + positions(channel, WIDE) * bins_channel
    of_bin += positions(row, WIDE) * bins_row + positions(column, WIDE) * bins_column
    total = tl.zeros([C, N], count.dtype)
    share = total
    if SPREAD:
        share += tl.load(bins + of_bin, mask=exists, other=0.0).to(count.dtype) / count

    any_here = tl.max(tl.max(exists.to(tl.int32), 1), 0)
    y_steps = tl.max(tl.max(y_needed, 1), 0).to(tl.int32) * any_here
    x_steps = tl.max(tl.max(x_needed, 1), 0).to(tl.int32)
    for iy in range(y_steps):
        y_inside, top, bottom, top_weight, bottom_weight = sample(y_first, y_size, y_count, y_skipped, iy, height)
        above = base + positions(top, WIDE) * map_row
        below = base + positions(bottom, WIDE) * map_row
        for ix in range(x_steps):
            x_inside, left, right, left_weight, right_weight = sample(x_first, x_size, x_count, x_skipped, ix, width)
            mask = exists & y_inside & x_inside
            left_at = positions(left, WIDE) * map_column
            right_at = positions(right, WIDE) * map_column
            total = add_corner(total, map, above + left_at, top_weight * left_weight, share, mask, SPREAD)
            total = add_corner(total, map, above + right_at, top_weight * right_weight, share, mask, SPREAD)
            total = add_corner(total, map, below + left_at, bottom_weight * left_weight, share, mask, SPREAD)
            total = add_corner(total, map, below + right_at, bottom_weight * right_weight, share, mask, SPREAD)
    if not SPREAD:
        tl.store(bins + of_bin, (total / count).to(bins.dtype.element_ty), mask=exists)


@kernel
def pool_bins(
    map,  # [B, channels, height, width]
    bins,  # [K, C, PH, PW]
    argmax,  # [K, C, PH, PW], written if MAXIMUM
    image,  # [K]
    area,  # [K, PH, PW], of the dtype that is computed in; not read if MAXIMUM
    y_table,  # [K, 2, PH], first row and how many
    x_table,  # [K, 2, PW]
    channels,
    width,
    map_image,
    map_channel,
    map_row,
    map_column,
    bins_region,
    bins_channel,
    bins_row,
    bins_column,
    MAXIMUM: tl.constexpr,
    LOWEST: tl.constexpr,
    SPREAD: tl.constexpr,
    POSITION_SENSITIVE: tl.constexpr,
    WIDE: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """Bins become the means of their pixels of a map; or, if ``MAXIMUM``, the first maximum and where it is; or, if
    ``SPREAD``, are spread to the pixels, as gradients."""
    region = positions(tl.program_id(0), WIDE)
    row, column, channel, exists = block_of_bins(channels, PH, PW, N, C)
    y_at = y_table + region * (2 * PH) + tl.minimum(row, PH - 1)
    x_at = x_table + region * (2 * PW) + tl.minimum(column, PW - 1)
    y_begin, y_size = tl.load(y_at), tl.load(y_at + PH)
    x_begin, x_size = tl.load(x_at), tl.load(x_at + PW)

    from_channel = positions(channel_in_map(channel, row, column, PH, PW, POSITION_SENSITIVE), WIDE)
    base = positions(tl.load(image + region).to(tl.int32), WIDE) * map_image + from_channel * map_channel
    of_bin = region * bins_region + positions(channel, WIDE) * bins_channel
    of_bin += positions(row, WIDE) * bins_row + positions(column, WIDE) * bins_column
    dtype = area.dtype.element_ty
    total = tl.zeros([C, N], dtype)
    share = total
    place = tl.full([C, N], -1, tl.int32)
    count = tl.full([C, N], 1, dtype)
    if MAXIMUM:
        total = tl.where((y_size > 0) & (x_size > 0), total + LOWEST, total)
    else:
        count = tl.load(area + region * (PH * PW) + tl.minimum(row * PW + column, PH * PW - 1))
    if SPREAD:
        share += tl.load(bins + of_bin, mask=exists, other=0.0).to(dtype) / count

    for iy in range(tl.max(tl.max(y_size, 1), 0)):
        y = y_begin + iy
        for ix in range(tl.max(tl.max(x_size, 1), 0)):
            x = x_begin + ix
            mask = exists & (iy < y_size) & (ix < x_size)
            at = base + positions(y, WIDE) * map_row + positions(x, WIDE) * map_column
            if MAXIMUM:
                value = tl.load(map + at, mask=mask, other=0.0).to(dtype)
                greater = mask & (value > total)
                total = tl.where(greater, value, total)
                place = tl.where(greater, y * width + x, place)
            else:
                total = add_corner(total, map, at, 1.0, share, mask, SPREAD)
    if MAXIMUM:
        tl.store(argmax + of_bin, place, mask=exists)
    if not SPREAD:
        tl.store(bins + of_bin, (total / count).to(bins.dtype.element_ty), mask=exists)


class TritonPixels(Pixels):
    """See :class:`Pixels`; its loops are kernels here. Gradients are added atomically, in any order."""

    def __init__(self, image: Tensor, size: MapSize, bins: Sequence[int], position_sensitive: bool = False) -> None:
        super().__init__(image, size, bins, position_sensitive)
        self.bins = (int(bins[0]), int(bins[1]))
        self.position_sensitive = position_sensitive

    def mean_of_samples(
        self,
        input: Tensor,
        y: SampledAxis,
        x: SampledAxis,
        count: Tensor,
        here: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if out is None:
            out = self._empty(input, input.dtype)
        input = dense(input)
        arguments = self._samples(y, x, count, here)
        (out,) = self._launch(sample_bins, input, out, ["bins"], **arguments, SPREAD=False)
        return out

    def spread_to_samples(
        self, grad: Tensor, y: SampledAxis, x: SampledAxis, count: Tensor, here: Tensor | None = None
    ) -> Tensor:
        arguments = self._samples(y, x, count, here)
        (total,) = self._launch(sample_bins, self._zeros(grad, count), dense(grad), ["map"], **arguments, SPREAD=True)
        return total

    def mean_of_pixels(self, input: Tensor, y: PooledAxis, x: PooledAxis, area: Tensor) -> Tensor:
        out, arguments = self._empty(input, input.dtype), self._pixels(y, x, area)
        (out,) = self._launch(pool_bins, dense(input), out, ["bins"], **arguments, SPREAD=False)
        return out

    def spread_to_pixels(self, grad: Tensor, y: PooledAxis, x: PooledAxis, area: Tensor) -> Tensor:
        grad, total, arguments = dense(grad), self._zeros(grad, area), self._pixels(y, x, area)
        (total,) = self._launch(pool_bins, total, grad, ["map"], **arguments, SPREAD=True)
        return total

    def maximum_of_pixels(
        self, input: Tensor, y: PooledAxis, x: PooledAxis, lowest: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        out, argmax = self._empty(input, input.dtype), self._empty(input, torch.int32)
        area = input.new_empty(1, dtype=dtype)
        arguments = {**self._pixels(y, x, area), "MAXIMUM": True, "LOWEST": lowest, "SPREAD": False}
        out, argmax = self._launch(pool_bins, dense(input), out, ["bins", "argmax"], **arguments, argmax=argmax)
        return out, argmax

    def _empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """``[K, channels of a bin, PH, PW]`` in the memory format of the maps."""
        return in_format_of(like, (self.image.shape[0], self._channels, *self.bins), like.new_empty, dtype)

    def _zeros(self, grad: Tensor, like: Tensor) -> Tensor:
        """``[B, C, H, W]`` in the memory format of the gradient, and the dtype of what is computed in."""
        return in_format_of(grad, self.size, grad.new_zeros, like.dtype)

    @property
    def _channels(self) -> int:
        return self.size.channels // (self.split[0] * self.split[1])

    def _samples(self, y: SampledAxis, x: SampledAxis, count: Tensor, here: Tensor | None) -> dict[str, Any]:
        def table(axis: SampledAxis) -> Tensor:
            planes = axis.first, axis.bin_size[:, None], axis.count[:, None], axis.skipped, axis.needed
            return torch.stack([plane.expand_as(axis.first) for plane in planes], 1)

        return {
            "here": self.image if here is None else here,
            "ALL": here is None,
            "divisor": count.contiguous(),
            "y_table": table(y),
            "x_table": table(x),
            "height": self.size.height,
            "width": self.size.width,
        }

    def _pixels(self, y: PooledAxis, x: PooledAxis, area: Tensor) -> dict[str, Any]:
        tables = (torch.stack([axis.begin, axis.size], 1).int() for axis in (y, x))
        return {
            "area": area.contiguous(),
            **dict(zip(("y_table", "x_table"), tables)),
            "width": self.size.width,
            "MAXIMUM": False,
            "LOWEST": 0.0,
        }

    def _launch(self, function: Any, map: Tensor, bins: Tensor, written: list[str], **arguments: Any) -> Any:
        names = ("image", "channel", "row", "column"), ("region", "channel", "row", "column")
        strides = {f"map_{name}": stride for name, stride in zip(names[0], map.stride())}
        strides |= {f"bins_{name}": stride for name, stride in zip(names[1], bins.stride())}
        tensors = {"map": map, "bins": bins}
        if function is pool_bins:
            tensors["argmax"] = arguments.pop("argmax", self.image)
        outputs = {name: tensors[name] for name in written}
        inputs = {name: tensor for name, tensor in tensors.items() if name not in outputs}
        channels, number = self._channels, math.prod(self.bins)
        of_channels_last = suggest_memory_format(map) == torch.channels_last
        block_channels = power_of_two(channels, 64 if of_channels_last else 8)
        most = adding_block(512, 256, map) if arguments["SPREAD"] else 512
        block_bins = power_of_two(number, most // block_channels)
        grid = bins.shape[0], triton.cdiv(number, block_bins), triton.cdiv(channels, block_channels)
        return launch(
            function,
            grid,
            outputs,
            **inputs,
            **strides,
            **arguments,
            image=self.image.flatten(),
            channels=channels,
            POSITION_SENSITIVE=self.position_sensitive,
            PH=self.bins[0],
            PW=self.bins[1],
            N=block_bins,
            C=block_channels,
        )


def _on_triton(program: Any) -> Any:
    """A program that takes its loops from the keyword ``pixels``."""
    return functools.partial(program, pixels=TritonPixels)


for _name, _module in (("roi_align", roi_align), ("ps_roi_align", ps_roi_align), ("ps_roi_pool", ps_roi_pool)):
    triton_program_for(_name, TritonProgram(_on_triton(_module.forward)))
    _gradient = GRADIENTS[_name].completed(_on_triton(_module.backward))
    triton_program_for(f"{_name}_backward", TritonProgram(_gradient, refuse_if_deterministic))
triton_program_for("roi_pool", TritonProgram(_on_triton(roi_pool.forward)))  # its gradient has no loop
