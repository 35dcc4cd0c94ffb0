"""Samples of depthwise_separable_conv2d calls and an oracle, for the tests of what the operator means and of what it
compiles to.

A :class:`Case` says what a call looks like; :func:`sample` makes its tensors, always the same ones. ``CASES`` are the
calls that every implementation is tested on.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import assume, strategies as st
from inductor_vision import DepthwiseSeparableConv2d
from inductor_vision.tests.support import convolution
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.convolution import Pair, gradient_like as gradient_like  # for whoever makes samples
from inductor_vision.tests.support.layouts import LAYOUTS, arrange
from torch import Tensor, nn
from torch.nn.modules.utils import _pair


@dataclasses.dataclass(frozen=True)
class Case:
    """What a call looks like.

    Attributes:
        layout: memory layout of ``input``, one of ``LAYOUTS``.
        weight_layout: of the depthwise weight: ``"contiguous"``, ``"permuted"``, or ``"shared"``: one kernel, expanded
            to all channels.
        first, second: the activations.
    """

    batch: int = 2
    channels: int = 8
    out_channels: int = 6
    multiplier: int = 1
    size: tuple[int, int] = (7, 9)
    kernel: tuple[int, int] = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    biases: tuple[bool, bool] = (True, True)
    first: str | None = None
    second: str | None = None
    layout: str = "contiguous"
    weight_layout: str = "contiguous"

    @property
    def out_size(self) -> tuple[int, int]:
        return convolution.out_size(self)


TENSORS = ("input", "depthwise_weight", "pointwise_weight", "depthwise_bias", "pointwise_bias", "slope")


class Sample(convolution.Sample):
    """One call: ``depthwise_separable_conv2d(*args, **kwargs)``.

    Attributes:
        args: the tensors but the slope, in the order of ``TENSORS``.
        kwargs: geometry, activations and the slope.
    """

    names = TENSORS

    @property
    def positional(self) -> tuple[Any, ...]:
        return (*self.args, self.kwargs["slope"], *self.geometry, self.case.first or "identity")


def sample(case: str | Case, dtype: torch.dtype = torch.float32) -> Sample:
    """The call that a case, or the case of that name, describes. The values depend on the case alone."""
    name = case if isinstance(case, str) else "drawn"
    if isinstance(case, str):
        case = CASES[case]
    normal = convolution.normal_of(case, dtype)
    hidden, taps = case.channels * case.multiplier, math.prod(case.kernel)
    input = normal(case.batch, case.channels, *case.size)
    depthwise_weight = normal(hidden, 1, *case.kernel) * (3 / math.sqrt(taps))  # activations see all of their range
    pointwise_weight = normal(case.out_channels, hidden, 1, 1) / math.sqrt(hidden)
    depthwise_bias, pointwise_bias = normal(hidden), normal(case.out_channels)
    if case.weight_layout == "permuted":
        pointwise_weight = pointwise_weight.transpose(0, 1).contiguous().transpose(0, 1)
    args = (
        arrange(input, case.layout),
        convolution.arrange_weight(depthwise_weight, case.weight_layout),
        pointwise_weight,
        depthwise_bias if case.biases[0] else None,
        pointwise_bias if case.biases[1] else None,
    )
    kwargs = {
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "depthwise_activation": case.first,
        "pointwise_activation": case.second,
        "slope": torch.tensor([SLOPE], dtype=dtype) if case.first == "prelu" else None,
    }
    return Sample(name, case, args, kwargs)


def activate(text: str | None, x: Tensor, slope: Tensor | None = None) -> Tensor:
    """By the function of torch.nn.functional."""
    if text is None:
        return x
    if slope is not None:
        return F.prelu(x, slope)
    if text == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    name, _, parameters = text.removesuffix(")").partition("(")
    return getattr(F, name)(x, *(float(number) for number in parameters.split(",") if number))


SLOPE = 0.25  # of prelu

ACTIVATIONS: dict[str | None, Callable[[float], float]] = {
    None: lambda x: x,
    "relu": lambda x: x if x > 0 or x != x else 0.0,
    "relu6": lambda x: x if x != x else min(max(x, 0.0), 6.0),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "leaky_relu(0.3)": lambda x: x if x > 0 else 0.3 * x,
    "prelu": lambda x: x if x > 0 else SLOPE * x,
    "hardtanh": lambda x: x if x != x else min(max(x, -1.0), 1.0),
    "hardtanh(-0.5, 2)": lambda x: x if x != x else min(max(x, -0.5), 2.0),
    "elu": lambda x: math.expm1(x) if x <= 0 else x,
    "elu(0.3)": lambda x: 0.3 * math.expm1(x) if x <= 0 else x,
    "selu": lambda x: 1.0507009873554805 * (1.6732632423543772 * math.expm1(x) if x <= 0 else x),
    "celu": lambda x: math.expm1(x) if x <= 0 else x,
    "celu(0.5)": lambda x: 0.5 * math.expm1(x / 0.5) if x <= 0 else x,  # aten's gradient has 1 / alpha in float32
    "softplus": lambda x: x if x > 20 else math.log1p(math.exp(x)),
    "softplus(2, 1)": lambda x: x if 2 * x > 1 else math.log1p(math.exp(2 * x)) / 2,
    "softsign": lambda x: x / (1 + abs(x)),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if not x < -700 else 0.0,
    "tanh": math.tanh,
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(min(x, 700.0)))) if x == x else x,
    "hardsigmoid": lambda x: x if x != x else min(max(x + 3, 0.0), 6.0) / 6,
    "hardswish": lambda x: x * (x if x != x else min(max(x + 3, 0.0), 6.0)) / 6,
    "silu": lambda x: x / (1 + math.exp(-x)) if not x < -700 else x * 0.0,
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}

CASES = {
    "plain": Case(),
    **{f"then_{name}": Case(first=name) for name in ACTIVATIONS if name is not None},
    "both_activations": Case(first="relu6", second="relu"),
    "last_activation": Case(second="hardswish"),
    "no_biases": Case(biases=(False, False), first="relu"),
    "depthwise_bias": Case(biases=(True, False)),
    "pointwise_bias": Case(biases=(False, True)),
    "numbers": Case(stride=2, padding=2, dilation=2, first="relu"),
    "stride": Case(stride=(2, 1)),
    "stride_3x4": Case(stride=(3, 4), padding=(2, 0)),
    "no_padding": Case(padding=(0, 0)),
    "padding": Case(padding=(0, 3)),
    "padding_beyond_the_kernel": Case(padding=(5, 4), first="hardswish"),
    "dilation": Case(dilation=(3, 2), padding=(2, 3)),
    "stride_padding_dilation": Case(stride=(1, 2), padding=(3, 1), dilation=(2, 1)),
    "kernel_1x1": Case(kernel=(1, 1), padding=0),
    "kernel_5x5": Case(kernel=(5, 5), padding=2, first="silu"),
    "kernel_7x7": Case(kernel=(7, 7), padding=3),
    "kernel_2x3": Case(kernel=(2, 3), padding=(1, 2)),
    "kernel_3x2": Case(kernel=(3, 2), padding=(1, 0)),
    "kernel_1x4": Case(kernel=(1, 4), padding=(0, 2)),
    "channels_1_to_5": Case(channels=1, out_channels=5),
    "channels_3_to_16": Case(channels=3, out_channels=16),
    "channels_16_to_1": Case(channels=16, out_channels=1),
    "channels_17_to_8": Case(channels=17, out_channels=8, stride=(1, 3), first="relu"),
    "channels_37_to_19": Case(channels=37, out_channels=19, first="relu6"),
    "channels_64_to_40": Case(channels=64, out_channels=40, size=(5, 6)),
    "channels_520_to_5": Case(channels=520, out_channels=5, size=(4, 3), kernel=(2, 2), padding=(0, 1)),
    "channels_300_to_33": Case(batch=1, channels=300, out_channels=33, size=(4, 5), first="relu6"),
    "channels_4_to_130": Case(channels=4, out_channels=130, size=(4, 5)),
    "multiplier_2": Case(multiplier=2, first="relu"),
    "multiplier_3_of_5": Case(channels=5, multiplier=3, stride=2),
    "multiplier_8_of_1": Case(channels=1, multiplier=8, padding=0),
    "multiplier_channels_last": Case(channels=20, multiplier=2, layout="channels_last"),
    "empty_batch": Case(batch=0),
    "empty_batch_relu": Case(batch=0, first="relu", layout="channels_last"),
    "batch_1": Case(batch=1),
    "batch_5": Case(batch=5, size=(3, 4)),
    "one_output_pixel": Case(size=(3, 3), padding=0),
    "one_input_pixel": Case(size=(1, 1)),
    "one_row": Case(size=(1, 23)),
    "one_column": Case(size=(23, 1)),
    "width_28": Case(channels=3, size=(9, 28), first="relu6"),
    "width_130": Case(batch=1, channels=3, size=(5, 130), first="relu6"),
    "wide": Case(batch=1, channels=5, size=(3, 67)),
    "tall": Case(batch=1, channels=5, size=(67, 3)),
    **{f"input_{layout}": Case(channels=18, first="relu6", layout=layout) for layout in LAYOUTS[1:]},
    "strided_channels_last": Case(channels=37, stride=2, first="relu6", layout="channels_last"),
    "weights_permuted": Case(weight_layout="permuted"),
    "weight_shared": Case(channels=24, weight_layout="shared"),
    "weight_shared_channels_last": Case(channels=40, weight_layout="shared", layout="channels_last"),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small case, valid by construction but for kernels that do not fit."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    case = Case(
        batch=draw(st.integers(0, 3)),
        channels=draw(st.integers(1, 20)),
        out_channels=draw(st.integers(1, 20)),
        multiplier=draw(st.sampled_from([1, 1, 1, 2, 3])),
        size=pair(1, 8),
        kernel=pair(1, 4),
        stride=pair(1, 3),
        padding=pair(0, 3),
        dilation=pair(1, 3),
        biases=(draw(st.booleans()), draw(st.booleans())),
        first=draw(st.sampled_from(list(ACTIVATIONS))),
        second=draw(st.sampled_from([name for name in ACTIVATIONS if name != "prelu"])),
        layout=draw(st.sampled_from(LAYOUTS)),
        weight_layout=draw(st.sampled_from(["contiguous", "permuted", "shared"])),
    )
    assume(min(case.out_size) > 0)
    return case


@np.errstate(invalid="ignore")  # inf - inf and 0 * inf, in samples that have them
def oracle(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    depthwise_activation: str | None = None,
    pointwise_activation: str | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """depthwise_separable_conv2d in float64, one output pixel at a time; taps outside the image are not visited."""
    x, filters, mixing = (t.detach().double().numpy() for t in (input, depthwise_weight, pointwise_weight))
    between = np.zeros(len(filters)) if depthwise_bias is None else depthwise_bias.detach().double().numpy()
    last = np.zeros(len(mixing)) if pointwise_bias is None else pointwise_bias.detach().double().numpy()
    assert slope is None or slope.item() == SLOPE
    first_function, second_function = ACTIVATIONS[depthwise_activation], ACTIVATIONS[pointwise_activation]
    images, channels, height, width = x.shape
    hidden, _, kernel_height, kernel_width = filters.shape
    (stride_y, stride_x), (padding_y, padding_x), (dilation_y, dilation_x) = map(_pair, (stride, padding, dilation))
    out_height = (height + 2 * padding_y - dilation_y * (kernel_height - 1) - 1) // stride_y + 1
    out_width = (width + 2 * padding_x - dilation_x * (kernel_width - 1) - 1) // stride_x + 1

    out = np.zeros((images, len(mixing), out_height, out_width))
    for b, p, q in np.ndindex(images, out_height, out_width):
        middle = between.copy()
        for i, j in np.ndindex(kernel_height, kernel_width):
            row, column = p * stride_y - padding_y + i * dilation_y, q * stride_x - padding_x + j * dilation_x
            if 0 <= row < height and 0 <= column < width:
                for k in range(hidden):
                    middle[k] += filters[k, 0, i, j] * x[b, k * channels // hidden, row, column]
        middle = np.array([first_function(value) for value in middle.tolist()])
        for o in range(len(mixing)):
            out[b, o, p, q] = second_function(float(last[o] + (mixing[o, :, 0, 0] * middle).sum()))
    return torch.from_numpy(out)


class Network(nn.Module):
    """A block of each kind that has packed weights of its own, from 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = DepthwiseSeparableConv2d(16, 24, 3, padding=1, depthwise_activation="relu6")
        self.second = DepthwiseSeparableConv2d(
            16, 16, 3, 2, 1, channel_multiplier=2, bias=False, depthwise_activation="relu6"
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x).relu(), self.second(x)

    def assert_right(self, results: Sequence[Tensor], x: Tensor) -> None:
        with torch.no_grad():
            for result, expected in zip(results, copy.deepcopy(self).double()(x.double())):
                assert_close(result, expected, torch.float32, f"{tuple(x.shape)}")

    @staticmethod
    def image(*size: int) -> Tensor:
        """``[B, 16, H, W]`` of ``(B, H, W)``."""
        return torch.randn(size[0], 16, *size[1:], generator=torch.Generator().manual_seed(sum(size)))
