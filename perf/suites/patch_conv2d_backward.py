"""The gradients of convolution of many small patches: of input, weight and bias."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.patch_conv2d import CHANNELS_LAST, Arguments, arranged, patch_conv2d
from ...ops.registry import OPS
from .. import backends
from ..spec import Case, Contender, Job, Prepared, Suite
from . import patch_conv2d as forward
from .patch_conv2d import S4, S8, Shape


class Problem(NamedTuple):
    """A gradient of the result, and what the operator was called with."""

    grad: Tensor
    arguments: Arguments


def _build(shape: Shape) -> Problem:
    arguments = forward.build(shape)
    like = OPS["patch_conv2d"].decomposition(*arguments)
    return Problem(torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(shape.dtype), arguments)


def _reference(problem: Problem) -> list[Tensor]:
    """The decomposition in float64."""
    decomposition = OPS["patch_conv2d_backward"].decomposition
    arguments = forward.map_tensors(problem.arguments, torch.Tensor.double)
    return list(decomposition(problem.grad.double(), *arguments, [True] * 3))


def _gradients(
    job: Job,
    function: Callable[..., Tensor] = patch_conv2d,
    *,
    compiled: bool = True,
    order: tuple[int, ...] | None = None,
) -> Prepared:
    """By autograd, of a result that was computed before. ``order`` is that of input and gradient."""
    grad, a = job.inputs
    if order is not None:
        grad, a = arranged(grad, order), forward.in_order(a, order)
        if order == CHANNELS_LAST and function is not patch_conv2d:
            a = a._replace(weight=a.weight.contiguous(memory_format=torch.channels_last))
    return backends.gradients(functools.partial(_call, function, a), a.tensors, grad, compile=compiled)


def _call(function: Callable[..., Tensor], a: Arguments, *tensors: Tensor) -> Tensor:
    return function(*tensors, a.stride, a.padding, a.dilation, a.groups)


_conv2d = functools.partial(_gradients, function=forward.conv2d_of_the_batch)

_CONTENDERS = backends.with_triton(
    Contender("ours-compiled", "ours", _gradients, compiled=True),
    Contender("ours-channels-last", "ours", functools.partial(_gradients, order=CHANNELS_LAST), compiled=True),
    Contender("conv2d", "peer", functools.partial(_conv2d, compiled=False)),
    Contender("conv2d-channels-last", "peer", functools.partial(_conv2d, compiled=False, order=CHANNELS_LAST)),
    Contender("conv2d-compiled", "peer", _conv2d, compiled=True),
    Contender("conv2d-compiled-channels-last", "peer", functools.partial(_conv2d, order=CHANNELS_LAST), compiled=True),
)

_vary = dataclasses.replace


def _case(name: str, shape: Shape) -> Case:
    # The gradient of the weight is a sum over all pixels of all patches.
    tolerance = 1e-4 if shape.dtype == torch.float32 else 2e-2
    return Case(name, str(shape), functools.partial(_build, shape), tolerance)


SUITE = Suite(
    name="patch_conv2d_backward",
    description="convolution of many small patches, 3x3, all gradients",
    reference=_reference,
    contenders=_CONTENDERS,
    cases=(
        _case("4x4", S4),
        _case("8x8", S8),
        _case("16x16", Shape(1280, 16)),
        _case("8x8-stride2", _vary(S8, stride=2)),
        _case("4x4-bf16", _vary(S4, dtype=torch.bfloat16)),
    ),
)
