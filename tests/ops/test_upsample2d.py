"""What upsample_bilinear2d and upsample_bicubic2d mean."""

from __future__ import annotations

import contextlib
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from inductor_vision.ops.upsample2d import upsample_bilinear2d
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.layouts import LAYOUTS
from inductor_vision.tests.support.upsample2d import CASES, MODES, Case, oracle
from torch._subclasses import FakeTensorMode

every_mode = pytest.mark.parametrize("mode", MODES)


@every_mode
@pytest.mark.parametrize("name", CASES)
def test_values(name, mode):
    case = dataclasses.replace(CASES[name], mode=mode)
    input = case.input()
    result = case.op(*case.positional)
    (height, width), (below, right) = case.to, case.padding
    assert result.shape == (case.batch, case.channels, height + below, width + right)
    assert_close(result, oracle(input, case), torch.float32)
    aten = getattr(torch.ops.aten, case.op.name)
    stock = aten(input, case.to, case.align_corners, *case.scales)
    assert torch.equal(result[..., :height, :width], stock)
    assert not result[..., height:, :].any() and not result[..., width:].any()


def test_is_what_interpolate_computes():
    input = Case().input()
    expected = F.interpolate(input, size=(12, 33), mode="bilinear")
    assert torch.equal(upsample_bilinear2d(input, (12, 33)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@every_mode
def test_dtypes_and_layouts(dtype, layout, mode):
    case = Case(dtype=dtype, layout=layout, mode=mode)
    result = case.op(*case.positional)
    assert_close(result, oracle(case.input(), case), dtype)
    stock = F.interpolate(case.input(), size=case.to, mode=mode)
    assert result.dtype == stock.dtype
    channels_last = stock.is_contiguous(memory_format=torch.channels_last)
    assert result.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_under_autocast_it_is_what_aten_does():
    input = Case(dtype=torch.bfloat16).input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = F.interpolate(input, size=(12, 33), mode="bilinear")
        result = upsample_bilinear2d(input, (12, 33))
    assert result.dtype == stock.dtype
    assert torch.equal(result, stock)


@pytest.mark.parametrize("name", ["larger", "smaller", "align_corners", "scales", "no padding"])
@every_mode
def test_gradients(name, mode):
    case = dataclasses.replace(CASES[name], mode=mode)
    input = case.input().double()[:1, :2].requires_grad_()
    torch.autograd.gradcheck(lambda input: case.op(input, *case.arguments), input, fast_mode=True)
    with pytest.raises(RuntimeError, match=rf"^{case.op.name}: double backward is not supported"):
        torch.autograd.gradgradcheck(lambda input: case.op(input, *case.arguments), input)


@every_mode
def test_opcheck(mode):
    pytest.importorskip("expecttest")
    case = Case(layout="channels_last", mode=mode)
    torch.library.opcheck(case.op.overload, case.positional)
    torch.library.opcheck(case.op.backward.overload, case.positional_backward)


WRONG = {
    "input must be [B, C, H, W], got (3, 4, 5)": (torch.ones(3, 4, 5), [2, 2], [0, 0]),
    "input must have channels, and a positive height and width, got (2, 0, 4, 5)": (
        torch.ones(2, 0, 4, 5),
        [2, 2],
        [0, 0],
    ),
    "input must have channels, and a positive height and width, got (2, 3, 4, 0)": (
        torch.ones(2, 3, 4, 0),
        [2, 2],
        [0, 0],
    ),
    "input must be of a floating dtype, got torch.uint8": (torch.ones(2, 3, 4, 5).byte(), [2, 2], [0, 0]),
    "output_size must be positive, got 0 x 2": (torch.ones(2, 3, 4, 5), [0, 2], [0, 0]),
    "padding must not be negative, got 0 and -1": (torch.ones(2, 3, 4, 5), [2, 2], [0, -1]),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    """The fake kernel raises what eager mode raises."""
    input, size, padding = WRONG[message]
    for mode in (contextlib.nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, pytest.raises(RuntimeError, match=f"^upsample_bilinear2d: {re.escape(message)}"):
            upsample_bilinear2d(input, size, padding=padding)
