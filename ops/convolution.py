"""What the convolutions of this package have in common: sizes, memory formats, and checks of arguments."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .registry import check

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Height or width of a convolution's output."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def empty_output(input: Tensor, out_channels: int, size: Sequence[int]) -> Tensor:
    """Shape and memory format of the result."""
    out = input.new_empty((input.shape[0], out_channels, *size))
    return out.contiguous(memory_format=suggest_memory_format(input))


def check_dtypes(op: str, input: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Raise RuntimeError unless all tensors are of one floating dtype and on one device."""
    check(
        op,
        input.dtype in FLOAT_DTYPES,
        f"input must be one of {', '.join(map(str, FLOAT_DTYPES))}, got {input.dtype}",
    )
    for name, tensor in others.items():
        if tensor is not None:
            check(op, tensor.dtype == input.dtype, f"{name} must have input's dtype {input.dtype}, got {tensor.dtype}")
            check(
                op,
                tensor.device == input.device,
                f"{name} must be on input's device {input.device}, got {tensor.device}",
            )


def check_geometry(op: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    """Raise RuntimeError unless each is a pair of numbers in its range."""
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        check(op, len(pair) == 2, f"{name} must be a number or a pair, got {tuple(pair)}")
        check(op, min(pair) >= least, f"{name} must be at least {least}, got {tuple(pair)}")


def check_size(
    op: str,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Height and width of a convolution's output; raises RuntimeError unless there are both input and output."""
    sizes = input.shape[-2:]
    check(
        op,
        sizes[0] > 0 and sizes[1] > 0,
        f"input must have a positive height and width, got shape {tuple(input.shape)}",
    )
    height, width = (output_size(*axis) for axis in zip(sizes, kernel, stride, padding, dilation))
    check(
        op,
        height > 0 and width > 0,
        f"the kernel does not fit into the padded input: the output would be {height} x {width}",
    )
    return height, width


def check_convolution(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Raise RuntimeError unless input, ``[..., C, H, W]``, can be convolved so; the output's height and width."""
    require = functools.partial(check, op)
    check_geometry(op, stride, padding, dilation)
    # Numbers of images and their size may be dynamic. The rest is what an operator is: int() makes it a constant.
    channels = int(input.shape[-3])
    out_channels, group_channels, *kernel = map(int, weight.shape)
    require(
        out_channels > 0 and group_channels > 0 and kernel[0] * kernel[1] > 0,
        f"weight must not be empty, got shape {tuple(weight.shape)}",
    )
    require(
        channels > 0 and channels % group_channels == 0,
        f"input's channels must be a positive multiple of weight.shape[1] = {group_channels}, got {channels}",
    )
    groups = channels // group_channels
    require(
        out_channels % groups == 0,
        f"weight.shape[0] must be divisible by groups = {channels} // {group_channels} = {groups}, got {out_channels}",
    )
    require(
        bias is None or tuple(bias.shape) == (out_channels,),
        f"bias must have shape ({out_channels},), got {None if bias is None else tuple(bias.shape)}",
    )
    return check_size(op, input, kernel, stride, padding, dilation)


def check_gradient(op: str, grad: Tensor, input: Tensor, shape: Sequence[Any]) -> None:
    """Raise RuntimeError unless the gradient is that of an output of this shape of the operator."""
    check(
        f"{op}_backward",
        grad.dim() == len(shape) and all(got == want for got, want in zip(grad.shape, shape)),
        f"grad must have shape {tuple(shape)}, got {tuple(grad.shape)}",
    )
    check_dtypes(f"{op}_backward", input, {"grad": grad})
