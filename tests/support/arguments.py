"""Wrong arguments of an operator: it says what is wrong, in the same words however it is called.

What is changed in a right call and what the error then says stands in a table of the operator's tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

Function = Callable[..., object]
Wrong = tuple[Mapping[str, Any], str]  # what is changed, what the error says


class Call(nn.Module):
    """A call as a model of its tensors, which have names; the other arguments are always the same."""

    def __init__(self, function: Function, names: list[str], others: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.names, self.others = function, names, others

    def forward(self, *tensors: Tensor) -> object:
        return self.function(**dict(zip(self.names, tensors)), **self.others)


def _fake(model: nn.Module, tensors: list[Tensor], **options: Any) -> object:
    """Runs the fake kernel by itself, which is what compiling and exporting run, in a small part of their time."""
    with FakeTensorMode(**options) as mode:
        return model(*map(mode.from_tensor, tensors))


def _compiled(model: nn.Module, tensors: list[Tensor], dynamic: bool) -> object:
    return torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)(*tensors)


MODES: dict[str, Callable[[nn.Module, list[Tensor]], object]] = {
    "eager": lambda model, tensors: model(*tensors),
    "fake": _fake,
    "fake_dynamic": lambda model, tensors: _fake(model, tensors, shape_env=ShapeEnv(), static_shapes=False),
    "compiled": lambda model, tensors: _compiled(model, tensors, dynamic=False),
    "compiled_dynamic": lambda model, tensors: _compiled(model, tensors, dynamic=True),
    "exported": lambda model, tensors: torch.export.export(model, tuple(tensors)),
}
QUICK = ("eager", "fake", "fake_dynamic")  # of every wrong call; the other modes take many times as long


def run_in(mode: str, function: Function, arguments: Mapping[str, Any]) -> None:
    """Call a function, with its arguments by their names, in one of ``MODES``."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in arguments.items() if name not in tensors}
    MODES[mode](Call(function, list(tensors), others), list(tensors.values()))


def assert_refused(modes: Iterable[str], function: Function, right: Mapping[str, Any], wrong: Wrong) -> None:
    """In each mode a right call, changed to a wrong one, raises what the operator of the function's name says of it."""
    changes, message = wrong
    up_to_its_first_number = re.match(r"[^\d(-]*", message).group()
    for mode in modes:
        # A dynamic size may have a symbol for a name.
        words = up_to_its_first_number if mode.endswith("dynamic") else message
        try:
            run_in(mode, function, {**right, **changes})
        except RuntimeError as error:
            assert f"{function.__name__}: {words}" in str(error), f"{mode}: {error}"
        else:
            pytest.fail(f"{mode}: nothing was raised of {message!r}")


NOT_A_FLOAT = "input must be one of torch.float32, torch.float64, torch.bfloat16, torch.float16, got "


def wrong_kinds(right: Mapping[str, Any]) -> dict[str, Wrong]:
    """Dtypes and devices that an operator refuses which wants its tensors to be alike, and ``input`` of floats."""
    tensors = {name: value for name, value in right.items() if isinstance(value, Tensor)}
    input, second, *_ = tensors
    wrong: dict[str, Wrong] = {
        "integers": ({name: tensor.int() for name, tensor in tensors.items()}, f"{NOT_A_FLOAT}torch.int32"),
        "complex": ({input: tensors[input].to(torch.complex64)}, f"{NOT_A_FLOAT}torch.complex64"),
        "input_device": ({input: tensors[input].to("meta")}, f"{second} must be on input's device meta, got cpu"),
    }
    for name in list(tensors)[1:]:
        for dtype in (torch.bfloat16, torch.int64):
            message = f"{name} must have input's dtype torch.float32, got {dtype}"
            wrong[f"{name}_in_{dtype}"] = {name: tensors[name].to(dtype)}, message
        wrong[f"{name}_device"] = {name: tensors[name].to("meta")}, f"{name} must be on input's device cpu, got meta"
    return wrong
