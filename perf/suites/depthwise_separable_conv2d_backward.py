"""The gradients of depthwise-separable convolution, alone and with the forward pass that belongs to them."""

from __future__ import annotations

import dataclasses
import functools

import torch

from ...ops.registry import OPS
from .. import backends, convolutions
from ..convolutions import Problem
from ..spec import Case, Contender, Suite
from . import depthwise_separable_conv2d as forward
from .depthwise_separable_conv2d import Shape


def _build(shape: Shape, step: bool = False) -> Problem:
    arguments = forward.build(shape)
    result = OPS["depthwise_separable_conv2d"].decomposition(*arguments)
    return convolutions.with_gradient(arguments, result.shape, step)


def _channels_last(problem: Problem) -> Problem:
    grad = problem.grad.contiguous(memory_format=torch.channels_last)
    return problem._replace(grad=grad, arguments=forward.channels_last(problem.arguments))


_ours = functools.partial(convolutions.gradients, function=forward.one_operator)

_CONTENDERS = backends.with_triton(
    Contender("ours-compiled", "ours", _ours, compiled=True),
    Contender("ours-channels-last", "ours", functools.partial(_ours, change=_channels_last), compiled=True),
    Contender("ours-eager", "ours", functools.partial(_ours, compiled=False)),
    *convolutions.stock_gradients("convolutions", forward.two_convolutions, _channels_last),
)

# SiLU has no kink, at which rounding would decide about a whole gradient.
_LARGE = Shape(64, 128, 224, activation="silu")
_SMALL = Shape(256, 512, 28, activation="silu")
_MOBILENET = Shape(96, 24, 112, stride=2, activation="silu")


_vary = dataclasses.replace


def _case(name: str, shape: Shape, step: bool = False) -> Case:
    build = functools.partial(_build, step=step)
    return convolutions.case(build, name, shape, note=", with the forward pass" if step else "", tolerance=2e-5)


SUITE = Suite(
    name="depthwise_separable_conv2d_backward",
    description="depthwise and pointwise convolution with SiLU between, 3x3, all gradients",
    remark="SiLU has no kink, at which rounding would decide about a whole gradient.",
    reference=functools.partial(convolutions.reference_gradients, "depthwise_separable_conv2d"),
    contenders=_CONTENDERS,
    cases=(
        _case("224-b1", _LARGE),
        _case("28-b1", _SMALL),
        _case("28-b8", _vary(_SMALL, batch=8)),
        _case("mobilenet-96-112-stride2-b8", _vary(_MOBILENET, batch=8)),
        _case("224-b1-step", _LARGE, step=True),
        _case("28-b8-step", _vary(_SMALL, batch=8), step=True),
        _case("mobilenet-96-112-stride2-b8-step", _vary(_MOBILENET, batch=8), step=True),
        _case("28-b1-bf16", _vary(_SMALL, dtype=torch.bfloat16)),
    ),
)
