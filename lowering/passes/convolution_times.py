"""What computes a convolution fastest, by measurement: under ``torch._inductor.config.max_autotune``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx

from ..common.tuning import fastest
from ..inductor.codegen import compile_fx_inner, config, constant_fold
from ..inductor.tables import select_decomp_table
from .convolution_kernels import Choice, Convolution

_LIBRARY = "conv2d"


def fastest_choice(convolution: Convolution, choices: Sequence[Choice]) -> Choice | None:
    """The fastest of these; None if oneDNN's convolution is faster than all of them.

    All compute the same random data, channels_last, which is what Inductor makes of maps around convolutions.
    """
    by_name = {choice.name: choice for choice in choices}

    def prepare() -> Callable[[str], None]:
        with unset_fake_temporarily(), torch.no_grad(), torch._guards.tracing(None):
            calls = _calls(convolution, choices)

        def run(name: str) -> None:
            with unset_fake_temporarily(), torch.no_grad():
                calls[name]()

        return run

    candidates = [_LIBRARY, *by_name]
    # What was measured is remembered, and says nothing of others that may be chosen from elsewhere.
    return by_name.get(fastest(f"{convolution!r} by {sorted(candidates)}", candidates, prepare))


def _calls(convolution: Convolution, choices: Sequence[Choice]) -> dict[str, Callable[[], Tensor]]:
    """By name."""
    tensors = _tensors(convolution)
    compiled = {choice.name: _compiled(convolution, choice, *tensors) for choice in choices}
    return {_LIBRARY: _library(convolution, *tensors), **compiled}


def _tensors(convolution: Convolution) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias."""
    c = convolution
    axes = zip(c.size, c.kernel, c.stride, c.padding, c.dilation)
    size = (max(1, (n - 1) * stride + (k - 1) * dilation + 1 - 2 * padding) for n, k, stride, padding, dilation in axes)
    image = torch.randn(c.batch, c.channels, *size).to(c.dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(c.out_channels, c.channels // c.groups, *c.kernel).to(c.dtype)
    return image, weight, torch.randn(c.out_channels).to(c.dtype)


def _library(convolution: Convolution, image: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """What Inductor calls without this package; a constant weight was packed."""
    c = convolution
    geometry = list(c.padding), list(c.stride), list(c.dilation), c.groups
    if not (c.constant and torch.backends.mkldnn.is_available()):
        return lambda: torch.conv2d(image, weight, bias, c.stride, c.padding, c.dilation, c.groups)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(image.shape))
    return lambda: torch.ops.mkldnn._convolution_pointwise(image, packed, bias, *geometry, "none", [], "")


def _compiled(
    convolution: Convolution, choice: Choice, image: Tensor, weight: Tensor, bias: Tensor
) -> Callable[[], Tensor]:
    """A program by itself, its weight a constant if that is one."""
    inputs = [image] if convolution.constant else [image, weight, bias]

    def program(*inputs: Tensor) -> tuple[Tensor]:
        image, *given = inputs
        return (choice.program(image, *(given or (weight, bias))),)

    graph = make_fx(program, select_decomp_table())(*inputs)
    constant_fold(graph)
    with config.patch(max_autotune=False, cpp_wrapper=False, freezing=False):
        compiled = compile_fx_inner(graph, inputs)
    return lambda: compiled(list(inputs))[0]
