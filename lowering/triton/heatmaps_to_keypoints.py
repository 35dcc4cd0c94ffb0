"""heatmaps_to_keypoints as a Triton kernel: maps are resized and searched, and never stored."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ...ops import heatmaps_to_keypoints
from ...ops.registry import accumulate_dtype
from ..common.registry import TritonProgram, triton_program_for
from .boxes import first_best, first_best_of_all
from .kernels import dense, kernel, launch, positions

# Arguments of kernels have no types in Python.
# mypy: disable-error-code="no-untyped-def"


@kernel
def cubic_weights(t):
    """Weights of the two pixels before a point and the two after it; t is its distance from the second."""
    a = -0.75
    u = 1 - t
    before = ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a
    left = ((a + 2) * t - (a + 3)) * t * t + 1
    right = ((a + 2) * u - (a + 3)) * u * u + 1
    after = ((a * (u + 1) - 5 * a) * (u + 1) + 8 * a) * (u + 1) - 4 * a
    return before, left, right, after


@kernel
def resized_row(
    row, column, first, second, third, fourth, length, stride, exists, dtype: tl.constexpr, WIDE: tl.constexpr
):
    """A row of the map at the columns of the resized one. It has the column before each point, and four weights."""
    last = length - 1
    before = positions(tl.maximum(tl.minimum(column - 1, last), 0), WIDE) * stride
    left = positions(tl.maximum(tl.minimum(column, last), 0), WIDE) * stride
    right = positions(tl.maximum(tl.minimum(column + 1, last), 0), WIDE) * stride
    after = positions(tl.maximum(tl.minimum(column + 2, last), 0), WIDE) * stride
    total = first * tl.load(row + before, mask=exists, other=0.0).to(dtype)
    total += second * tl.load(row + left, mask=exists, other=0.0).to(dtype)
    total += third * tl.load(row + right, mask=exists, other=0.0).to(dtype)
    total += fourth * tl.load(row + after, mask=exists, other=0.0).to(dtype)
    return total


@kernel
def find_peak(
    maps,  # [K, N, height, width]
    sizes,  # [K, 2], width and height that each map is resized to
    place,  # [K, N], of the maximum, row by row
    value,  # [K, N]
    number,  # N
    height,
    width,
    map_box,
    map_keypoint,
    map_row,
    map_column,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first maximum of a resized map. A program has one map, and takes a block of columns at a time."""
    box = positions(tl.program_id(0), WIDE)
    keypoint = tl.program_id(1)
    dtype = value.dtype.element_ty
    map = maps + box * map_box + positions(keypoint, WIDE) * map_keypoint
    columns = tl.load(sizes + box * 2)
    rows = tl.load(sizes + box * 2 + 1)
    one = tl.full([BLOCK], 1, dtype)
    x_scale = one * width / columns
    y_scale = one * height / rows
    best = tl.full([BLOCK], -float("inf"), dtype)
    best_place = tl.full([BLOCK], -1, tl.int32)
    for y in range(rows):
        real_y = y_scale * (y + 0.5) - 0.5
        above = tl.floor(real_y)
        first, second, third, fourth = cubic_weights(real_y - above)
        row = above.to(tl.int32)
        last = height - 1
        row0 = map + positions(tl.maximum(tl.minimum(row - 1, last), 0), WIDE) * map_row
        row1 = map + positions(tl.maximum(tl.minimum(row, last), 0), WIDE) * map_row
        row2 = map + positions(tl.maximum(tl.minimum(row + 1, last), 0), WIDE) * map_row
        row3 = map + positions(tl.maximum(tl.minimum(row + 2, last), 0), WIDE) * map_row
        for begin in range(0, columns, BLOCK):
            x = begin + tl.arange(0, BLOCK)
            exists = x < columns
            real_x = x_scale * (x + 0.5) - 0.5
            left = tl.floor(real_x)
            column = left.to(tl.int32)
            w0, w1, w2, w3 = cubic_weights(real_x - left)
            total = first * resized_row(row0, column, w0, w1, w2, w3, width, map_column, exists, dtype, WIDE)
            total += second * resized_row(row1, column, w0, w1, w2, w3, width, map_column, exists, dtype, WIDE)
            total += third * resized_row(row2, column, w0, w1, w2, w3, width, map_column, exists, dtype, WIDE)
            total += fourth * resized_row(row3, column, w0, w1, w2, w3, width, map_column, exists, dtype, WIDE)
            at = tl.where(exists, y * columns + x, -1)
            best, best_place = first_best(total, at, best, best_place)
    peak = first_best_of_all(best, best_place)
    is_nan = tl.max(((best_place == peak) & (best != best)).to(tl.int32), 0)
    greatest = tl.max(tl.where(best_place == peak, best, -float("inf")), 0)
    out = box * number + keypoint
    tl.store(place + out, peak)
    tl.store(value + out, tl.where(is_nan > 0, float("nan"), greatest))


def _heatmaps_to_keypoints(maps: Tensor, rois: Tensor) -> Tensor:
    heatmaps_to_keypoints.check_arguments(maps, rois)
    begin, lengths, pixels, fits = heatmaps_to_keypoints.sizes_of(rois.to(accumulate_dtype(rois.dtype)))
    torch._assert_async(fits.all(), heatmaps_to_keypoints.TOO_LARGE)
    maps = dense(maps)
    sizes = pixels.where(fits[:, None], 0).int()
    boxes, number, height, width = maps.shape
    outputs = {
        "place": sizes.new_empty(boxes, number),
        "value": maps.new_empty((boxes, number), dtype=accumulate_dtype(maps.dtype)),
    }
    names = ("map_box", "map_keypoint", "map_row", "map_column")
    place, value = launch(
        find_peak,
        (boxes, number),
        outputs,
        maps=maps,
        sizes=sizes,
        number=number,
        height=height,
        width=width,
        **dict(zip(names, maps.stride())),
        BLOCK=128,
    )
    columns = sizes[:, :1].clamp(min=1)
    xy = torch.stack([place % columns, place // columns], dim=2)  # [K, N, (x, y)]
    xy = (xy.to(begin.dtype) + 0.5) * (lengths / pixels)[:, None] + begin[:, None]
    return torch.cat([xy.float(), value[..., None].float()], dim=2)


triton_program_for("heatmaps_to_keypoints", TritonProgram(_heatmaps_to_keypoints))
