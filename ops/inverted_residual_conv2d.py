"""Inverted residual, the block that MobileNetV2 is built of, without its sum: https://arxiv.org/abs/1801.04381.

A graph pass puts it in the place of stock convolutions; it is no public function, and has no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import depthwise_separable_conv2d as separable
from .convolution import check_dtypes, empty_output
from .registry import OPS, accumulate_dtype, check, define_op
from .transforms import as_one_batch


class Arguments(NamedTuple):
    """What the operator takes, in its order: a pointwise convolution, and what ``depthwise_separable_conv2d`` takes."""

    input: Tensor
    expansion_weight: Tensor
    depthwise_weight: Tensor
    pointwise_weight: Tensor
    expansion_bias: Tensor | None
    depthwise_bias: Tensor | None
    pointwise_bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    expansion_activation: str
    activation: str

    @property
    def channels(self) -> int:
        """Those of the expanded input."""
        return int(self.expansion_weight.shape[0])

    def separable(self, expanded: Tensor) -> separable.Arguments:
        """The call that is left when the input was expanded."""
        weights = self.depthwise_weight, self.pointwise_weight, self.depthwise_bias, self.pointwise_bias
        return separable.Arguments(expanded, *weights, None, self.stride, self.padding, self.dilation, self.activation)

    def of_its_size(self) -> Tensor:
        """A view of the input that has the size of the expanded one."""
        return self.input[:, :1].expand(-1, self.channels, -1, -1)


def check_arguments(arguments: Arguments) -> tuple[int, int]:
    """Raise RuntimeError unless the arguments are compatible; return the output's height and width."""
    op = "inverted_residual_conv2d"
    require = functools.partial(check, op)
    input, weight, bias = arguments.input, arguments.expansion_weight, arguments.expansion_bias
    require(input.dim() == 4, f"input must have 4 dimensions, got shape {tuple(input.shape)}")
    channels = int(input.shape[1])
    require(
        channels > 0 and weight.dim() == 4 and tuple(weight.shape[1:]) == (channels, 1, 1) and weight.shape[0] > 0,
        f"expansion_weight must have shape [E, {channels}, 1, 1], got {tuple(weight.shape)}",
    )
    require(
        bias is None or tuple(bias.shape) == (arguments.channels,),
        f"expansion_bias must have shape ({arguments.channels},), got {None if bias is None else tuple(bias.shape)}",
    )
    check_dtypes(op, input, {"expansion_weight": weight, "expansion_bias": bias})
    activation = arguments.expansion_activation
    require(
        activation != separable.PRELU and separable.parse_activation(activation) is not None,
        f"expansion_activation must be an activation without a tensor, got {activation!r}",
    )
    return separable.check_arguments(arguments.separable(arguments.of_its_size()), op)


def _fake(*args: Any) -> Tensor:
    arguments = Arguments(*args)
    return empty_output(arguments.input, int(arguments.pointwise_weight.shape[0]), check_arguments(arguments))


def _decomposition(*args: Any) -> Tensor:
    call = Arguments(*args)
    check_arguments(call)
    dtype = accumulate_dtype(call.input.dtype)
    values: list[Any] = [value.to(dtype) if isinstance(value, Tensor) else value for value in call]
    a = Arguments(*values)
    activation = separable.parse_activation(a.expansion_activation)
    assert activation is not None  # which was checked
    expanded = activation(F.conv2d(a.input, a.expansion_weight, a.expansion_bias))  # [B, E, H, W]
    out = OPS["depthwise_separable_conv2d"].decomposition(*a.separable(expanded))
    return out.to(call.input.dtype).contiguous(memory_format=suggest_memory_format(call.input))


inverted_residual_conv2d = define_op(
    "inverted_residual_conv2d(Tensor input, Tensor expansion_weight, Tensor depthwise_weight, Tensor pointwise_weight, "
    "Tensor? expansion_bias, Tensor? depthwise_bias, Tensor? pointwise_bias, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] dilation, str expansion_activation, str activation) -> Tensor",
    family="depthwise_separable_conv2d",
    decomposition=_decomposition,
    fake=_fake,
    autocast="lower",  # as autocast runs the convolutions
    fold=as_one_batch("input"),
)
