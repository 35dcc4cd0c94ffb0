"""The gradients of deformable convolution, version 2: of input, offset, weight, bias and mask, all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops.deform_conv2d import Arguments
from ...ops.registry import OPS
from .. import backends, convolutions
from ..convolutions import Problem, as_it_is
from ..spec import Contender, Job, Prepared, Suite
from . import deform_conv2d as forward
from .deform_conv2d import Shape

_OP = OPS["deform_conv2d_backward"]
_WANTED = [True] * 5


def _build(shape: Shape) -> Problem:
    arguments = forward.build(shape)
    batch, _, *size = arguments.offset.shape
    return convolutions.with_gradient(arguments, (batch, arguments.weight.shape[0], *size))


def _reference(problem: Problem) -> list[Tensor]:
    """The decomposition in float64, image by image because it takes many times the memory of its input."""
    grad, a = problem.grad.double(), convolutions.map_tensors(problem.arguments, Tensor.double)
    results = []
    for i in range(grad.shape[0]):
        image = slice(i, i + 1)
        arguments = a._replace(input=a.input[image], offset=a.offset[image], mask=a.mask[image])
        results.append(_OP.decomposition(grad[image], *arguments, _WANTED))
    input, offset, weight, bias, mask = zip(*results)
    return [torch.cat(input), torch.cat(offset), sum(weight), sum(bias), torch.cat(mask)]


def _call(op: Callable[..., Any], arguments: Arguments, *tensors: Tensor) -> Any:
    grad, input, offset, weight, bias, mask = tensors
    geometry = arguments.stride, arguments.padding, arguments.dilation
    return op(grad, input, offset, weight, bias, *geometry, mask, _WANTED)


def _compiled(
    job: Job,
    op: Callable[..., Any] = _OP,
    change: Callable[[Problem], Problem] = as_it_is,
    dynamic: bool = False,
) -> Prepared:
    grad, a, _ = change(job.inputs)
    function = backends.Function(functools.partial(_call, op, a))
    tensors = grad, a.input, a.offset, a.weight, a.bias, a.mask
    return backends.compiled(function, tensors, dynamic=dynamic, freezing=False)


def _channels_last(problem: Problem) -> Problem:
    """Put images, their gradients and the weight into channels_last, as such models do; not offsets and masks."""
    grad = problem.grad.contiguous(memory_format=torch.channels_last)
    return problem._replace(grad=grad, arguments=convolutions.channels_last(problem.arguments, "input", "weight"))


def _torchvision(job: Job) -> Prepared:
    backends.only_float32(job.inputs.grad.dtype, "torchvision")
    grad, a, _ = job.inputs
    geometry = *a.stride, *a.padding, *a.dilation, a.groups, a.offset_groups, True
    tensors = grad, a.input, a.weight, a.offset, a.mask, a.bias

    def gradients(*tensors: Tensor) -> list[Tensor]:
        input, weight, offset, mask, bias = torch.ops.torchvision._deform_conv2d_backward(*tensors, *geometry)
        return [input, offset, weight, bias, mask]

    return backends.eager(gradients, tensors)


def _conv2d(job: Job, change: Callable[[Problem], Problem] = as_it_is) -> Prepared:
    """oneDNN's gradients of input, weight and bias of a convolution of the same shape."""
    grad, a, _ = change(job.inputs)
    geometry = a.stride, a.padding, a.dilation, False, [0, 0], a.groups, [True, True, True]
    tensors = grad, a.input, a.weight, [a.weight.shape[0]]
    return backends.eager(torch.ops.aten.convolution_backward, (*tensors, *geometry))


_CONTENDERS = backends.with_triton(
    Contender("ours-compiled", "ours", _compiled, compiled=True),
    Contender("ours-channels-last", "ours", functools.partial(_compiled, change=_channels_last), compiled=True),
    Contender("ours-dynamic", "ours", functools.partial(_compiled, dynamic=True), compiled=True, default=False),
    Contender("ours-1-thread", "ours", _compiled, compiled=True, threads=1, default=False),
    Contender("decomposition-compiled", "peer", functools.partial(_compiled, op=_OP.decomposition), compiled=True),
    Contender("torchvision", "peer", _torchvision, check=backends.needs_torchvision),
    Contender("conv2d", "limit", _conv2d),
    Contender("conv2d-channels-last", "limit", functools.partial(_conv2d, change=_channels_last)),
)


_case = functools.partial(convolutions.case, _build, tolerance=2e-5)
_S32 = Shape(64, 32)
_S64 = Shape(256, 64)
_DEPTHWISE = Shape(512, 32, groups=512)
_LIMITS = ("conv2d", "conv2d-channels-last")

SUITE = Suite(
    name="deform_conv2d_backward",
    description="deformable convolution with mask and bias, 3x3 with padding 1 unless said otherwise, all gradients",
    reference=_reference,
    contenders=_CONTENDERS,
    cases=(
        _case("s32-b1", _S32),
        _case("s32-b8", Shape(64, 32, batch=8)),
        _case("s64-b1", _S64),
        _case("s64-b4", Shape(256, 64, batch=4)),
        _case("depthwise-512-32-b1", _DEPTHWISE),
        _case("depthwise-512-16-b16", Shape(512, 16, batch=16, groups=512)),
        _case("s64-b1-bf16", Shape(256, 64, dtype=torch.bfloat16), "ours-compiled", "decomposition-compiled", *_LIMITS),
        _case("s64-b1-dynamic", _S64, "ours-compiled", "ours-dynamic", *_LIMITS, note=", dynamic shapes"),
        _case("s64-b1-threads", _S64, "ours-compiled", "ours-1-thread", *_LIMITS, note=", 1 thread against all"),
        _case("small-16-16-b64", Shape(16, 16, batch=64), note=", as small networks have it"),
        _case("odd-stride2", Shape(64, 64, stride=2)),
        _case("odd-1x1", Shape(128, 32, kernel=1)),
        _case("odd-5x5", Shape(64, 32, kernel=5)),
        _case("odd-37-channels", Shape(37, 32)),
        _case("odd-groups8", Shape(64, 32, groups=8)),
        _case("odd-offset-groups4", Shape(64, 32, offset_groups=4)),
    ),
)
