"""deform_conv2d and its gradients as Triton kernels: what is sampled is multiplied at once, and never stored.

Pixels of the output, of all images, are the rows of a product of matrices; a program has a block of them. Channels come
in segments, of one group and one offset group. A depthwise convolution has no product: there the channels of an offset
group are a segment, and outputs take the place of channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import deform_conv2d
from ...ops.deform_conv2d import Arguments
from ...ops.registry import GRADIENTS, accumulate_dtype
from ..common.geometry import constant_geometry
from ..common.registry import TritonProgram, triton_program_for
from .kernels import (
    PART_PIXELS,
    adding_block,
    block_of_pixels,
    dense,
    dot_precision,
    filters_of,
    geometry_of,
    in_format_of,
    kernel,
    launch,
    load_block,
    positions,
    product_blocks,
    refuse_if_deterministic,
    strides,
)

# Arguments of kernels have no types in Python.
# mypy: disable-error-code="no-untyped-def"


@kernel
def sampling_point(offset, at, channel_stride, tap, pixel, size, geometry, DOUBLE: tl.constexpr, WIDE: tl.constexpr):
    """Where a tap samples for each pixel of a block.

    Returns:
        Whether the point is in the image, or near enough for a derivative; row and column of the corner above and to
        the left; and how far the point lies below and beside it.
    """
    exists, row, column = pixel
    height, width = size
    kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x = geometry
    dtype = tl.float64 if DOUBLE else tl.float32
    at += positions(2 * tap, WIDE) * channel_stride
    offset_y = tl.load(offset + at, mask=exists, other=0.0).to(dtype)
    offset_x = tl.load(offset + at + channel_stride, mask=exists, other=0.0).to(dtype)
    y = offset_y + (row * stride_y + ((tap // kernel_width) * dilation_y - padding_y)).to(dtype)
    x = offset_x + (column * stride_x + ((tap % kernel_width) * dilation_x - padding_x)).to(dtype)
    # NaN fails the tests, and the tests come before the conversion to an integer.
    inside = exists & (y > -1) & (y < height) & (x > -1) & (x < width)
    near = exists & (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y = tl.where(near, y, -2.0)
    x = tl.where(near, x, -2.0)
    top = tl.floor(y)
    left = tl.floor(x)
    return inside, near, top.to(tl.int32), left.to(tl.int32), y - top, x - left


@kernel
def corner(point, DOWN: tl.constexpr, RIGHT: tl.constexpr, size, map_strides, WIDE: tl.constexpr):
    """Position in its plane of a corner of a point, whether there is such a pixel, and its weight."""
    _, near, top, left, below, beside = point
    height, width = size
    row_stride, column_stride = map_strides
    row = top + DOWN
    column = left + RIGHT
    exists = near & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    at = positions(row, WIDE) * row_stride + positions(column, WIDE) * column_stride
    weight = (below if DOWN else 1 - below) * (beside if RIGHT else 1 - beside)
    return tl.where(exists, at, 0), exists, weight


@kernel
def samples_of(input, point, channel, size, map_strides, DOUBLE: tl.constexpr, WIDE: tl.constexpr):
    """``[pixels, channels]``, where the input is at the image of each pixel and ``channel`` has positions in it."""
    inside, _, _, _, _, _ = point
    channel_at, channel_exists = channel
    at, exists, weight = corner(point, 0, 0, size, map_strides, WIDE)
    total = weight[:, None] * load_block(input, at, channel_at, exists, channel_exists, DOUBLE)
    at, exists, weight = corner(point, 0, 1, size, map_strides, WIDE)
    total += weight[:, None] * load_block(input, at, channel_at, exists, channel_exists, DOUBLE)
    at, exists, weight = corner(point, 1, 0, size, map_strides, WIDE)
    total += weight[:, None] * load_block(input, at, channel_at, exists, channel_exists, DOUBLE)
    at, exists, weight = corner(point, 1, 1, size, map_strides, WIDE)
    total += weight[:, None] * load_block(input, at, channel_at, exists, channel_exists, DOUBLE)
    return tl.where(inside[:, None], total, 0.0)


@kernel
def mask_of(mask, at, exists, MASK: tl.constexpr, DOUBLE: tl.constexpr, PIXELS: tl.constexpr):
    """What samples are multiplied with, by pixel."""
    dtype = tl.float64 if DOUBLE else tl.float32
    if MASK:
        return tl.load(mask + at, mask=exists, other=0.0).to(dtype)
    return tl.full([PIXELS], 1, dtype)


@kernel
def convolve(
    input,
    offset,
    mask,
    weight,  # [K, group channels, outputs]
    bias,
    out,
    pixels,
    out_pixels,
    out_width,
    height,
    width,
    input_image,
    input_channel,
    input_row,
    input_column,
    offset_image,
    offset_channel,
    offset_row,
    offset_column,
    mask_image,
    mask_channel,
    mask_row,
    mask_column,
    out_image,
    out_channel,
    out_row,
    out_column,
    K: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr,
    PADDING_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUP_OUTPUTS: tl.constexpr,
    OFFSET_GROUP_CHANNELS: tl.constexpr,
    SEGMENT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """A block of pixels by outputs: the sum over taps and channels of samples times weights."""
    dtype = tl.float64 if DOUBLE else tl.float32
    geometry = (KERNEL_WIDTH, STRIDE_Y, STRIDE_X, PADDING_Y, PADDING_X, DILATION_Y, DILATION_X)
    size = (height, width)
    map_strides = (input_row, input_column)
    first = positions(tl.program_id(0), WIDE) * BLOCK_PIXELS
    exists, image, row, column = block_of_pixels(first, BLOCK_PIXELS, pixels, out_pixels, out_width)
    offset_at = image * offset_image + positions(row, WIDE) * offset_row + positions(column, WIDE) * offset_column
    mask_at = image * mask_image + positions(row, WIDE) * mask_row + positions(column, WIDE) * mask_column
    image_input = (input + image * input_image)[:, None]
    pixel = (exists, row, column)

    # Of the outputs of a group, or of those of a depthwise convolution's offset group, a block.
    part_channels = SEGMENT if DEPTHWISE else GROUP_CHANNELS
    part_outputs = SEGMENT * GROUP_OUTPUTS if DEPTHWISE else GROUP_OUTPUTS
    blocks = tl.cdiv(part_outputs, BLOCK_OUTPUTS)
    part = tl.program_id(1) // blocks
    in_part = (tl.program_id(1) % blocks) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    output = part * part_outputs + in_part
    output_exists = in_part < part_outputs

    total = tl.zeros([BLOCK_PIXELS, BLOCK_OUTPUTS], dtype)
    for segment in range(part * part_channels, (part + 1) * part_channels, SEGMENT):
        offset_group = segment // OFFSET_GROUP_CHANNELS
        for tap in range(K):
            point_at = offset_at + positions(offset_group * 2 * K, WIDE) * offset_channel
            point = sampling_point(offset, point_at, offset_channel, tap, pixel, size, geometry, DOUBLE, WIDE)
            scale_at = mask_at + positions(offset_group * K + tap, WIDE) * mask_channel
            scale = mask_of(mask, scale_at, exists, MASK, DOUBLE, BLOCK_PIXELS)
            if DEPTHWISE:
                channel = (positions(output // GROUP_OUTPUTS, WIDE) * input_channel, output_exists)
                samples = samples_of(image_input, point, channel, size, map_strides, DOUBLE, WIDE) * scale[:, None]
                filters_at = positions(tap, WIDE) * OUTPUTS + output
                filters = tl.load(weight + filters_at, mask=output_exists, other=0.0).to(dtype)
                total += samples * filters[None, :]
            else:
                for begin in range(segment, segment + SEGMENT, BLOCK_CHANNELS):
                    of_block = begin + tl.arange(0, BLOCK_CHANNELS)
                    channel = (positions(of_block, WIDE) * input_channel, of_block < segment + SEGMENT)
                    samples = samples_of(image_input, point, channel, size, map_strides, DOUBLE, WIDE) * scale[:, None]
                    filters_at = positions(tap * GROUP_CHANNELS + of_block - part * GROUP_CHANNELS, WIDE) * OUTPUTS
                    there = (of_block < segment + SEGMENT)[:, None] & output_exists[None, :]
                    filters = tl.load(weight + filters_at[:, None] + output[None, :], mask=there, other=0.0)
                    samples = samples.to(filters.dtype)
                    total = tl.dot(samples, filters, total, input_precision=PRECISION, out_dtype=dtype)
    if BIAS:
        total += tl.load(bias + output, mask=output_exists, other=0.0).to(dtype)[None, :]
    out_at = image * out_image + positions(row, WIDE) * out_row + positions(column, WIDE) * out_column
    to = out + out_at[:, None] + (positions(output, WIDE) * out_channel)[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=exists[:, None] & output_exists[None, :])


@kernel
def spread(
    grad,
    input,
    offset,
    mask,
    weight,  # [K, group channels, outputs]
    grad_input,  # written if INPUT, as are the others
    grad_offset,
    grad_mask,
    pixels,
    out_pixels,
    out_width,
    height,
    width,
    grad_image,
    grad_channel,
    grad_row,
    grad_column,
    input_image,
    input_channel,
    input_row,
    input_column,
    offset_image,
    offset_channel,
    offset_row,
    offset_column,
    mask_image,
    mask_channel,
    mask_row,
    mask_column,
    K: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr,
    PADDING_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUP_OUTPUTS: tl.constexpr,
    OFFSET_GROUP_CHANNELS: tl.constexpr,
    SEGMENT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    MASK: tl.constexpr,
    INPUT: tl.constexpr,
    OFFSET: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """The gradients of a block of pixels' samples of one tap and offset group: added to the input's, and summed over
    channels to those of offset and mask."""
    dtype = tl.float64 if DOUBLE else tl.float32
    geometry = (KERNEL_WIDTH, STRIDE_Y, STRIDE_X, PADDING_Y, PADDING_X, DILATION_Y, DILATION_X)
    size = (height, width)
    map_strides = (input_row, input_column)
    first = positions(tl.program_id(0), WIDE) * BLOCK_PIXELS
    exists, image, row, column = block_of_pixels(first, BLOCK_PIXELS, pixels, out_pixels, out_width)
    offset_group = tl.program_id(1) // K
    tap = tl.program_id(1) % K
    offset_at = image * offset_image + positions(row, WIDE) * offset_row + positions(column, WIDE) * offset_column
    offset_at += positions(offset_group * 2 * K, WIDE) * offset_channel
    mask_at = image * mask_image + positions(row, WIDE) * mask_row + positions(column, WIDE) * mask_column
    mask_at += positions(offset_group * K + tap, WIDE) * mask_channel
    grad_at = image * grad_image + positions(row, WIDE) * grad_row + positions(column, WIDE) * grad_column
    image_input = (input + image * input_image)[:, None]

    pixel = (exists, row, column)
    point = sampling_point(offset, offset_at, offset_channel, tap, pixel, size, geometry, DOUBLE, WIDE)
    inside, _, _, _, below, beside = point
    scale = mask_of(mask, mask_at, exists, MASK, DOUBLE, BLOCK_PIXELS)
    at00, exists00, weight00 = corner(point, 0, 0, size, map_strides, WIDE)
    at01, exists01, weight01 = corner(point, 0, 1, size, map_strides, WIDE)
    at10, exists10, weight10 = corner(point, 1, 0, size, map_strides, WIDE)
    at11, exists11, weight11 = corner(point, 1, 1, size, map_strides, WIDE)

    sum_y = tl.zeros([BLOCK_PIXELS], dtype)
    sum_x = tl.zeros([BLOCK_PIXELS], dtype)
    sum_mask = tl.zeros([BLOCK_PIXELS], dtype)
    begin_group = offset_group * OFFSET_GROUP_CHANNELS
    for segment in range(begin_group, begin_group + OFFSET_GROUP_CHANNELS, SEGMENT):
        group = segment // GROUP_CHANNELS
        for begin in range(segment, segment + SEGMENT, BLOCK_CHANNELS):
            channel = begin + tl.arange(0, BLOCK_CHANNELS)
            channel_exists = channel < segment + SEGMENT
            of_samples = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], dtype)
            if DEPTHWISE:
                for i in range(GROUP_OUTPUTS):
                    output = channel * GROUP_OUTPUTS + i
                    output_at = positions(output, WIDE) * grad_channel
                    block = load_block(grad, grad_at, output_at, exists, channel_exists, DOUBLE)
                    filters_at = positions(tap, WIDE) * OUTPUTS + output
                    filters = tl.load(weight + filters_at, mask=channel_exists, other=0.0).to(dtype)
                    of_samples += block * filters[None, :]
            else:
                filters_at = positions(tap * GROUP_CHANNELS + channel - group * GROUP_CHANNELS, WIDE) * OUTPUTS
                for i in range(0, GROUP_OUTPUTS, BLOCK_OUTPUTS):
                    in_group = i + tl.arange(0, BLOCK_OUTPUTS)
                    output = group * GROUP_OUTPUTS + in_group
                    output_exists = in_group < GROUP_OUTPUTS
                    output_at = (positions(output, WIDE) * grad_channel)[None, :]
                    there = exists[:, None] & output_exists[None, :]
                    block = tl.load(grad + grad_at[:, None] + output_at, mask=there, other=0.0)
                    there = output_exists[:, None] & channel_exists[None, :]
                    filters = tl.load(weight + output[:, None] + filters_at[None, :], mask=there, other=0.0)
                    of_samples = tl.dot(block, filters, of_samples, input_precision=PRECISION, out_dtype=dtype)
            of_points = of_samples * scale[:, None]
            channel_at = positions(channel, WIDE) * input_channel
            if INPUT:
                to = (grad_input + image * input_image)[:, None] + channel_at[None, :]
                reached = inside[:, None] & channel_exists[None, :]
                mask00 = reached & (exists00 & (weight00 > 0))[:, None]
                mask01 = reached & (exists01 & (weight01 > 0))[:, None]
                mask10 = reached & (exists10 & (weight10 > 0))[:, None]
                mask11 = reached & (exists11 & (weight11 > 0))[:, None]
                tl.atomic_add(to + at00[:, None], of_points * weight00[:, None], mask=mask00, sem="relaxed")
                tl.atomic_add(to + at01[:, None], of_points * weight01[:, None], mask=mask01, sem="relaxed")
                tl.atomic_add(to + at10[:, None], of_points * weight10[:, None], mask=mask10, sem="relaxed")
                tl.atomic_add(to + at11[:, None], of_points * weight11[:, None], mask=mask11, sem="relaxed")
            if OFFSET:
                v00 = load_block(image_input, at00, channel_at, exists00, channel_exists, DOUBLE)
                v01 = load_block(image_input, at01, channel_at, exists01, channel_exists, DOUBLE)
                v10 = load_block(image_input, at10, channel_at, exists10, channel_exists, DOUBLE)
                v11 = load_block(image_input, at11, channel_at, exists11, channel_exists, DOUBLE)
                slope_y = (v10 - v00) * (1 - beside)[:, None] + (v11 - v01) * beside[:, None]
                slope_x = (v01 - v00) * (1 - below)[:, None] + (v11 - v10) * below[:, None]
                sum_y += tl.sum(of_points * slope_y, 1)
                sum_x += tl.sum(of_points * slope_x, 1)
                if MASK:
                    value = weight00[:, None] * v00 + weight01[:, None] * v01
                    value += weight10[:, None] * v10 + weight11[:, None] * v11
                    sum_mask += tl.sum(of_samples * tl.where(inside[:, None], value, 0.0), 1)
    if OFFSET:
        to = grad_offset + offset_at + positions(2 * tap, WIDE) * offset_channel
        tl.store(to, sum_y.to(grad_offset.dtype.element_ty), mask=exists)
        tl.store(to + offset_channel, sum_x.to(grad_offset.dtype.element_ty), mask=exists)
        if MASK:
            tl.store(grad_mask + mask_at, sum_mask.to(grad_mask.dtype.element_ty), mask=exists)


@kernel
def correlate(
    grad,
    input,
    offset,
    mask,
    out,  # [parts, K, group channels, outputs]
    pixels,
    part_pixels,
    out_pixels,
    out_width,
    height,
    width,
    grad_image,
    grad_channel,
    grad_row,
    grad_column,
    input_image,
    input_channel,
    input_row,
    input_column,
    offset_image,
    offset_channel,
    offset_row,
    offset_column,
    mask_image,
    mask_channel,
    mask_row,
    mask_column,
    K: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr,
    PADDING_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUP_OUTPUTS: tl.constexpr,
    OFFSET_GROUP_CHANNELS: tl.constexpr,
    SEGMENT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    MASK: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """The gradient of a block of the weight, of one tap: a sum over a part of the pixels, samples times gradients."""
    dtype = tl.float64 if DOUBLE else tl.float32
    geometry = (KERNEL_WIDTH, STRIDE_Y, STRIDE_X, PADDING_Y, PADDING_X, DILATION_Y, DILATION_X)
    size = (height, width)
    map_strides = (input_row, input_column)
    segment_outputs = SEGMENT * GROUP_OUTPUTS if DEPTHWISE else GROUP_OUTPUTS
    output_blocks = tl.cdiv(segment_outputs, BLOCK_OUTPUTS)
    channel_blocks = 1 if DEPTHWISE else tl.cdiv(SEGMENT, BLOCK_CHANNELS)
    tap = tl.program_id(0) % K
    block = tl.program_id(0) // K
    in_segment = (block % output_blocks) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    block = block // output_blocks
    segment = (block // channel_blocks) * SEGMENT
    group = segment // GROUP_CHANNELS
    offset_group = segment // OFFSET_GROUP_CHANNELS
    output = group * GROUP_OUTPUTS + in_segment
    output_exists = in_segment < segment_outputs
    output_at = positions(output, WIDE) * grad_channel
    of_block = segment + (block % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel_exists = of_block < segment + SEGMENT

    part = tl.program_id(1)
    part_begin = positions(part, WIDE) * part_pixels
    total = tl.zeros([BLOCK_PIXELS if DEPTHWISE else BLOCK_CHANNELS, BLOCK_OUTPUTS], dtype)
    for first in range(part_begin, tl.minimum(part_begin + part_pixels, pixels), BLOCK_PIXELS):
        exists, image, row, column = block_of_pixels(first, BLOCK_PIXELS, pixels, out_pixels, out_width)
        offset_at = image * offset_image + positions(row, WIDE) * offset_row + positions(column, WIDE) * offset_column
        offset_at += positions(offset_group * 2 * K, WIDE) * offset_channel
        pixel = (exists, row, column)
        point = sampling_point(offset, offset_at, offset_channel, tap, pixel, size, geometry, DOUBLE, WIDE)
        mask_at = image * mask_image + positions(row, WIDE) * mask_row + positions(column, WIDE) * mask_column
        mask_at += positions(offset_group * K + tap, WIDE) * mask_channel
        scale = mask_of(mask, mask_at, exists, MASK, DOUBLE, BLOCK_PIXELS)
        grad_at = image * grad_image + positions(row, WIDE) * grad_row + positions(column, WIDE) * grad_column
        image_input = (input + image * input_image)[:, None]
        there = exists[:, None] & output_exists[None, :]
        of_outputs = tl.load(grad + grad_at[:, None] + output_at[None, :], mask=there, other=0.0)
        if DEPTHWISE:
            channel = (positions(output // GROUP_OUTPUTS, WIDE) * input_channel, output_exists)
            samples = samples_of(image_input, point, channel, size, map_strides, DOUBLE, WIDE) * scale[:, None]
            total += samples * of_outputs.to(dtype)
        else:
            channel = (positions(of_block, WIDE) * input_channel, channel_exists)
            samples = samples_of(image_input, point, channel, size, map_strides, DOUBLE, WIDE) * scale[:, None]
            samples = tl.trans(samples.to(of_outputs.dtype))
            total = tl.dot(samples, of_outputs, total, input_precision=PRECISION, out_dtype=dtype)
    to = out + positions(part * K + tap, WIDE) * GROUP_CHANNELS * OUTPUTS
    if DEPTHWISE:
        tl.store(to + output, tl.sum(total, 0), mask=output_exists)
    else:
        filters_at = (positions(of_block - group * GROUP_CHANNELS, WIDE) * OUTPUTS)[:, None] + output[None, :]
        tl.store(to + filters_at, total, mask=channel_exists[:, None] & output_exists[None, :])


class _Call:
    """A call of the operator, and what all kernels are told of it."""

    def __init__(self, arguments: Arguments) -> None:
        weight, mask = arguments.weight, arguments.mask
        self.input, self.offset = dense(arguments.input), dense(arguments.offset)
        self.mask = None if mask is None else dense(mask)
        self.outputs, self.group_channels = map(int, weight.shape[:2])
        channels = int(self.input.shape[1])
        self.groups = channels // self.group_channels
        self.offset_groups = arguments.offset_groups
        self.depthwise = self.group_channels == 1 and self.groups > 1
        of_offset_group = channels // self.offset_groups
        self.segment = of_offset_group if self.depthwise else math.gcd(self.group_channels, of_offset_group)
        self.segments = channels // self.segment
        self.taps = arguments.taps
        batch, _, out_height, out_width = self.offset.shape
        self.pixels = batch * out_height * out_width
        group_outputs = self.outputs // self.groups
        self.part_outputs = self.segment * group_outputs if self.depthwise else group_outputs
        most_outputs = 32 if self.depthwise else 128
        blocks = product_blocks(weight.dtype, self.segment, self.part_outputs, most_outputs)
        self.block_pixels, self.block_channels, self.block_outputs = blocks.values()
        tensors = {
            "input": self.input,
            "offset": self.offset,
            "mask": self.offset if self.mask is None else self.mask,
        }
        self.arguments: dict[str, Any] = {
            **tensors,
            **strides(**tensors),
            "pixels": self.pixels,
            "out_pixels": out_height * out_width,
            "out_width": out_width,
            "height": self.input.shape[2],
            "width": self.input.shape[3],
            **geometry_of(weight, arguments.stride, arguments.padding, arguments.dilation),
            "GROUP_CHANNELS": self.group_channels,
            "GROUP_OUTPUTS": group_outputs,
            "OFFSET_GROUP_CHANNELS": of_offset_group,
            "SEGMENT": self.segment,
            "OUTPUTS": self.outputs,
            "MASK": mask is not None,
            "DEPTHWISE": self.depthwise,
            "DOUBLE": weight.dtype == torch.float64,
            "PRECISION": dot_precision(self.input),
            **blocks,
        }

    @property
    def output_blocks(self) -> int:
        """Number of outputs, of all groups or segments."""
        parts = self.segments if self.depthwise else self.groups
        return parts * triton.cdiv(self.part_outputs, self.block_outputs)


def _forward(*args: Any) -> Tensor:
    arguments = Arguments(*args)
    size = deform_conv2d.check_arguments(arguments)
    call = _Call(arguments)
    out = in_format_of(
        arguments.input, (call.input.shape[0], call.outputs, *size), call.input.new_empty, call.input.dtype
    )
    filters = filters_of(arguments.weight)
    grid = triton.cdiv(call.pixels, call.block_pixels), call.output_blocks
    (out,) = launch(
        convolve,
        grid,
        {"out": out},
        **call.arguments,
        **strides(out=out),
        weight=filters,
        bias=filters if arguments.bias is None else arguments.bias.contiguous(),
        BIAS=arguments.bias is not None,
    )
    return out


def _backward(grad: Tensor, *args: Any, wanted: Sequence[bool]) -> list[Tensor | None]:
    arguments = Arguments(*args)
    call = _Call(arguments)
    grad = dense(grad)
    dtype = accumulate_dtype(call.input.dtype)
    shared = {**call.arguments, "grad": grad, **strides(grad=grad)}
    results: list[Tensor | None] = [None] * 5
    of_points = wanted[1] or wanted[4]
    if wanted[0] or of_points:
        block_pixels, block_channels = call.block_pixels, call.block_channels
        outputs: dict[str, Tensor] = {}
        if wanted[0]:
            outputs["grad_input"] = torch.zeros_like(call.input, dtype=dtype)
            block_pixels = adding_block(block_pixels, 16, call.input)
            block_channels = adding_block(block_channels, 16, call.input)
        grid = triton.cdiv(call.pixels, block_pixels), call.offset_groups * call.taps
        if of_points:
            outputs["grad_offset"] = torch.empty_like(call.offset)
            if call.mask is not None:
                outputs["grad_mask"] = torch.empty_like(call.mask)
        unwritten = {name: call.offset for name in ("grad_input", "grad_offset", "grad_mask") if name not in outputs}
        filters = filters_of(arguments.weight)
        blocks = {"BLOCK_PIXELS": block_pixels, "BLOCK_CHANNELS": block_channels}
        flags = {"INPUT": wanted[0], "OFFSET": of_points}
        written = launch(spread, grid, outputs, **{**shared, **blocks}, **unwritten, weight=filters, **flags)
        gradients = dict(zip(outputs, written))
        for i, name in ((0, "grad_input"), (1, "grad_offset"), (4, "grad_mask")):
            results[i] = gradients.get(name) if wanted[i] else None
    if wanted[2]:
        results[2] = _grad_weight(call, shared, dtype)
    if wanted[3]:
        results[3] = grad.to(dtype).sum((0, 2, 3))
    return results


def _grad_weight(call: _Call, shared: dict[str, Any], dtype: torch.dtype) -> Tensor:
    parts = triton.cdiv(call.pixels, PART_PIXELS)
    channel_blocks = 1 if call.depthwise else triton.cdiv(call.segment, call.block_channels)
    output_blocks = triton.cdiv(call.part_outputs, call.block_outputs)
    grid = call.taps * call.segments * channel_blocks * output_blocks, parts
    out = call.input.new_empty((parts, call.taps, call.group_channels, call.outputs), dtype=dtype)
    (out,) = launch(correlate, grid, {"out": out}, **shared, part_pixels=PART_PIXELS)
    return out.sum(0).permute(2, 1, 0)  # [outputs, group channels, K]


triton_program_for("deform_conv2d", TritonProgram(_forward, lambda *args: constant_geometry(*args[4:7])))
triton_program_for(
    "deform_conv2d_backward",
    TritonProgram(
        GRADIENTS["deform_conv2d"].completed(_backward),
        lambda grad, *args: constant_geometry(*args[4:7]) or refuse_if_deterministic(),
    ),
)
