"""Stock convolutions for this package's own kernel, where a graph pass finds it faster than the library's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .convolution import check_convolution, check_dtypes, empty_output
from .registry import accumulate_dtype, check, define_op
from .transforms import as_one_batch


class Arguments(NamedTuple):
    """What the operator takes, in its order: as :func:`torch.nn.functional.conv2d`, whose groups follow from shapes."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    @property
    def groups(self) -> int:
        return int(self.input.shape[1]) // int(self.weight.shape[1])

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved by itself, with one filter."""
        return self.groups > 1 and self.groups == int(self.weight.shape[0])


def check_arguments(arguments: Arguments) -> tuple[int, int]:
    """Raise RuntimeError unless the arguments are compatible; return the output's height and width."""
    input, weight, bias, *geometry = arguments
    for name, tensor in (("input", input), ("weight", weight)):
        check("direct_conv2d", tensor.dim() == 4, f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
    check_dtypes("direct_conv2d", input, {"weight": weight, "bias": bias})
    return check_convolution("direct_conv2d", input, weight, bias, *geometry)


def _fake(*args: Any) -> Tensor:
    arguments = Arguments(*args)
    return empty_output(arguments.input, arguments.weight.shape[0], check_arguments(arguments))


def _decomposition(*args: Any) -> Tensor:
    arguments = Arguments(*args)
    size, dtype = check_arguments(arguments), accumulate_dtype(arguments.input.dtype)
    input, weight, bias, *geometry = arguments
    bias = None if bias is None else bias.to(dtype)
    out = torch.ops.aten.convolution(
        input.to(dtype), weight.to(dtype), bias, *geometry, False, [0, 0], arguments.groups
    )
    # The memory format is that of the input, which a library does not always have.
    like = empty_output(input, weight.shape[0], size)
    return out.to(input.dtype).contiguous(memory_format=torch._prims_common.suggest_memory_format(like))


direct_conv2d = define_op(
    "direct_conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation) "
    "-> Tensor",
    decomposition=_decomposition,
    fake=_fake,
    autocast="lower",  # as autocast runs a convolution
    fold=as_one_batch("input"),
)
