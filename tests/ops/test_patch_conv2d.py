"""What patch_conv2d means: values, gradients, argument checks, the module; nothing here is compiled by Inductor."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from inductor_vision import PatchConv2d, patch_conv2d
from inductor_vision.ops.patch_conv2d import CHANNELS_FIRST, CHANNELS_LAST, PATCHES_FIRST, memory_order
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support import convolution
from inductor_vision.tests.support.arguments import MODES, QUICK, assert_refused, run_in, wrong_kinds
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.convolution import LOW_DTYPES, assert_same_gradients, call, gradient_like, gradients
from inductor_vision.tests.support.patch_conv2d import (
    CASES,
    LAYOUTS,
    Case,
    arrange,
    cases,
    gradient_oracle,
    oracle,
    sample,
)
from torch import nn
from torch.export import Dim

OP = torch.ops.inductor_vision.patch_conv2d.default
OP_BACKWARD = torch.ops.inductor_vision.patch_conv2d_backward.default

SMALL = [name for name in CASES if name != "channels_700"]


def convolution_of_a_batch(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """What the operator takes the place of."""
    out = F.conv2d(input.flatten(0, -4), weight, bias, stride, padding, dilation, groups)
    return out.reshape(*input.shape[:-3], *out.shape[1:])


# Values


@pytest.mark.parametrize("name", CASES)
def test_decomposition_is_the_oracle(name):
    """And the oracle is a convolution of a batch."""
    s = sample(name, torch.float64)
    with recorded_paths() as paths:
        out = call(patch_conv2d, s)
    assert [(path.op, path.kind) for path in paths] == [("patch_conv2d", "eager")]
    expected = oracle(s)
    assert_close(out, expected, torch.float64)
    if out.numel() > 0:
        assert_close(expected, call(convolution_of_a_batch, s), torch.float64)


@pytest.mark.parametrize("name", SMALL)
def test_each_dtype(name):
    """Values and gradients; those in float64 are compared with the oracle."""
    convolution.assert_same_in((torch.float32, *LOW_DTYPES), patch_conv2d, partial(sample, name))


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_low_precision_sums_in_float32(dtype):
    """4608 ones: bf16 cannot count past 256, nor fp16 past 2048."""
    ones = torch.ones(1, 512, 3, 3, dtype=dtype)
    assert patch_conv2d(ones, ones).item() == 9 * 512


def test_defaults_are_those_of_a_convolution():
    s = sample(Case(padding=0, bias=False), torch.float64)
    assert_close(patch_conv2d(*s.args[:2]), convolution_of_a_batch(*s.args[:2]), torch.float64)


@given(case=cases())
def test_any_case_is_the_oracle(case):
    s = sample(case, torch.float64)
    out = call(patch_conv2d, s)
    assert_close(out, oracle(s), torch.float64)
    expected = gradient_oracle(s, gradient_like(out).reshape(s.case.out_shape))
    assert_same_gradients(gradients(patch_conv2d, s), expected, torch.float64)


def test_a_pixel_that_meets_padding_alone_is_the_bias():
    s = sample("padding_beyond_the_kernel", torch.float64)
    out = call(patch_conv2d, s)
    assert torch.equal(out[..., 0, 0], s.args[2].expand(2, 5, 6))
    assert torch.equal(out[..., -1, -1], s.args[2].expand(2, 5, 6))


def test_patches_do_not_see_each_other():
    """Patches that were cut out of one image: each is as it would be alone."""
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    patches = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # [1, 4, 3, 4, 4]
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    out = patch_conv2d(patches, weight, padding=1)
    for n in range(4):
        y, x = n // 2 * 4, n % 2 * 4
        assert_close(out[:, n], F.conv2d(image[..., y : y + 4, x : x + 4], weight, padding=1), torch.float64)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_pixels_do_not_leak(value):
    """Into other patches, or to where the kernel does not reach."""
    s = sample("plain", torch.float64)
    patches = s.args[0].clone()
    patches[0, 1, 2, 0, 0] = value
    patches[1, 4, 3, -1, -1] = value
    s = s.replace(input=patches)
    out = call(patch_conv2d, s)
    bad = [[0, 1, y, x] for y in (0, 1) for x in (0, 1)] + [[1, 4, y, x] for y in (2, 3) for x in (3, 4)]
    assert (~out.isfinite()).all(2).nonzero().tolist() == bad
    assert_close(out, oracle(s), torch.float64)


# Gradients


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_oracles(name):
    s = sample(name, torch.float64)
    expected = gradient_oracle(s, gradient_like(torch.empty(s.case.out_shape, dtype=torch.float64)))
    assert_same_gradients(gradients(patch_conv2d, s), expected, torch.float64)


@pytest.mark.parametrize(
    "name", ["plain", "padding_beyond_the_kernel_strided", "groups_3_of_17", "depthwise", "no_patches_unbatched",
             "input_stepped", "weight_permuted", "weight_shared"]
)  # fmt: skip
def test_gradcheck(name):
    """The derivative along a random direction."""
    convolution.assert_gradcheck(patch_conv2d, sample(name, torch.float64), fast_mode=True)


@pytest.mark.parametrize("layout", ["patches_first", "channels_first", "channels_last"])
def test_gradcheck_of_every_element(layout):
    case = Case(patches=2, channels=4, out_channels=2, size=(2, 3), kernel=(2, 3), stride=(1, 2), groups=2)
    convolution.assert_gradcheck(patch_conv2d, sample(dataclasses.replace(case, layout=layout), torch.float64))


@pytest.mark.parametrize("name", ["groups_2", "input_channels_first", "unbatched_channels_last"])
def test_each_gradient_alone(name):
    convolution.assert_each_gradient_alone(patch_conv2d, sample(name, torch.float64))


@pytest.mark.parametrize("layout", ["channels_last", "stepped", "sliced_patches_last"])
def test_gradient_of_a_non_contiguous_gradient(layout):
    s = sample("plain", torch.float64)
    convolution.assert_same_gradients_by(partial(arrange, layout=layout), patch_conv2d, s)


def test_double_backward_says_that_it_is_not_supported():
    convolution.assert_no_double_backward(patch_conv2d, sample("plain"))


# What PyTorch asks of an operator


@pytest.mark.parametrize(
    "name", ["plain", "no_bias", "numbers", "groups_2", "empty_batch", "no_patches", "patch_1x1", "weight_permuted",
             "weight_shared", "unbatched_channels_last", "input_channels_first", "input_channels_last",
             "input_transposed", "input_sliced_patches_last"]
)  # fmt: skip
def test_opcheck(name):
    convolution.opcheck(OP, OP_BACKWARD, sample(name))


@pytest.mark.parametrize("name", ["plain", "no_bias", "no_patches", "input_channels_last", "weight_shared"])
def test_opcheck_with_dynamic_shapes(name):
    convolution.opcheck_with_dynamic_shapes(OP, sample(name))


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in SMALL), ("plain", torch.bfloat16)])
def test_fake_results_are_laid_out_like_real_ones(name, dtype):
    convolution.assert_fake_results_are_like_real_ones(OP, OP_BACKWARD, sample(name, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_result_lies_in_memory_as_the_input_does(layout):
    s = sample(Case(layout=layout)).requiring_grad()
    out = call(patch_conv2d, s)
    (gradient,) = torch.autograd.grad(out, s.args[0], torch.ones_like(out))
    order = {
        "channels_first": CHANNELS_FIRST,
        "channels_last": CHANNELS_LAST,
        "patches_last": CHANNELS_FIRST,
        "expanded": CHANNELS_FIRST,
    }.get(layout.removeprefix("sliced_"), PATCHES_FIRST)
    assert memory_order(s.args[0]) == order
    for tensor in (out, gradient):
        assert tensor.permute(order).is_contiguous()


def test_exported_with_dynamic_shapes():
    model = PatchConv2d(4, 6, 3, stride=2, padding=1)
    dynamic = dict.fromkeys((0, 1, 3, 4), Dim.AUTO)
    program = torch.export.export(model, (torch.randn(2, 5, 4, 7, 10),), dynamic_shapes=(dynamic,))
    assert [node.target for node in program.graph.nodes].count(OP) == 1
    for size in ((3, 2, 4, 12, 9), (5, 7, 4, 20, 8), (2, 5, 4, 7, 10)):
        x = torch.randn(size)
        assert torch.equal(program.module()(x), model(x))


def test_a_stride_that_changes_from_call_to_call():
    convolution.assert_stride_may_change(patch_conv2d, sample("plain"))


# Autocast


@pytest.mark.parametrize("low", LOW_DTYPES, ids=str)
def test_autocast_computes_in_lower_precision(low):
    convolution.assert_autocast_lowers(low, patch_conv2d, convolution_of_a_batch, sample("plain"))


def test_gradients_under_autocast():
    s = sample("plain")
    convolution.assert_gradients_under_autocast(patch_conv2d, s, gradients(patch_conv2d, s))


def test_float64_under_autocast():
    convolution.assert_autocast_leaves_float64(patch_conv2d, sample("plain", torch.float64))


# Wrong arguments


RIGHT = {
    "input": torch.zeros(2, 5, 8, 4, 6),
    "weight": torch.zeros(6, 4, 3, 3),
    "bias": torch.zeros(6),
    "stride": 1,
    "padding": 1,
    "dilation": 1,
    "groups": 2,
}

# What is changed in a right call, and what the error says.
WRONG = {
    **wrong_kinds(RIGHT),
    **convolution.WRONG_GEOMETRY,
    **convolution.WRONG_WEIGHTS,
    "input_of_three_dimensions": (
        {"input": torch.zeros(8, 4, 6)},
        "input must have 5 dimensions, or 4 without a batch, got shape (8, 4, 6)",
    ),
    "input_of_six_dimensions": (
        {"input": torch.zeros(1, 2, 5, 8, 4, 6)},
        "input must have 5 dimensions, or 4 without a batch, got shape (1, 2, 5, 8, 4, 6)",
    ),
    "groups_0": (
        {"groups": 0},
        "weight.shape[1] must be input's channels / groups = 8 / 0, got 4",
    ),
    "groups_negative": (
        {"groups": -2},
        "weight.shape[1] must be input's channels / groups = 8 / -2, got 4",
    ),
    "groups": (
        {"groups": 1},
        "weight.shape[1] must be input's channels / groups = 8 / 1, got 4",
    ),
    "channels": (
        {"input": torch.zeros(2, 5, 9, 4, 6)},
        "weight.shape[1] must be input's channels / groups = 9 / 2, got 4",
    ),
    "no_channels": (
        {"input": torch.zeros(2, 5, 0, 4, 6)},
        "weight.shape[1] must be input's channels / groups = 0 / 2, got 4",
    ),
    "no_height": (
        {"input": torch.zeros(2, 5, 8, 0, 6)},
        "input must have a positive height and width, got shape (2, 5, 8, 0, 6)",
    ),
    "kernel_too_large": (
        {"dilation": (3, 1), "padding": 0},
        "the kernel does not fit into the padded input: the output would be -2 x 4",
    ),
}

# What compiling and exporting could treat in a way of their own.
WRONG_TRACED = (
    "integers", "input_device", "stride_of_three", "input_of_three_dimensions", "groups_0", "channels", "no_height",
    "kernel_too_large",
)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_right_arguments(mode):
    run_in(mode, patch_conv2d, RIGHT)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    assert_refused(MODES if wrong in WRONG_TRACED else QUICK, patch_conv2d, RIGHT, WRONG[wrong])


def test_wrong_arguments_of_the_operators():
    s = sample("plain")
    _input, weight, bias, *geometry = s.positional
    for channels in (0, 7):
        message = f"input's channels must be a positive multiple of weight.shape[1] = 5, got {channels}"
        with pytest.raises(RuntimeError, match=re.escape(f"patch_conv2d: {message}")):
            OP(torch.zeros(2, 5, channels, 4, 5), weight, bias, *geometry)
    grad = torch.zeros(2, 5, 6, 4, 4)
    with pytest.raises(
        RuntimeError,
        match=re.escape("patch_conv2d_backward: grad must have shape (2, 5, 6, 4, 5), got (2, 5, 6, 4, 4)"),
    ):
        OP_BACKWARD(grad, *s.positional, [True] * 3)


# The module


@pytest.mark.parametrize("name", convolution.MODULES)
def test_module_is_a_convolution(name):
    ours, theirs = convolution.modules_of_the_same_state(PatchConv2d, nn.Conv2d, name)
    assert repr(ours) == repr(theirs).replace("Conv2d", "PatchConv2d", 1)
    patches = torch.randn(2, 5, 8, 7, 9)
    expected = theirs(patches.flatten(0, 1)).unflatten(0, (2, 5))
    assert_close(ours(patches), expected, torch.float32)
    assert_close(ours(patches[0]), expected[0], torch.float32)


def test_module_of_another_dtype():
    module = PatchConv2d(3, 4, 3, dtype=torch.float64, device="cpu")
    assert module(torch.zeros(2, 3, 3, 3, dtype=torch.float64)).dtype == torch.float64


def test_module_pads_with_zeros_alone():
    with pytest.raises(ValueError, match="padding_mode must be 'zeros', got 'reflect'"):
        PatchConv2d(8, 6, 3, padding_mode="reflect")


def test_padding_is_in_numbers():
    message = "padding must be a number, or one for each of height and width, got 'same'"
    with pytest.raises(ValueError, match=message):
        PatchConv2d(8, 6, 3, padding="same")
    with pytest.raises(ValueError, match=message):
        patch_conv2d(**{**RIGHT, "padding": "same"})


@pytest.mark.parametrize("channels", [(8, 6), (6, 8)])
def test_module_channels_must_be_divisible_by_groups(channels):
    with pytest.raises(ValueError, match="_channels must be divisible by groups"):
        PatchConv2d(*channels, 3, groups=4)
