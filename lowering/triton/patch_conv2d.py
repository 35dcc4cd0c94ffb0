"""patch_conv2d and its gradients as Triton kernels, on patches in any order in memory.

Pixels of all patches are the rows of a product of matrices, channels its depth, a tap at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import patch_conv2d
from ...ops.patch_conv2d import Arguments, arranged, memory_order
from ...ops.registry import GRADIENTS, accumulate_dtype
from ..common.geometry import constant_geometry
from ..common.registry import TritonProgram, triton_program_for
from .kernels import (
    PART_PIXELS,
    block_of_pixels,
    dot_precision,
    filters_of,
    geometry_of,
    kernel,
    launch,
    positions,
    product_blocks,
    strides,
)

# Arguments of kernels have no types in Python.
# mypy: disable-error-code="no-untyped-def"


@kernel
def pixel_of_tap(
    place, tap, length, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, BACK: tl.constexpr
):
    """Along one axis: the pixel that a tap reads for a place of the output, and whether there is one; or, ``BACK``, the
    place of the output for which it reads a pixel."""
    if BACK:
        at = place + PADDING - tap * DILATION
        return at // STRIDE, (at >= 0) & (at % STRIDE == 0) & (at // STRIDE < length)
    at = place * STRIDE - PADDING + tap * DILATION
    return at, (at >= 0) & (at < length)


@kernel
def convolve(
    input,
    weight,  # [K, group channels, outputs]
    bias,
    out,
    pixels,
    patches,
    out_pixels,
    out_width,
    height,
    width,
    input_image,
    input_patch,
    input_channel,
    input_row,
    input_column,
    out_image,
    out_patch,
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
    OUTPUTS: tl.constexpr,
    BIAS: tl.constexpr,
    BACK: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """A block of pixels by outputs of one group; if ``BACK``, of the gradient of the input, of which outputs are the
    channels."""
    dtype = tl.float64 if DOUBLE else tl.float32
    first = positions(tl.program_id(0), WIDE) * BLOCK_PIXELS
    exists, patch, row, column = block_of_pixels(first, BLOCK_PIXELS, pixels, out_pixels, out_width)
    image = patch // patches
    patch = patch % patches
    blocks = tl.cdiv(GROUP_OUTPUTS, BLOCK_OUTPUTS)
    group = tl.program_id(1) // blocks
    in_group = (tl.program_id(1) % blocks) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    output = group * GROUP_OUTPUTS + in_group
    output_exists = in_group < GROUP_OUTPUTS
    patch_input = (input + image * input_image + patch * input_patch)[:, None]

    total = tl.zeros([BLOCK_PIXELS, BLOCK_OUTPUTS], dtype)
    for tap in range(K):
        y, y_exists = pixel_of_tap(row, tap // KERNEL_WIDTH, height, STRIDE_Y, PADDING_Y, DILATION_Y, BACK)
        x, x_exists = pixel_of_tap(column, tap % KERNEL_WIDTH, width, STRIDE_X, PADDING_X, DILATION_X, BACK)
        there = exists & y_exists & x_exists
        at = positions(y, WIDE) * input_row + positions(x, WIDE) * input_column
        for begin in range(0, GROUP_CHANNELS, BLOCK_CHANNELS):
            channel = begin + tl.arange(0, BLOCK_CHANNELS)
            channel_exists = channel < GROUP_CHANNELS
            channel_at = positions(group * GROUP_CHANNELS + channel, WIDE) * input_channel
            filters_at = (positions(tap * GROUP_CHANNELS + channel, WIDE) * OUTPUTS)[:, None] + output[None, :]
            mask = channel_exists[:, None] & output_exists[None, :]
            filters = tl.load(weight + filters_at, mask=mask, other=0.0)
            mask = there[:, None] & channel_exists[None, :]
            block = tl.load(patch_input + at[:, None] + channel_at[None, :], mask=mask, other=0.0)
            total = tl.dot(block, filters, total, input_precision=PRECISION, out_dtype=dtype)
    if BIAS:
        total += tl.load(bias + output, mask=output_exists, other=0.0).to(dtype)[None, :]
    out_at = image * out_image + patch * out_patch
    out_at += positions(row, WIDE) * out_row + positions(column, WIDE) * out_column
    to = out + out_at[:, None] + (positions(output, WIDE) * out_channel)[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=exists[:, None] & output_exists[None, :])


@kernel
def correlate(
    grad,
    input,
    out,  # [parts, K, group channels, outputs]
    pixels,
    part_pixels,
    patches,
    out_pixels,
    out_width,
    height,
    width,
    grad_image,
    grad_patch,
    grad_channel,
    grad_row,
    grad_column,
    input_image,
    input_patch,
    input_channel,
    input_row,
    input_column,
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
    OUTPUTS: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """The gradient of a block of the weight, of one tap: a sum over a part of the pixels, inputs times gradients."""
    dtype = tl.float64 if DOUBLE else tl.float32
    tap = tl.program_id(0) % K
    block = tl.program_id(0) // K
    output_blocks = tl.cdiv(GROUP_OUTPUTS, BLOCK_OUTPUTS)
    channel_blocks = tl.cdiv(GROUP_CHANNELS, BLOCK_CHANNELS)
    in_group = (block % output_blocks) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    block = block // output_blocks
    group = block // channel_blocks
    output = group * GROUP_OUTPUTS + in_group
    output_exists = in_group < GROUP_OUTPUTS
    output_at = (positions(output, WIDE) * grad_channel)[None, :]
    channel = (block % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel_exists = channel < GROUP_CHANNELS
    channel_at = (positions(group * GROUP_CHANNELS + channel, WIDE) * input_channel)[None, :]

    part = tl.program_id(1)
    begin = positions(part, WIDE) * part_pixels
    total = tl.zeros([BLOCK_CHANNELS, BLOCK_OUTPUTS], dtype)
    for first in range(begin, tl.minimum(begin + part_pixels, pixels), BLOCK_PIXELS):
        exists, of_all, row, column = block_of_pixels(first, BLOCK_PIXELS, pixels, out_pixels, out_width)
        image = of_all // patches
        patch = of_all % patches
        y, y_exists = pixel_of_tap(row, tap // KERNEL_WIDTH, height, STRIDE_Y, PADDING_Y, DILATION_Y, False)
        x, x_exists = pixel_of_tap(column, tap % KERNEL_WIDTH, width, STRIDE_X, PADDING_X, DILATION_X, False)
        input_at = image * input_image + patch * input_patch
        input_at += positions(y, WIDE) * input_row + positions(x, WIDE) * input_column
        grad_at = image * grad_image + patch * grad_patch
        grad_at += positions(row, WIDE) * grad_row + positions(column, WIDE) * grad_column
        mask = (exists & y_exists & x_exists)[:, None] & channel_exists[None, :]
        inputs = tl.load(input + input_at[:, None] + channel_at, mask=mask, other=0.0)
        mask = exists[:, None] & output_exists[None, :]
        gradients = tl.load(grad + grad_at[:, None] + output_at, mask=mask, other=0.0)
        total = tl.dot(tl.trans(inputs), gradients, total, input_precision=PRECISION, out_dtype=dtype)
    out_at = (positions(part * K + tap, WIDE) * GROUP_CHANNELS + channel) * OUTPUTS
    tl.store(out + out_at[:, None] + output[None, :], total, mask=channel_exists[:, None] & output_exists[None, :])


def _shared(arguments: Arguments, channels: int, outputs: int) -> dict[str, Any]:
    """What kernels are told of a call that makes so many outputs of so many channels, of each group."""
    return {
        **geometry_of(arguments.weight, arguments.stride, arguments.padding, arguments.dilation),
        "GROUP_CHANNELS": channels,
        "GROUP_OUTPUTS": outputs,
        "OUTPUTS": outputs * arguments.groups,
        "DOUBLE": arguments.input.dtype == torch.float64,
        "PRECISION": dot_precision(arguments.input),
        **product_blocks(arguments.input.dtype, channels, outputs),
    }


def _convolved(
    source: Tensor, filters: Tensor, bias: Tensor | None, out: Tensor, shared: dict[str, Any], groups: int, back: bool
) -> Tensor:
    pixels = out.shape[0] * out.shape[1] * out.shape[3] * out.shape[4]
    blocks = groups * triton.cdiv(shared["GROUP_OUTPUTS"], shared["BLOCK_OUTPUTS"])
    (out,) = launch(
        convolve,
        (triton.cdiv(pixels, shared["BLOCK_PIXELS"]), blocks),
        {"out": out},
        **shared,
        input=source,
        weight=filters,
        bias=filters if bias is None else bias.contiguous(),
        pixels=pixels,
        patches=out.shape[1],
        out_pixels=out.shape[3] * out.shape[4],
        out_width=out.shape[4],
        height=source.shape[3],
        width=source.shape[4],
        **strides(input=source, out=out),
        BIAS=bias is not None,
        BACK=back,
    )
    return out


def _dense(patches: Tensor) -> Tensor:
    return arranged(patches, memory_order(patches))


def _forward(*args: Any) -> Tensor:
    arguments = Arguments(*args)
    size = patch_conv2d.check_arguments(arguments)
    outputs, group_channels = map(int, arguments.weight.shape[:2])
    input = _dense(arguments.input)
    out = patch_conv2d.empty_patches(input, outputs, size)
    shared = _shared(arguments, group_channels, outputs // arguments.groups)
    return _convolved(input, filters_of(arguments.weight), arguments.bias, out, shared, arguments.groups, back=False)


def _backward(grad: Tensor, *args: Any, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    arguments = Arguments(*args)
    input, weight, groups = _dense(arguments.input), arguments.weight, arguments.groups
    outputs, group_channels = map(int, weight.shape[:2])
    group_outputs = outputs // groups
    grad = _dense(grad)
    grad_input, grad_weight, grad_bias = None, None, None
    if wanted[0]:
        # [K, outputs of a group, input channels]
        filters = weight.unflatten(0, (groups, group_outputs)).flatten(3).permute(3, 1, 0, 2).flatten(2).contiguous()
        out = patch_conv2d.empty_patches(input, int(input.shape[2]), input.shape[3:])
        shared = _shared(arguments, group_outputs, group_channels)
        grad_input = _convolved(grad, filters, None, out, shared, groups, back=True)
    if wanted[1]:
        grad_weight = _correlated(grad, input, _shared(arguments, group_channels, group_outputs), groups)
    if wanted[2]:
        grad_bias = grad.to(accumulate_dtype(grad.dtype)).sum((0, 1, 3, 4))
    return grad_input, grad_weight, grad_bias


def _correlated(grad: Tensor, input: Tensor, shared: dict[str, Any], groups: int) -> Tensor:
    """``[outputs, group channels, K]``"""
    pixels = grad.shape[0] * grad.shape[1] * grad.shape[3] * grad.shape[4]
    parts = triton.cdiv(pixels, PART_PIXELS)
    channels, outputs = shared["GROUP_CHANNELS"], shared["GROUP_OUTPUTS"]
    blocks = triton.cdiv(channels, shared["BLOCK_CHANNELS"]) * triton.cdiv(outputs, shared["BLOCK_OUTPUTS"])
    shape = (parts, shared["K"], channels, shared["OUTPUTS"])
    (out,) = launch(
        correlate,
        (shared["K"] * groups * blocks, parts),
        {"out": input.new_empty(shape, dtype=accumulate_dtype(input.dtype))},
        **shared,
        grad=grad,
        input=input,
        pixels=pixels,
        part_pixels=PART_PIXELS,
        patches=grad.shape[1],
        out_pixels=grad.shape[3] * grad.shape[4],
        out_width=grad.shape[4],
        height=input.shape[3],
        width=input.shape[4],
        **strides(grad=grad, input=input),
    )
    return out.sum(0).permute(2, 1, 0)


def _refusal(*args: Any) -> str | None:
    input, weight, _, *geometry = args[:6]
    if int(weight.shape[1]) == 1 and int(input.shape[2]) > 1:
        return "the products of a depthwise convolution would be mostly padding"
    return constant_geometry(*geometry)


triton_program_for("patch_conv2d", TritonProgram(_forward, _refusal))
triton_program_for(
    "patch_conv2d_backward",
    TritonProgram(GRADIENTS["patch_conv2d"].completed(_backward), lambda grad, *args: _refusal(*args)),
)
