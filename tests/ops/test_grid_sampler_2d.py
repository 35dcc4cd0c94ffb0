"""What grid_sampler_2d means: what aten's operator does, in each mode."""

from __future__ import annotations

import contextlib
import dataclasses
import re

import pytest
import torch
from inductor_vision.tests.support.grid_sampler_2d import BACKWARD, CASES, MODES, OP, Case
from inductor_vision.tests.support.layouts import LAYOUTS
from torch._subclasses import FakeTensorMode


@pytest.mark.parametrize("modes", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_is_what_aten_computes(modes, dtype):
    case = Case(modes=modes, dtype=dtype, hostile=True)
    result, stock = OP(*case.positional), torch.ops.aten.grid_sampler_2d(*case.positional)
    assert result.dtype == stock.dtype and result.stride() == stock.stride()
    assert torch.equal(result.nan_to_num(), stock.nan_to_num())


@pytest.mark.parametrize("name", CASES)
def test_shapes(name):
    case = CASES[name]
    result = OP(*case.positional)
    assert result.shape == (case.batch, case.channels, *case.out)
    assert torch.equal(result, torch.ops.aten.grid_sampler_2d(*case.positional))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    case = Case(layout=layout)
    result = OP(*case.positional)
    assert result.is_contiguous()
    torch.testing.assert_close(result, OP(case.input().contiguous(), case.grid(), *case.modes))


def test_gradients():
    case = Case(size=(4, 5), out=(3, 4), dtype=torch.float64)
    for modes in ((0, 0, False), (0, 2, True), (2, 1, False)):
        inputs = case.input().requires_grad_(), case.grid().requires_grad_()
        torch.autograd.gradcheck(lambda input, grid, modes=modes: OP(input, grid, *modes), inputs)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_that_are_wanted(wanted):
    case = CASES["channels_last"]
    inputs = [tensor.requires_grad_(want) for tensor, want in zip((case.input(), case.grid()), wanted)]
    results = [
        torch.autograd.grad(op(*inputs, *case.modes), [x for x in inputs if x.requires_grad], case.grad())
        for op in (OP, torch.ops.aten.grid_sampler_2d)
    ]
    for result, stock in zip(*results, strict=True):
        torch.testing.assert_close(result, stock)


def test_double_backward_is_refused():
    case = Case()
    input = case.input().requires_grad_()
    (gradient,) = torch.autograd.grad(OP(input, case.grid(), *case.modes).sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="grid_sampler_2d: double backward is not supported"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["few channels", "channels_last", "no images"])
def test_opcheck(name):
    case = dataclasses.replace(CASES[name], out=(4, 5))
    input, grid, *modes = case.positional
    torch.library.opcheck(OP, (input.requires_grad_(), grid.requires_grad_(), *modes))
    torch.library.opcheck(BACKWARD, case.positional_backward)


WRONG = {
    "input must be [B, C, H, W], got (3, 4, 5)": (torch.ones(3, 4, 5), torch.ones(3, 2, 2, 2), 0, 0),
    "input must have a positive height and width, got (2, 3, 0, 5)": (
        torch.ones(2, 3, 0, 5),
        torch.ones(2, 2, 2, 2),
        0,
        0,
    ),
    "grid must be [B, H_out, W_out, 2], got (2, 6, 7, 3)": (torch.ones(2, 3, 4, 5), torch.ones(2, 6, 7, 3), 0, 0),
    "input and grid must have the same batch size, got (2, 3, 4, 5) and (1, 6, 7, 2)": (
        torch.ones(2, 3, 4, 5),
        torch.ones(1, 6, 7, 2),
        0,
        0,
    ),
    "input must be of a floating dtype, got torch.uint8": (
        torch.ones(2, 3, 4, 5).byte(),
        torch.ones(2, 6, 7, 2).byte(),
        0,
        0,
    ),
    "grid must be of input's dtype, torch.float32, got torch.float64": (
        torch.ones(2, 3, 4, 5),
        torch.ones(2, 6, 7, 2).double(),
        0,
        0,
    ),
    "interpolation_mode must be 0, 1 or 2, got 3": (torch.ones(2, 3, 4, 5), torch.ones(2, 6, 7, 2), 3, 0),
    "padding_mode must be 0, 1 or 2, got -1": (torch.ones(2, 3, 4, 5), torch.ones(2, 6, 7, 2), 0, -1),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    """The fake kernel raises what eager mode raises."""
    for mode in (contextlib.nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, pytest.raises(RuntimeError, match=f"^grid_sampler_2d: {re.escape(message)}"):
            OP(*WRONG[message], False)
