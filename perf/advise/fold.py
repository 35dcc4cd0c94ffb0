"""Several calls of a module as one on a larger batch, in a model whose code was not written so.

What the calls are given is taken from a run beforehand, so that the first call can compute them all. That takes as long
as in a model that brings them together itself, and is as right, if no call is given what came out of another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .target import Program


def foldable_module(program: Program, layer: str) -> str | None:
    """The outermost module around a layer whose calls could be one: several, on equal shapes, none needing another's
    result. None if there is no such module."""
    parts = layer.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        calls = _inputs_of_calls(program, name)
        if calls and len(calls) > 1 and _independent(program, name, calls):
            return name
    return None


def fold_calls(program: Program, name: str) -> None:
    """Have the first call of a module compute all of its calls in a run of the model, and the others hand out results.

    Raises:
        ValueError: the module is not called several times on single tensors of one shape.
    """
    inputs = _inputs_of_calls(program, name)
    if not inputs:
        raise ValueError(f"{name} is not called on single tensors of one shape")
    module = program.model.get_submodule(name)
    forward, ready = module.forward, []

    def folded(input: Tensor) -> Tensor:
        if not ready:
            ready.extend(reversed(forward(torch.cat(inputs)).chunk(len(inputs))))
        return ready.pop()

    module.forward = folded


def _inputs_of_calls(program: Program, name: str) -> list[Tensor] | None:
    """What a module is given in a run; None unless each call takes one tensor and returns one, and all are alike."""
    calls: list[Tensor | None] = []

    def record(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        calls.append(args[0].clone() if single else None)
        return output

    with _forward_replaced(program.model.get_submodule(name), record):
        program.run()
    tensors = [call for call in calls if call is not None]
    same = len(tensors) == len(calls) and len({(t.shape, t.dtype) for t in tensors}) == 1
    return tensors if same else None


def _independent(program: Program, name: str, inputs: list[Tensor]) -> bool:
    """Whether the calls are given the same when all of them return zeros."""
    seen: list[Tensor] = []

    def zeros(forward: Callable[..., Any], input: Tensor) -> Tensor:
        seen.append(input.clone())
        return torch.zeros_like(forward(input))

    with _forward_replaced(program.model.get_submodule(name), zeros):
        try:
            program.run()
        except Exception:  # zeros may be what the rest of a model cannot take
            return False
    return len(seen) == len(inputs) and all(map(torch.equal, seen, inputs))


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, replacement: Callable[..., Any]) -> Iterator[None]:
    """Have calls of a module go to ``replacement(forward, ...)``."""
    forward, own = module.forward, vars(module).get("forward")
    module.forward = lambda *args, **kwargs: replacement(forward, *args, **kwargs)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
