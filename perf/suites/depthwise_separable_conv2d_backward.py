"""The gradients of depthwise-separable convolution, alone and with the forward pass that belongs to them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.depthwise_separable_conv2d import Arguments, depthwise_separable_conv2d
from ...ops.registry import OPS
from .. import backends
from ..spec import Case, Contender, Job, Prepared, Suite
from . import depthwise_separable_conv2d as forward
from .depthwise_separable_conv2d import Shape


class Problem(NamedTuple):
    """A gradient of the result, and what the operator was called with.

    Attributes:
        step: whether the forward pass is timed too.
    """

    grad: Tensor
    arguments: Arguments
    step: bool


def _build(shape: Shape, step: bool) -> Problem:
    arguments = forward.build(shape)
    like = forward.reference(arguments)  # its shape
    grad = torch.randn(like.shape, generator=torch.Generator().manual_seed(1))
    return Problem(grad.to(shape.dtype), arguments, step)


def _reference(problem: Problem) -> list[Tensor]:
    """The decomposition in float64."""
    decomposition = OPS["depthwise_separable_conv2d_backward"].decomposition
    arguments = forward.map_tensors(problem.arguments, torch.Tensor.double)
    gradients = decomposition(problem.grad.double(), *arguments, [True] * 6)
    return [gradient for gradient, tensor in zip(gradients, arguments.tensors) if tensor is not None]


def _gradients(
    job: Job,
    function: Callable[..., Tensor] = depthwise_separable_conv2d,
    *,
    compiled: bool = True,
    channels_last: bool = False,
) -> Prepared:
    """By autograd, of a result that was computed before or is computed each time."""
    grad, a, step = job.inputs
    if channels_last:
        grad, a = grad.contiguous(memory_format=torch.channels_last), forward.channels_last(a)
    leaves = [tensor for tensor in a.tensors if tensor is not None]
    return backends.gradients(functools.partial(_call, function, a), leaves, grad, compile=compiled, step=step)


def _call(function: Callable[..., Tensor], a: Arguments, *tensors: Tensor) -> Tensor:
    return function(*tensors, a.stride, a.padding, a.dilation, depthwise_activation=a.activation)


_convolutions = functools.partial(_gradients, function=forward.two_convolutions)

_CONTENDERS = backends.with_triton(
    Contender("ours-compiled", "ours", _gradients, compiled=True),
    Contender("ours-channels-last", "ours", functools.partial(_gradients, channels_last=True), compiled=True),
    Contender("ours-eager", "ours", functools.partial(_gradients, compiled=False)),
    Contender("convolutions", "peer", functools.partial(_convolutions, compiled=False)),
    Contender(
        "convolutions-channels-last", "peer", functools.partial(_convolutions, compiled=False, channels_last=True)
    ),
    Contender("convolutions-compiled", "peer", _convolutions, compiled=True),
    Contender(
        "convolutions-compiled-channels-last",
        "peer",
        functools.partial(_convolutions, channels_last=True),
        compiled=True,
    ),
)

# SiLU has no kink, at which rounding would decide about a whole gradient.
_LARGE = Shape(64, 128, 224, activation="silu")
_SMALL = Shape(256, 512, 28, activation="silu")
_MOBILENET = Shape(96, 24, 112, stride=2, activation="silu")


def _case(name: str, shape: Shape, step: bool = False) -> Case:
    tolerance = 2e-5 if shape.dtype == torch.float32 else 2e-2
    description = f"{shape}, with the forward pass" if step else str(shape)
    return Case(name, description, functools.partial(_build, shape, step), tolerance)


_vary = dataclasses.replace

SUITE = Suite(
    name="depthwise_separable_conv2d_backward",
    description="depthwise and pointwise convolution with SiLU between, 3x3, all gradients",
    reference=_reference,
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
