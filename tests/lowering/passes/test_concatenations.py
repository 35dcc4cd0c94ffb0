"""Concatenations that are split again into what they were made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inductor_vision import accelerate_torchvision
from inductor_vision.lowering.passes.concatenations import SkipConcatenations
from inductor_vision.tests.support.compiled import compile_and_run
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def after(program: Callable[..., Any], *args: Tensor, tracing_mode: str = "symbolic") -> list[Any]:
    """The operators of a program behind the pass, which must compute the same."""
    traced = make_fx(program, tracing_mode=tracing_mode)(*args)
    SkipConcatenations("")(traced.graph)
    traced.graph.lint()
    traced.recompile()
    copies = [arg.clone() for arg in args]  # of what a program may change
    torch.testing.assert_close(traced(*args), program(*copies), rtol=0, atol=0)
    return [node.target for node in traced.graph.nodes if node.op == "call_function"]


def parts() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 4), torch.randn(2, 5, 4)


def split_like(*tensors: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
    return torch.cat(tensors, dim).split([tensor.shape[dim] for tensor in tensors], dim)


@pytest.mark.parametrize("tracing_mode", ["fake", "symbolic"])
def test_parts_are_taken_from_where_they_are(tracing_mode):
    def program(x: Tensor, y: Tensor) -> list[Tensor]:
        levels = split_like(x.exp(), y.exp())
        return [level[0].sigmoid() for level in levels] + [split_like(x.mT, y.mT, dim=-1)[1].sin()]

    targets = after(program, *parts(), tracing_mode=tracing_mode)
    assert not {aten.cat.default, aten.split_with_sizes.default} & set(targets)
    assert targets.count(aten.exp.default) == 2


def test_a_concatenation_that_others_read_is_left():
    def program(x: Tensor, y: Tensor) -> list[Tensor]:
        whole = torch.cat([x, y], 1)
        return [whole.sum(), whole.split([3, 5], 1)[0].exp()]

    targets = after(program, *parts(), tracing_mode="fake")
    assert aten.cat.default in targets and aten.split_with_sizes.default not in targets


def test_inputs_that_change_are_read_before():
    def program(x: Tensor, y: Tensor) -> Tensor:
        first, second = torch.cat([x, y], 1).split([3, 3], 1)
        x.copy_(second)
        y.copy_(first)
        return x - y

    targets = after(program, torch.randn(2, 3), torch.randn(2, 3), tracing_mode="fake")
    assert aten.split_with_sizes.default in targets


OTHER_PARTS = {
    "sizes": lambda x, y: torch.cat([x, y], 1).split([5, 3], 1),
    "number": lambda x, y: torch.cat([x, y], 1).split([3, 4, 1], 1),
    "dimension": lambda x, y: torch.cat([x.mT, y.mT], 2).split([3, 1], 1),
    "dtype": lambda x, y: torch.cat([x, y.double()], 1).split([3, 5], 1),
    "no concatenation": lambda x, y: (x + 1).split([1, 2], 1),
}


@pytest.mark.parametrize("program", OTHER_PARTS.values(), ids=OTHER_PARTS)
def test_other_parts_are_split_off(program):
    targets = after(lambda x, y: [part.exp() for part in program(x, y)], *parts(), tracing_mode="fake")
    assert aten.split_with_sizes.default in targets


def test_what_is_returned_has_memory_of_its_own():
    """Whoever writes to a result would write to an input, or to another result."""

    def program(x: Tensor, y: Tensor) -> list[Tensor]:
        first, second = split_like(x, y)
        return [first, second[0].mT, first.exp()]

    targets = after(program, *parts())
    assert aten.cat.default in targets


def test_nothing_is_concatenated_where_sizes_vary(torchvision_python):
    def program(x: Tensor, y: Tensor) -> list[Tensor]:
        return [part.exp() for part in split_like(x[:, 1:], y[:, 1:])]

    accelerate_torchvision()
    args = parts()
    compiled = compile_and_run(program, *args, dynamic=True)
    torch.testing.assert_close(compiled.result, program(*args))
    assert "cat" not in "".join(line for line in compiled.source.splitlines() if "cpp_fused" in line)
