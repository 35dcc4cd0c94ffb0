"""The gradients of convolution of many small patches: of input, weight and bias."""

from __future__ import annotations

import dataclasses
import functools

import torch

from ...ops.patch_conv2d import CHANNELS_LAST, arranged
from ...ops.registry import OPS
from .. import backends, convolutions
from ..convolutions import Problem
from ..spec import Contender, Suite
from . import patch_conv2d as forward
from .patch_conv2d import S4, S8, Shape


def _build(shape: Shape) -> Problem:
    arguments = forward.build(shape)
    return convolutions.with_gradient(arguments, OPS["patch_conv2d"].decomposition(*arguments).shape)


def _channels_last(problem: Problem) -> Problem:
    grad, arguments = arranged(problem.grad, CHANNELS_LAST), forward.in_order(CHANNELS_LAST, problem.arguments)
    return problem._replace(grad=grad, arguments=arguments)


def _as_channels_last_models(problem: Problem) -> Problem:
    grad, arguments = arranged(problem.grad, CHANNELS_LAST), forward.as_channels_last_models(problem.arguments)
    return problem._replace(grad=grad, arguments=arguments)


_ours = functools.partial(convolutions.gradients, function=forward.patch_conv2d)

_CONTENDERS = backends.with_triton(
    Contender("ours-compiled", "ours", _ours, compiled=True),
    Contender("ours-channels-last", "ours", functools.partial(_ours, change=_channels_last), compiled=True),
    *convolutions.stock_gradients("conv2d", forward.conv2d_of_the_batch, _as_channels_last_models),
)

# The gradient of the weight is a sum over all pixels of all patches.
_case = functools.partial(convolutions.case, _build, tolerance=1e-4)
_vary = dataclasses.replace

SUITE = Suite(
    name="patch_conv2d_backward",
    description="convolution of many small patches, 3x3, all gradients",
    reference=functools.partial(convolutions.reference_gradients, "patch_conv2d"),
    contenders=_CONTENDERS,
    cases=(
        _case("4x4", S4),
        _case("8x8", S8),
        _case("16x16", Shape(1280, 16)),
        _case("8x8-stride2", _vary(S8, stride=2)),
        _case("4x4-bf16", _vary(S4, dtype=torch.bfloat16)),
    ),
)
