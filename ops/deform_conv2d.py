"""Deformable convolution, v1 and v2: https://arxiv.org/abs/1703.06211, https://arxiv.org/abs/1811.11168."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from .convolution import check_convolution, check_dtypes, check_gradient, empty_output
from .gradients import Gradient
from .registry import (
    accumulate_dtype,
    check,
    define_op,
    is_proxy,
    not_scriptable,
    pair,
    record_call,
    serves_torchvision,
)
from .transforms import as_one_batch


@not_scriptable
def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Deformable convolution; a drop-in for :func:`torchvision.ops.deform_conv2d`.

    Each tap :math:`(i, j)` of the kernel samples the input where ``offset`` moves it to, and is scaled by ``mask``:

    .. math::
        \text{out}[b, o, p, q] = \text{bias}[o] + \sum_{c, i, j} \text{weight}[o, c, i, j] \cdot
            \text{mask}[b, ij, p, q] \cdot \text{input}[b, c](y, x)

        y = p \cdot \text{stride} - \text{padding} + i \cdot \text{dilation} + \text{offset}[b, 2ij, p, q]

    and :math:`x` likewise with ``offset[b, 2ij + 1]``; :math:`ij` counts taps row by row. Coordinates are in pixels of
    the input, pixel centres are at integers, and values between them are interpolated bilinearly. Pixels outside the
    image count as zero. A sample at :math:`y \le -1`, :math:`y \ge H`, :math:`x \le -1` or :math:`x \ge W`, or at
    NaN, is zero.

    Args:
        input: ``[B, C, H, W]``, float32, float64, bfloat16 or float16; the low precisions are computed in float32.
        offset: ``[B, 2 * offset_groups * kH * kW, Ho, Wo]``, (y, x) for each tap. The channels of ``input`` are split
            into ``offset_groups`` equal groups, each with offsets (and mask) of its own.
        weight: ``[O, C // groups, kH, kW]``.
        bias: ``[O]``.
        stride, padding, dilation: one number, or one for each of height and width.
        mask: ``[B, offset_groups * kH * kW, Ho, Wo]``; None means ones (version 1 of the operator).

    Returns:
        ``[B, O, Ho, Wo]``, in the memory format of ``input``;
        :math:`H_o = \lfloor (H + 2\,\text{padding} - \text{dilation}\,(kH - 1) - 1) / \text{stride} \rfloor + 1`.

    Raises:
        RuntimeError: shapes, dtypes or devices are not compatible. The message says what was expected.
    """
    if is_proxy(input, offset, weight):
        return record_call(deform_conv2d, **locals())
    geometry = pair("stride", stride), pair("padding", padding), pair("dilation", dilation)
    return _op(input, offset, weight, bias, *geometry, mask)


@not_scriptable
class DeformConv2d(nn.Module):
    """Module with the weight and bias of :func:`deform_conv2d`; a drop-in for :class:`torchvision.ops.DeformConv2d`.

    Parameters are initialized as :class:`torch.nn.Conv2d` initializes them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups != 0:
                raise ValueError(f"{name} must be divisible by groups, got {name}={channels}, groups={groups}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair("kernel_size", kernel_size)
        self.stride = pair("stride", stride)
        self.padding = pair("padding", padding)
        self.dilation = pair("dilation", dilation)
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Call :func:`deform_conv2d`, which describes the arguments."""
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text if self.bias is not None else text + ", bias=False"


class Arguments(NamedTuple):
    """What the operator takes, in its order."""

    input: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    mask: Tensor | None

    @property
    def taps(self) -> int:
        return int(self.weight.shape[2]) * int(self.weight.shape[3])

    @property
    def groups(self) -> int:
        return int(self.input.shape[1]) // int(self.weight.shape[1])

    @property
    def offset_groups(self) -> int:
        return int(self.offset.shape[1]) // (2 * self.taps)


def check_arguments(arguments: Arguments) -> tuple[int, int]:
    """Raise RuntimeError unless the arguments are compatible; return the output's height and width."""
    input, offset, weight, bias, stride, padding, dilation, mask = arguments

    require = functools.partial(check, "deform_conv2d")

    for name, tensor in (("input", input), ("offset", offset), ("weight", weight), ("mask", mask)):
        if tensor is not None:
            require(tensor.dim() == 4, f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
    check_dtypes("deform_conv2d", input, {"offset": offset, "weight": weight, "bias": bias, "mask": mask})
    out_height, out_width = check_convolution("deform_conv2d", input, weight, bias, stride, padding, dilation)
    channels = int(input.shape[1])
    offset_channels, taps = int(offset.shape[1]), arguments.taps
    require(
        offset_channels > 0 and offset_channels % (2 * taps) == 0,
        f"offset.shape[1] must be a positive multiple of 2 * {' * '.join(map(str, weight.shape[2:]))} = {2 * taps}, "
        f"got {offset_channels}",
    )
    offset_groups = offset_channels // (2 * taps)
    require(
        channels % offset_groups == 0,
        f"input's channels must be divisible by the {offset_groups} offset groups, got {channels}",
    )
    for name, tensor, expected in (("offset", offset, offset_channels), ("mask", mask, offset_groups * taps)):
        if tensor is not None:
            shape = (input.shape[0], expected, out_height, out_width)
            require(
                all(got == want for got, want in zip(tensor.shape, shape)),
                f"{name} must have shape {shape}, got {tuple(tensor.shape)}",
            )
    return out_height, out_width


def _fake(*args: Any) -> Tensor:
    arguments = Arguments(*args)
    return empty_output(arguments.input, arguments.weight.shape[0], check_arguments(arguments))


class _Sampling:
    """Where each tap samples, and what it finds there.

    Shapes: ``B`` batch, ``G`` offset groups, ``D`` channels of an offset group, ``K`` taps, ``P`` output pixels.
    """

    def __init__(
        self,
        input: Tensor,
        offset: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        batch, channels, height, width = input.shape
        out_height, out_width = offset.shape[2:]
        taps = kernel[0] * kernel[1]
        groups = offset.shape[1] // (2 * taps)

        def undisplaced(axis: int, length: int) -> Tensor:  # [k, length]
            i = torch.arange(kernel[axis], device=input.device, dtype=input.dtype) * dilation[axis] - padding[axis]
            p = torch.arange(length, device=input.device, dtype=input.dtype) * stride[axis]
            return i[:, None] + p

        offset = offset.reshape(batch, groups, kernel[0], kernel[1], 2, out_height, out_width)
        y = offset[:, :, :, :, 0] + undisplaced(0, out_height)[:, None, :, None]  # [B, G, kH, kW, Ho, Wo]
        x = offset[:, :, :, :, 1] + undisplaced(1, out_width)[:, None, :]
        shape = (batch, groups, 1, taps, out_height * out_width)
        y, x = y.reshape(shape), x.reshape(shape)  # [B, G, 1, K, P]

        # NaN fails the test, and the test comes before the conversion to an integer.
        self.inside = (y > -1) & (y < height) & (x > -1) & (x < width)
        # At exactly -1 a sample is zero while its derivative is not, so the corners have a range of their own.
        near = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
        y, x = y.where(near, -2), x.where(near, -2)
        top, left = y.floor(), x.floor()
        bottom_weight, right_weight = y - top, x - left
        self.weight_y = (1 - bottom_weight, bottom_weight)
        self.weight_x = (1 - right_weight, right_weight)
        self.rows = (top.long(), top.long() + 1)
        self.columns = (left.long(), left.long() + 1)
        self.image = input.reshape(batch, groups, channels // groups, height * width)
        self.height, self.width = height, width

    def corner(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        """Position in the flattened image of a corner, and whether it is in the image. [B, G, 1, K, P]"""
        row, column = self.rows[i], self.columns[j]
        exists = (row >= 0) & (row < self.height) & (column >= 0) & (column < self.width)
        position = row.clamp(0, self.height - 1) * self.width + column.clamp(0, self.width - 1)
        return position, exists

    def value(self, i: int, j: int) -> Tensor:
        """The input at a corner, zero outside the image (never 0 * value: that would keep NaN). [B, G, D, K, P]"""
        position, exists = self.corner(i, j)
        shape = (*self.image.shape[:3], *position.shape[3:])
        index = position.expand(shape).flatten(3)
        return self.image.gather(3, index).view(shape).where(exists, 0)

    def values(self) -> Tensor:
        """The bilinear interpolation, without mask. [B, G, D, K, P]"""
        (wy0, wy1), (wx0, wx1) = self.weight_y, self.weight_x
        value = (wy0 * wx0) * self.value(0, 0)
        value = value + (wy0 * wx1) * self.value(0, 1)
        value = value + (wy1 * wx0) * self.value(1, 0)
        value = value + (wy1 * wx1) * self.value(1, 1)
        return value.where(self.inside, 0)


def _decomposition(*args: Any) -> Tensor:
    input, offset, weight, bias, stride, padding, dilation, mask = arguments = Arguments(*args)
    out_height, out_width = check_arguments(arguments)
    dtype, memory_format = input.dtype, suggest_memory_format(input)
    input, offset, weight = (t.to(accumulate_dtype(dtype)) for t in (input, offset, weight))
    batch = input.shape[0]
    out_channels, group_channels, kernel_height, kernel_width = weight.shape
    groups, taps, pixels = arguments.groups, arguments.taps, out_height * out_width

    columns = _Sampling(input, offset, (kernel_height, kernel_width), stride, padding, dilation).values()
    if mask is not None:
        # [B, G, D, K, P]
        columns = columns * mask.to(columns.dtype).reshape(batch, arguments.offset_groups, 1, taps, pixels)
    columns = columns.reshape(batch, groups, group_channels * taps, pixels)
    filters = weight.reshape(groups, out_channels // groups, group_channels * taps)
    out = (filters @ columns).reshape(batch, out_channels, out_height, out_width)
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None, None]
    return out.to(dtype).contiguous(memory_format=memory_format)


def _check_backward(op: str, grad: Tensor, **arguments: Any) -> None:
    call = Arguments(**arguments)
    check_gradient(op, grad, call.input, (call.input.shape[0], int(call.weight.shape[0]), *check_arguments(call)))


def _backward(grad: Tensor, *args: Any, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of input, offset, weight, bias and mask.

    At the kinks of the interpolation, integer coordinates, the derivative by the offset is the one to the right, as in
    torchvision; at exactly -1 too, where the sample itself is still zero.
    """
    input, offset, weight, _bias, stride, padding, dilation, mask = arguments = Arguments(*args)
    dtype = accumulate_dtype(input.dtype)
    grad, input, offset, weight = (t.to(dtype) for t in (grad, input, offset, weight))
    batch = input.shape[0]
    out_channels, group_channels, kernel_height, kernel_width = weight.shape
    groups, taps, pixels = arguments.groups, arguments.taps, grad.shape[2] * grad.shape[3]
    sampling = _Sampling(input, offset, (kernel_height, kernel_width), stride, padding, dilation)
    values = sampling.values()  # [B, G, D, K, P]
    scale = torch.ones((), dtype=grad.dtype, device=grad.device)
    if mask is not None:
        scale = mask.to(grad.dtype).reshape(batch, arguments.offset_groups, 1, taps, pixels)  # [B, G, 1, K, P]

    grad = grad.reshape(batch, groups, out_channels // groups, pixels)
    filters = weight.reshape(groups, out_channels // groups, group_channels * taps)
    grad_columns = (filters.transpose(1, 2) @ grad).reshape(values.shape)  # [B, G, D, K, P]
    results: list[Tensor | None] = [None] * 5

    if wanted[0]:
        grad_image = torch.zeros_like(sampling.image)
        for i in (0, 1):
            for j in (0, 1):
                position, exists = sampling.corner(i, j)
                share = sampling.weight_y[i] * sampling.weight_x[j]
                reached = exists & sampling.inside & (share > 0)
                update = (grad_columns * scale * share).where(reached, 0)
                grad_image = grad_image.scatter_add(3, position.expand(update.shape).flatten(3), update.flatten(3))
        results[0] = grad_image
    if wanted[1]:
        v = [[sampling.value(i, j) for j in (0, 1)] for i in (0, 1)]
        (wy0, wy1), (wx0, wx1) = sampling.weight_y, sampling.weight_x
        slope_y = (v[1][0] - v[0][0]) * wx0 + (v[1][1] - v[0][1]) * wx1
        slope_x = (v[0][1] - v[0][0]) * wy0 + (v[1][1] - v[1][0]) * wy1
        slopes = [(grad_columns * scale * slope).sum(2) for slope in (slope_y, slope_x)]  # [B, G, K, P]
        results[1] = torch.stack(slopes, dim=3)
    if wanted[2]:
        columns = (values * scale).reshape(batch, groups, group_channels * taps, pixels)
        results[2] = (grad @ columns.transpose(2, 3)).sum(0)
    if wanted[3]:
        results[3] = grad.sum((0, 3))
    if wanted[4]:
        results[4] = (grad_columns * values).sum(2)
    return results


_op = define_op(
    "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] dilation, Tensor? mask) -> Tensor",
    decomposition=_decomposition,
    fake=_fake,
    gradient=Gradient(_backward, of="input, offset, weight, bias, mask", check=_check_backward),
    fold=as_one_batch("input", "offset", "mask"),
)


def _from_torchvision(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Arguments:
    stride, padding, dilation = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    return Arguments(input, offset, weight, bias, stride, padding, dilation, mask if use_mask else None)


@serves_torchvision("deform_conv2d")
def _torchvision(*args: Any) -> Tensor:
    return _op(*_from_torchvision(*args))


@serves_torchvision("_deform_conv2d_backward")
def _torchvision_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    arguments = _from_torchvision(*args)
    use_mask = arguments.mask is not None
    gradients = _op.backward(grad, *arguments, [True, True, True, True, use_mask])
    # torchvision's are contiguous, whatever the input is, and its fake kernel says so.
    grad_input, grad_offset, grad_weight, grad_bias, grad_mask = (gradient.contiguous() for gradient in gradients)
    if not use_mask:  # torchvision passes a stand-in of shape [B, 1] and wants its gradient
        _, _, _, stand_in, *_ = args
        grad_mask = torch.zeros_like(stand_in)
    return grad_input, grad_weight, grad_offset, grad_mask, grad_bias
