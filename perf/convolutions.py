"""What the suites of convolutions share: shapes, layers that hold weights, gradients, and ONNX's and OpenVINO's terms.

What an operator takes is a NamedTuple in its module in ``ops/``, tensors with a gradient first; contenders are
functions of what is in it, in its order.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.registry import OPS
from . import backends
from .spec import Case, Contender, Job, Prepared

TOLERANCE, BFLOAT16_TOLERANCE = 1e-5, 2e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What a layer's kernel and input have besides their sizes, which a suite's own class adds."""

    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def padding(self) -> int:
        """So that nothing is lost at the border."""
        return self.dilation * (self.kernel - 1) // 2

    def describe(self, sizes: str, *more: str) -> str:
        """The sizes, what else is not as usual, and what a suite adds to it."""
        kernel = [f"{self.kernel}x{self.kernel} kernel"] if self.kernel != 3 else []
        dtype = [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []
        return ", ".join([sizes, *kernel, *self.unusual("stride", "dilation"), *more, *dtype])

    def unusual(self, *names: str) -> list[str]:
        """Describe those of these attributes that are not 1."""
        return [f"{name.replace('_', ' ')} {getattr(self, name)}" for name in names if getattr(self, name) != 1]


class Problem(NamedTuple):
    """A problem of the suites of gradients: the result's gradient, and what the operator was called with.

    Attributes:
        step: whether the forward pass is timed too.
    """

    grad: Tensor
    arguments: Any
    step: bool = False


def case(
    build: Callable[[Any], Any],
    name: str,
    shape: Shape,
    *contenders: str,
    note: str = "",
    tolerance: float = TOLERANCE,
) -> Case:
    """A case of a suite; ``contenders`` are names, none for the suite's defaults; ``tolerance`` is that of float32."""
    tolerance = tolerance if shape.dtype == torch.float32 else BFLOAT16_TOLERANCE
    return Case(name, f"{shape}{note}", functools.partial(build, shape), tolerance, contenders)


def map_tensors(arguments: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change all tensors."""
    return arguments._make(change(value) if isinstance(value, Tensor) else value for value in arguments)


def channels_last(arguments: Any, *names: str) -> Any:
    """Put these tensors into that memory format."""
    return arguments._replace(
        **{name: getattr(arguments, name).contiguous(memory_format=torch.channels_last) for name in names}
    )


def with_gradient(arguments: Any, shape: Sequence[int], step: bool = False) -> Problem:
    """Add the gradient of a result of this shape; the same values at every call."""
    grad = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return Problem(grad.to(arguments.input.dtype), arguments, step)


def reference(operator: str, arguments: Any) -> Tensor:
    """The decomposition in float64."""
    return OPS[operator].decomposition(*map_tensors(arguments, Tensor.double))


def reference_gradients(operator: str, problem: Problem) -> list[Tensor]:
    """All of them: the decomposition in float64."""
    arguments = map_tensors(problem.arguments, Tensor.double)
    tensors = _differentiable(arguments)
    gradients = OPS[operator].backward.decomposition(problem.grad.double(), *arguments, [True] * len(tensors))
    return [gradient for gradient, tensor in zip(gradients, tensors) if tensor is not None]


def _differentiable(arguments: Any) -> list[Tensor | None]:
    """What has a gradient: the tensors before all else."""
    return list(itertools.takewhile(lambda value: value is None or isinstance(value, Tensor), arguments))


def as_it_is(arguments: Any) -> Any:
    return arguments


@dataclasses.dataclass(frozen=True)
class Layer:
    """A function of a suite's arguments as models call it.

    Attributes:
        held: indices of the arguments that belong to the model, weights and biases.
        change: of the arguments, to another memory format or dtype.
    """

    function: Callable[..., Any]
    held: tuple[int, ...]
    change: Callable[[Any], Any] = as_it_is

    def eager(self, job: Job) -> Prepared:
        return backends.eager(*self._module_and_inputs(job))

    def compiled(self, job: Job, dynamic: bool | None = None) -> Prepared:
        return backends.compiled(*self._module_and_inputs(job), dynamic=dynamic)

    def packaged(self, job: Job) -> Prepared:
        return backends.packaged(*self._module_and_inputs(job))

    def _module_and_inputs(self, job: Job) -> tuple[backends.Holding, list[Tensor]]:
        module = backends.Holding(self.function, self.change(job.inputs), self.held)
        return module, module.inputs_among(self.change(job.inputs))


def ours(layer: Layer, channels_last: Callable[[Any], Any]) -> tuple[Contender, ...]:
    """This package's operator in a suite of inference; ``channels_last`` puts the arguments into that memory format."""
    dynamic, last = functools.partial(layer.compiled, dynamic=True), dataclasses.replace(layer, change=channels_last)
    return (
        Contender("ours-compiled", "ours", layer.compiled, compiled=True),
        Contender("ours-aoti", "ours", layer.packaged, compiled=True),
        Contender("ours-channels-last", "ours", last.compiled, compiled=True),
        Contender("ours-dynamic", "ours", dynamic, compiled=True, default=False),
        Contender("ours-1-thread", "ours", layer.compiled, compiled=True, threads=1, default=False),
    )


def stock(name: str, layer: Layer, channels_last: Callable[[Any], Any]) -> tuple[Contender, ...]:
    """PyTorch's own layers on the same problem: eager and compiled, in both memory formats."""
    last = dataclasses.replace(layer, change=channels_last)
    return (
        Contender(name, "peer", layer.eager),
        Contender(f"{name}-channels-last", "peer", last.eager),
        Contender(f"{name}-compiled", "peer", layer.compiled, compiled=True),
        Contender(f"{name}-compiled-channels-last", "peer", last.compiled, compiled=True),
    )


def gradients(
    job: Job,
    function: Callable[..., Tensor],
    *,
    compiled: bool = True,
    change: Callable[[Problem], Problem] = as_it_is,
) -> Prepared:
    """Have autograd compute the gradients of a result that was computed before or, in a step, is computed each time."""
    grad, arguments, step = change(job.inputs)
    leaves = [tensor for tensor in _differentiable(arguments) if tensor is not None]
    call = functools.partial(_with_leaves, function, arguments)
    return backends.gradients(call, leaves, grad, compile=compiled, step=step)


def _with_leaves(function: Callable[..., Tensor], arguments: Any, *leaves: Tensor) -> Tensor:
    return function(*leaves, *arguments[len(leaves) :])


def stock_gradients(
    name: str, function: Callable[..., Tensor], channels_last: Callable[[Problem], Problem]
) -> tuple[Contender, ...]:
    """The gradients of PyTorch's own layers, as in :func:`stock`."""
    eager, compiled = (functools.partial(gradients, function=function, compiled=which) for which in (False, True))
    last = {"change": channels_last}
    return (
        Contender(name, "peer", eager),
        Contender(f"{name}-channels-last", "peer", functools.partial(eager, **last)),
        Contender(f"{name}-compiled", "peer", compiled, compiled=True),
        Contender(f"{name}-compiled-channels-last", "peer", functools.partial(compiled, **last), compiled=True),
    )


def onnx_geometry(arguments: Any, kernel: Sequence[int], groups: int) -> dict[str, Any]:
    """The attributes of an ONNX node that is a convolution."""
    return {
        "kernel_shape": tuple(kernel),
        "strides": tuple(arguments.stride),
        "pads": (*arguments.padding, *arguments.padding),  # at the beginning, at the end
        "dilations": tuple(arguments.dilation),
        "group": groups,
    }


def openvino_geometry(arguments: Any) -> list[list[int]]:
    """Strides, padding at the beginning and at the end, and dilations, as OpenVINO's functions take them."""
    a = arguments
    return [list(pair) for pair in (a.stride, a.padding, a.padding, a.dilation)]


def openvino_constant(tensor: Tensor) -> Any:
    """A constant in float32: a model's precision says what it is computed in."""
    from openvino import opset8

    return opset8.constant(tensor.float().numpy())


def openvino_biased(convolution: Any, bias: Tensor) -> Any:
    """Add a bias for each channel."""
    from openvino import opset8

    return opset8.add(convolution, openvino_constant(bias[:, None, None]))
