"""Whole training steps: one deformable layer forward and backward, and the network of ``examples/train.py``.

What a step saves between its forward and its backward pass shows in the memory it takes: this package's operator saves
what went in and samples again; autograd, left to differentiate the aten program, saves what its partitioner chooses.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.deform_conv2d import Arguments, DeformConv2d, deform_conv2d
from ...ops.registry import OPS
from .. import backends
from ..convolutions import map_tensors
from ..spec import Case, Contender, Job, Prepared, Suite
from . import deform_conv2d as forward
from .deform_conv2d import Shape

# Only a checkout has it; without it there is no such case.
_EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "train.py"


@functools.cache
def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inductor_vision_example_train", _EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


# One layer: the gradients of its tensors, by default all of them, by the sum of the squares of its result.


def _layer(
    function: Callable[..., Tensor],
    arguments: Arguments,
    names: Sequence[str] = ("input", "offset", "weight", "bias", "mask"),
) -> Callable[[], list[Tensor]]:
    leaves = map_tensors(arguments, lambda tensor: tensor.clone().requires_grad_())
    wanted = [getattr(leaves, name) for name in names]

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(function(*leaves).square().sum(), wanted))

    return step


def _conv2d(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
    stride, padding, dilation, _ = rest
    return F.conv2d(input, weight, bias, stride, padding, dilation, input.shape[1] // weight.shape[1])


def _torchvision_function(*arguments: Any) -> Tensor:
    from torchvision.ops import deform_conv2d as theirs

    return theirs(*arguments)


# The example's network: the gradients of all parameters, then a step of the optimizer.


def _network(
    data: tuple[Tensor, Tensor], deform_conv: type[nn.Module], compiled: bool, dtype: torch.dtype = torch.float32
) -> Callable[[], list[Tensor]]:
    example = _example()
    network = example.make_network("deformable", deform_conv).to(dtype)
    optimizer = example.make_optimizer(network)
    run = torch.compile(network, fullgraph=True, dynamic=False) if compiled else network
    pictures, labels = data[0].to(dtype), data[1]

    def step() -> list[Tensor]:
        example.training_step(run, optimizer, pictures, labels)
        return [parameter.grad for parameter in network.parameters()]

    return step


def _digits() -> tuple[Tensor, Tensor]:
    example = _example()
    random = torch.Generator().manual_seed(0)
    return next(example.load_data().batches(random))


def _step(job: Job, kind: str) -> Callable[[], Any]:
    if isinstance(job.inputs, Arguments):
        functions: dict[str, Callable[..., Tensor]] = {
            "ours": deform_conv2d,
            "decomposition": OPS["deform_conv2d"].decomposition,
            "torchvision": _torchvision_function,
            "conv2d": _conv2d,
        }
        function = functions[kind]
        if kind in ("ours", "decomposition"):
            function = torch.compile(function, fullgraph=True, dynamic=False)
        if kind == "conv2d":
            return _layer(function, job.inputs, ("input", "weight", "bias"))
        return _layer(function, job.inputs)
    if kind.startswith("torchvision"):
        from torchvision.ops import DeformConv2d as theirs

        return _network(job.inputs, theirs, compiled=kind == "torchvision-compiled")
    return _network(job.inputs, DeformConv2d, compiled=True)


def _prepare(job: Job, kind: str) -> Prepared:
    torch._dynamo.reset()  # contenders share code objects, and would be one function with several graphs
    step = _step(job, kind)
    return Prepared(step, [gradient.clone() for gradient in step()])


def _reference(inputs: Any) -> Sequence[Tensor]:
    """The step in float64, by the decomposition."""
    if isinstance(inputs, Arguments):
        return _layer(deform_conv2d, map_tensors(inputs, Tensor.double))()
    return _network(inputs, DeformConv2d, compiled=False, dtype=torch.float64)()


def _contender(name: str, role: str, kind: str, **options: Any) -> Contender:
    return Contender(name, role, functools.partial(_prepare, kind=kind), **options)


_LAYER = ("ours-compiled", "decomposition-compiled", "torchvision", "conv2d")
_NETWORK = ("ours-compiled", "torchvision", "torchvision-compiled")


def _layer_case(name: str, shape: Shape) -> Case:
    return Case(name, f"a layer forward and backward, {shape}", functools.partial(forward.build, shape), 2e-5, _LAYER)


_DIGITS = Case("digits", "examples/train.py: deformable network, batch 64, optimizer", _digits, 1e-3, _NETWORK)

SUITE = Suite(
    name="training",
    description="whole training steps, with all gradients",
    reference=_reference,
    contenders=(
        _contender("ours-compiled", "ours", "ours", compiled=True),
        _contender("decomposition-compiled", "peer", "decomposition", compiled=True),
        _contender("torchvision", "peer", "torchvision", check=backends.needs_torchvision),
        # The rest of the network is compiled, and torchvision's operator called as it is.
        _contender(
            "torchvision-compiled", "peer", "torchvision-compiled", check=backends.needs_torchvision, compiled=True
        ),
        _contender("conv2d", "limit", "conv2d"),
    ),
    cases=(
        _layer_case("s32-b8", Shape(64, 32, batch=8)),
        _layer_case("s64-b1", Shape(256, 64)),
        *([_DIGITS] if _EXAMPLE.exists() else []),
    ),
)
