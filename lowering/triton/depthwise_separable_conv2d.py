"""depthwise_separable_conv2d as a Triton kernel, and the depthwise half of its gradients as an aten program that
Inductor fuses: no convolution stands between the other elementwise steps.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...ops import depthwise_separable_conv2d
from ...ops.depthwise_separable_conv2d import Arguments, DepthwiseGradients
from ...ops.registry import GRADIENTS, accumulate_dtype
from ..common.geometry import constant_geometry
from ..common.registry import TritonProgram, triton_program_for
from .kernels import (
    block_of_pixels,
    dense,
    dot_precision,
    geometry_of,
    in_format_of,
    kernel,
    launch,
    load_block,
    positions,
    product_blocks,
    strides,
)

# Arguments of kernels have no types in Python.
# mypy: disable-error-code="no-untyped-def"


@kernel
def activated(x, ACTIVATION: tl.constexpr, slope, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """A function of each element, by the operator's name for it, with its parameters; the slope is that of prelu. NaN
    stays NaN."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x > 0, x, x * FIRST)
    elif ACTIVATION == "prelu":
        x = tl.where(x > 0, x, x * slope)
    elif ACTIVATION == "hardtanh":
        low = tl.full(x.shape, FIRST, x.dtype)  # where() and comparisons make float32 of a number
        high = tl.full(x.shape, SECOND, x.dtype)
        x = tl.where(x < low, low, x)
        x = tl.where(x > high, high, x)
    elif ACTIVATION == "elu":
        x = tl.where(x <= 0, FIRST * (tl.exp(tl.where(x > 0, 0.0, x)) - 1), x)
    elif ACTIVATION == "selu":  # ops.SELU
        negative = 1.6732632423543772 * (tl.exp(tl.where(x > 0, 0.0, x)) - 1)
        x = 1.0507009873554805 * tl.where(x <= 0, negative, x)
    elif ACTIVATION == "celu":
        x = tl.where(x <= 0, FIRST * (tl.exp(tl.where(x > 0, 0.0, x) / FIRST) - 1), x)
    elif ACTIVATION == "softplus":
        scaled = x * FIRST
        x = tl.where(scaled > SECOND, x, tl.log(1 + tl.exp(tl.where(scaled > SECOND, 0.0, scaled))) / FIRST)
    elif ACTIVATION == "softsign":
        x = x / (1 + tl.abs(x))
    elif ACTIVATION == "hardsigmoid":
        y = x + 3
        x = tl.where(y < 0, 0.0, tl.where(y > 6, 6.0, y)) / 6
    elif ACTIVATION == "hardswish":
        y = x + 3
        x = x * tl.where(y < 0, 0.0, tl.where(y > 6, 6.0, y)) / 6
    elif ACTIVATION == "sigmoid":
        x = 1 / (1 + tl.exp(-x))
    elif ACTIVATION == "tanh":
        y = tl.exp(-2 * tl.abs(x))
        y = (1 - y) / (1 + y)
        x = tl.where(x < 0, -y, y)
    elif ACTIVATION == "silu":
        x = x / (1 + tl.exp(-x))
    elif ACTIVATION == "mish":  # tanh(log(1 + e)) = n / (n + 2)
        e = tl.exp(tl.where(x > 20, 20.0, x))
        n = e * (e + 2)
        x = x * (n / (n + 2))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 * y))
        x = x / (1 + tl.exp(-1.5957691216057308 * x * (1 + 0.044715 * x * x)))
    return x


@kernel
def convolve(
    input,
    depthwise_weight,  # [K, hidden channels], as are the biases in the dtype that is computed in
    depthwise_bias,
    pointwise_weight,  # [hidden channels, outputs]
    pointwise_bias,
    slope,
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
    HIDDEN: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FIRST: tl.constexpr,  # parameter of the activation
    SECOND: tl.constexpr,
    DEPTHWISE_BIAS: tl.constexpr,
    POINTWISE_BIAS: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """A block of pixels by outputs. What is between the convolutions exists a block of channels at a time."""
    dtype = tl.float64 if DOUBLE else tl.float32
    first = positions(tl.program_id(0), WIDE) * BLOCK_PIXELS
    exists, image, row, column = block_of_pixels(first, BLOCK_PIXELS, pixels, out_pixels, out_width)
    output = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    output_exists = output < OUTPUTS
    image_input = (input + image * input_image)[:, None]

    if ACTIVATION == "prelu":
        slope = tl.load(slope)
    total = tl.zeros([BLOCK_PIXELS, BLOCK_OUTPUTS], dtype)
    for begin in range(0, HIDDEN, BLOCK_CHANNELS):
        channel = begin + tl.arange(0, BLOCK_CHANNELS)
        channel_exists = channel < HIDDEN
        channel_at = positions(channel // MULTIPLIER, WIDE) * input_channel
        hidden = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], dtype)
        if DEPTHWISE_BIAS:
            hidden += tl.load(depthwise_bias + channel, mask=channel_exists, other=0.0)[None, :]
        for tap in range(K):
            y = row * STRIDE_Y - PADDING_Y + (tap // KERNEL_WIDTH) * DILATION_Y
            x = column * STRIDE_X - PADDING_X + (tap % KERNEL_WIDTH) * DILATION_X
            there = exists & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            at = positions(y, WIDE) * input_row + positions(x, WIDE) * input_column
            block = load_block(image_input, at, channel_at, there, channel_exists, DOUBLE)
            filters_at = positions(tap, WIDE) * HIDDEN + channel
            filters = tl.load(depthwise_weight + filters_at, mask=channel_exists, other=0.0)
            hidden += block * filters[None, :]
        hidden = activated(hidden, ACTIVATION, slope, FIRST, SECOND)
        mask = channel_exists[:, None] & output_exists[None, :]
        filters_at = (positions(channel, WIDE) * OUTPUTS)[:, None] + output[None, :]
        filters = tl.load(pointwise_weight + filters_at, mask=mask, other=0.0)
        hidden = tl.where(channel_exists[None, :], hidden, 0.0).to(filters.dtype)
        total = tl.dot(hidden, filters, total, input_precision=PRECISION, out_dtype=dtype)
    if POINTWISE_BIAS:
        total += tl.load(pointwise_bias + output, mask=output_exists, other=0.0)[None, :]
    out_at = image * out_image + positions(row, WIDE) * out_row + positions(column, WIDE) * out_column
    to = out + out_at[:, None] + (positions(output, WIDE) * out_channel)[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=exists[:, None] & output_exists[None, :])


def _forward(*args: Any) -> Tensor:
    call = Arguments(*args)
    size = depthwise_separable_conv2d.check_arguments(call)
    input, dtype = dense(call.input), accumulate_dtype(call.input.dtype)
    blocks = product_blocks(dtype, call.hidden_channels, call.out_channels)
    pixels = input.shape[0] * size[0] * size[1]
    out = in_format_of(call.input, (input.shape[0], call.out_channels, *size), input.new_empty, input.dtype)
    depthwise_weight = call.depthwise_weight.to(dtype).flatten(1).t().contiguous()
    numbers = () if call.slope is not None else tuple(call.function.parameters.values())
    first, second, *_ = (*numbers, 0.0, 0.0)
    vectors = {
        name: depthwise_weight if vector is None else vector.to(dtype).contiguous()
        for name, vector in (
            ("depthwise_bias", call.depthwise_bias),
            ("pointwise_bias", call.pointwise_bias),
            ("slope", call.slope),
        )
    }
    (out,) = launch(
        convolve,
        (triton.cdiv(pixels, blocks["BLOCK_PIXELS"]), triton.cdiv(call.out_channels, blocks["BLOCK_OUTPUTS"])),
        {"out": out},
        input=input,
        depthwise_weight=depthwise_weight,
        pointwise_weight=call.pointwise_weight.flatten(1).t().contiguous(),
        **vectors,
        pixels=pixels,
        out_pixels=size[0] * size[1],
        out_width=size[1],
        height=input.shape[2],
        width=input.shape[3],
        **strides(input=input, out=out),
        **geometry_of(call.depthwise_weight, call.stride, call.padding, call.dilation),
        HIDDEN=call.hidden_channels,
        MULTIPLIER=call.multiplier,
        OUTPUTS=call.out_channels,
        ACTIVATION=call.activation.partition("(")[0],
        FIRST=first,
        SECOND=second,
        DEPTHWISE_BIAS=call.depthwise_bias is not None,
        POINTWISE_BIAS=call.pointwise_bias is not None,
        DOUBLE=dtype == torch.float64,
        PRECISION=dot_precision(input),
        **blocks,
    )
    return out


def _depthwise_gradients(call: Arguments, grad_hidden: Tensor | None, wanted: DepthwiseGradients) -> DepthwiseGradients:
    """Each a sum over taps of elementwise steps. Shapes: channels are ``[C, M]``."""
    dtype = accumulate_dtype(call.input.dtype)
    kernel_size, multiplier = call.kernel, call.multiplier
    batch, channels, height, width = call.input.shape
    out_size = depthwise_separable_conv2d.check_arguments(call)
    weight = call.depthwise_weight.to(dtype).reshape(channels, multiplier, *kernel_size)
    taps = [(i, j) for i in range(kernel_size[0]) for j in range(kernel_size[1])]
    padding_y, padding_x = call.padding
    padded = F.pad(call.input.to(dtype), (padding_x, padding_x, padding_y, padding_y))[:, :, None]  # [B, C, 1, H, W]

    def read_by(tap: tuple[int, int]) -> Tensor:  # [B, C, 1, Ho, Wo]
        rows, columns = (
            slice(i * dilation, i * dilation + (length - 1) * stride + 1, stride)
            for i, dilation, length, stride in zip(tap, call.dilation, out_size, call.stride)
        )
        return padded[..., rows, columns]

    def per_channel(values: Tensor) -> Tensor:  # [C, M, 1, 1]
        return values[..., None, None]

    terms = [per_channel(weight[..., i, j]) * read_by((i, j)) for i, j in taps]
    sums = sum(terms[1:], terms[0])  # [B, C, M, Ho, Wo]
    if call.depthwise_bias is not None:
        sums = sums + per_channel(call.depthwise_bias.to(dtype).reshape(channels, multiplier))
    hidden = None
    if wanted.hidden:
        hidden = call.function(sums).flatten(1, 2).permute(0, 2, 3, 1).flatten(0, 2)
    if grad_hidden is None:
        return DepthwiseGradients(None, None, None, None, hidden)
    grad_hidden = grad_hidden.reshape(batch, *out_size, channels, multiplier).permute(0, 3, 4, 1, 2)
    grad_sums = call.function.backward(grad_hidden, sums)
    grad_input, grad_weight, grad_bias = None, None, None
    if wanted.input:

        def reading(axis: int, i: int, length: Any) -> tuple[Tensor, Tensor]:
            """For each pixel along an axis the place of the output whose tap ``i`` reads it, and if there is one."""
            stride, reach = call.stride[axis], call.padding[axis] - i * call.dilation[axis]
            at = torch.arange(length, device=call.input.device) + reach
            place = at // stride
            exists = (at >= 0) & (at % stride == 0) & (place < out_size[axis])
            return place.clamp(0, out_size[axis] - 1), exists

        terms = []
        for i, j in taps:
            rows, rows_exist = reading(0, i, height)
            columns, columns_exist = reading(1, j, width)
            there = rows_exist[:, None] & columns_exist
            term = per_channel(weight[..., i, j]) * grad_sums[..., rows[:, None], columns].where(there, 0)
            terms.append(term.sum(2) if multiplier > 1 else term.squeeze(2))
        grad_input = sum(terms[1:], terms[0])  # [B, C, H, W]
    if wanted.weight:
        products = [(grad_sums * read_by(tap)).sum((0, 3, 4)) for tap in taps]  # [C, M] each
        grad_weight = torch.stack(products, dim=2)
    if wanted.bias:
        grad_bias = grad_sums.sum((0, 3, 4))
    grad_slope = call.gradient_of_slope(grad_hidden, sums) if wanted.slope else None
    return DepthwiseGradients(grad_input, grad_weight, grad_bias, grad_slope, hidden)


_backward = GRADIENTS["depthwise_separable_conv2d"].completed(
    functools.partial(depthwise_separable_conv2d.gradients, depthwise=_depthwise_gradients)
)

_MOST_TAPS = 64  # each is a few nodes of the graph


def _refusal_backward(grad: Tensor, *args: Any) -> str | None:
    taps = math.prod(map(int, args[1].shape[2:]))
    return constant_geometry(*args[6:9]) if taps <= _MOST_TAPS else f"{taps} taps are too many to add one by one"


triton_program_for("depthwise_separable_conv2d", TritonProgram(_forward, lambda *args: constant_geometry(*args[6:9])))
triton_program_for("depthwise_separable_conv2d_backward", TritonProgram(_backward, _refusal_backward))
