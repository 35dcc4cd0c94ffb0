"""What winograd_conv2d means: values, accuracy, gradients, argument checks; nothing here is compiled by Inductor."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from inductor_vision import winograd_conv2d
from inductor_vision.ops import winograd_conv2d as operator
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support import convolution
from inductor_vision.tests.support.arguments import MODES, QUICK, assert_refused, run_in, wrong_kinds
from inductor_vision.tests.support.compare import assert_close, relative_error
from inductor_vision.tests.support.convolution import LOW_DTYPES, assert_same_gradients, call, gradient_like, gradients
from inductor_vision.tests.support.layouts import LAYOUTS, arrange
from inductor_vision.tests.support.winograd_conv2d import (
    CASES,
    Case,
    cases,
    gradient_oracle,
    oracle,
    sample,
    spoilt,
)
from torch import nn
from torch.export import Dim

OP = torch.ops.inductor_vision.winograd_conv2d.default
OP_BACKWARD = torch.ops.inductor_vision.winograd_conv2d_backward.default

SMALL = [name for name in CASES if name not in ("channels_300_to_130", "many_tiles", "many_tiles_channels_last")]


def conv2d(input, weight, bias=None, padding=1, tile=4, groups=1):
    """What the operator takes the place of."""
    return F.conv2d(input, weight, bias, padding=padding, groups=groups)


# Values


@pytest.mark.parametrize("name", CASES)
def test_decomposition_is_the_oracle(name):
    """And the oracle is a convolution."""
    s = sample(name, torch.float64)
    with recorded_paths() as paths:
        out = call(winograd_conv2d, s)
    assert [(path.op, path.kind) for path in paths] == [("winograd_conv2d", "eager")]
    expected = oracle(s)
    assert_close(out, expected, torch.float64)
    assert_close(expected, call(conv2d, s), torch.float64)


@pytest.mark.parametrize("name", SMALL)
def test_each_dtype(name):
    """Values and gradients; those in float64 are compared with the oracle."""
    convolution.assert_same_in((torch.float32, *LOW_DTYPES), winograd_conv2d, partial(sample, name))


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_low_precision_sums_in_float32(dtype):
    """4608 ones: bf16 cannot count past 256, nor fp16 past 2048."""
    ones = torch.ones(1, 512, 3, 3, dtype=dtype)
    assert winograd_conv2d(ones, ones, padding=0).item() == 9 * 512


@pytest.mark.parametrize(("word", "number"), [("same", 1), ("valid", 0)])
def test_padding_by_a_word(word, number):
    x, weight, _ = sample("plain").args
    assert torch.equal(winograd_conv2d(x, weight, padding=word), winograd_conv2d(x, weight, padding=number))


@given(case=cases())
def test_any_case_is_the_oracle(case):
    s = sample(case, torch.float64)
    out = call(winograd_conv2d, s)
    assert_close(out, oracle(s), torch.float64)
    expected = gradient_oracle(s, gradient_like(out))
    assert_same_gradients(gradients(winograd_conv2d, s), expected, torch.float64)


@pytest.mark.parametrize("tile", operator.ALGORITHMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_pixels_stay_in_their_tiles(tile, value):
    s = sample(Case(size=(15, 13), padding=(1, 2), tile=tile), torch.float64)
    image = s.args[0].clone()
    for b, y, x in ((0, 0, 0), (0, 6, 7), (1, 14, 12), (1, 4, 4)):
        image[b, 1, y, x] = value
    s = s.replace(input=image)
    must, may = spoilt(s)
    out = call(winograd_conv2d, s)
    bad = ~out.isfinite().all(1)
    assert (bad | ~must).all() and (may | ~bad).all()
    assert must.sum() < may.sum() < may.numel()
    assert_close(out.where(~may[:, None], 0), oracle(s).where(~may[:, None], 0), torch.float64)


# Accuracy

LAVIN_AND_GRAY = operator.Algorithm((0.0, 1.0, -1.0, 2.0, -2.0))


def error(channels: int, tile: int, mean: float = 0) -> float:
    """The largest error in float32, relative to the largest value, of random numbers."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(1, channels, 34, 30, generator=generator) + mean
    weight = torch.randn(16, channels, 3, 3, generator=generator)
    return relative_error(winograd_conv2d(x, weight, tile=tile), F.conv2d(x.double(), weight.double(), padding=1))


@pytest.mark.parametrize("channels", [16, 64, 512])
def test_errors_are_small(channels):
    assert error(channels, tile=2) < 5e-6
    assert error(channels, tile=4) < 1e-5


@pytest.mark.parametrize("mean", [0, 1])
def test_points_near_one_halve_the_error(monkeypatch, mean):
    chosen = [error(channels, 4, mean) for channels in (16, 32, 64)]
    monkeypatch.setitem(operator.ALGORITHMS, 4, LAVIN_AND_GRAY)
    usual = [error(channels, 4, mean) for channels in (16, 32, 64)]
    assert sum(chosen) < sum(usual) / 2


def test_transforms_are_those_of_the_paper():
    """But for factors of a row of G and the column of the inverse transform that undo each other."""
    transforms = operator.Algorithm((0.0, 1.0, -1.0))
    assert transforms.input_transform == [[-1, 0, 1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]]
    assert transforms.weight_transform == [[-1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
    assert transforms.output_transform == [[1, 1, 1, 0], [0, 1, -1, 1]]
    assert LAVIN_AND_GRAY.input_transform[0] == [4, 0, -5, 0, 1, 0]
    assert LAVIN_AND_GRAY.weight_transform[3] == [1 / 24, 1 / 12, 1 / 6]
    assert LAVIN_AND_GRAY.output_transform[3] == [0, 1, -1, 8, -8, 1]


@pytest.mark.parametrize("tile", operator.ALGORITHMS)
def test_transforms_of_input_and_output_are_exact_in_float32(tile):
    algorithm = operator.ALGORITHMS[tile]
    for matrix in (algorithm.input_transform, algorithm.output_transform):
        numbers = torch.tensor(matrix, dtype=torch.float64)
        assert torch.equal(numbers.float().double(), numbers)


# Gradients


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_the_oracles(name):
    s = sample(name, torch.float64)
    expected = gradient_oracle(s, gradient_like(torch.empty(s.case.out_shape, dtype=torch.float64)))
    assert_same_gradients(gradients(winograd_conv2d, s), expected, torch.float64)


@pytest.mark.parametrize("name", ["plain", "tile_2", "padding_beyond_the_kernel", "groups_2", "weight_shared"])
def test_gradcheck(name):
    """The derivative along a random direction."""
    convolution.assert_gradcheck(winograd_conv2d, sample(name, torch.float64), fast_mode=True)


def test_gradcheck_of_every_element():
    s = sample(Case(batch=1, channels=2, out_channels=4, size=(5, 3), groups=2), torch.float64)
    convolution.assert_gradcheck(winograd_conv2d, s)


@pytest.mark.parametrize("name", ["groups_2", "input_channels_last"])
def test_each_gradient_alone(name):
    convolution.assert_each_gradient_alone(winograd_conv2d, sample(name, torch.float64))


@pytest.mark.parametrize("layout", ["channels_last", "stepped"])
def test_gradient_of_a_non_contiguous_gradient(layout):
    s = sample("plain", torch.float64)
    convolution.assert_same_gradients_by(partial(arrange, layout=layout), winograd_conv2d, s)


def test_double_backward_says_that_it_is_not_supported():
    convolution.assert_no_double_backward(winograd_conv2d, sample("plain"))


# What PyTorch asks of an operator


@pytest.mark.parametrize(
    "name", ["plain", "no_bias", "tile_2", "groups_2", "empty_batch", "image_1x1", "weight_permuted", "weight_shared",
             "input_channels_last", "input_transposed", "input_sliced_channels_last"]
)  # fmt: skip
def test_opcheck(name):
    convolution.opcheck(OP, OP_BACKWARD, sample(name))


@pytest.mark.parametrize("name", ["plain", "input_channels_last"])
def test_opcheck_with_dynamic_shapes(name):
    convolution.opcheck_with_dynamic_shapes(OP, sample(name))


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in SMALL), ("plain", torch.bfloat16)])
def test_fake_results_are_laid_out_like_real_ones(name, dtype):
    convolution.assert_fake_results_are_like_real_ones(OP, OP_BACKWARD, sample(name, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_follows_the_input(layout):
    s = sample(Case(layout=layout)).requiring_grad()
    out = call(winograd_conv2d, s)
    (gradient,) = torch.autograd.grad(out, s.args[0], torch.ones_like(out))
    for tensor in (out, gradient):
        convolution.assert_memory_format_follows(layout, tensor)


def test_exported_with_dynamic_shapes():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return winograd_conv2d(x, self.weight)

    model = Model()
    program = torch.export.export(
        model, (torch.randn(2, 4, 7, 10),), dynamic_shapes=(dict.fromkeys((0, 2, 3), Dim.AUTO),)
    )
    assert [node.target for node in program.graph.nodes].count(OP) == 1
    for size in ((3, 4, 12, 9), (5, 4, 20, 8), (2, 4, 7, 10)):
        x = torch.randn(size)
        assert torch.equal(program.module()(x), model(x))


# Autocast


@pytest.mark.parametrize("low", LOW_DTYPES, ids=str)
def test_autocast_computes_in_lower_precision(low):
    convolution.assert_autocast_lowers(low, winograd_conv2d, conv2d, sample("plain"))


def test_gradients_under_autocast():
    s = sample("plain")
    convolution.assert_gradients_under_autocast(winograd_conv2d, s, gradients(winograd_conv2d, s))


def test_float64_under_autocast():
    convolution.assert_autocast_leaves_float64(winograd_conv2d, sample("plain", torch.float64))


# Wrong arguments


RIGHT = {
    "input": torch.zeros(2, 8, 4, 6),
    "weight": torch.zeros(6, 4, 3, 3),
    "bias": torch.zeros(6),
    "padding": 1,
    "tile": 4,
    "groups": 2,
}

# What is changed in a right call, and what the error says.
WRONG = {
    **wrong_kinds(RIGHT),
    **{name: wrong for name, wrong in convolution.WRONG_GEOMETRY.items() if name.startswith("padding")},
    **{name: wrong for name, wrong in convolution.WRONG_WEIGHTS.items() if name != "weight_empty"},
    "kernel_5x5": (
        {"weight": torch.zeros(6, 4, 5, 5)},
        "weight must have kernels of 3 x 3, got shape (6, 4, 5, 5)",
    ),
    "tile_3": ({"tile": 3}, "tile must be 2 or 4, got 3"),
    "input_of_three_dimensions": (
        {"input": torch.zeros(8, 4, 6)},
        "input must have 4 dimensions, got shape (8, 4, 6)",
    ),
    "groups_0": ({"groups": 0}, "weight.shape[1] must be input's channels / groups = 8 / 0, got 4"),
    "groups": ({"groups": 1}, "weight.shape[1] must be input's channels / groups = 8 / 1, got 4"),
    "no_height": (
        {"input": torch.zeros(2, 8, 0, 6)},
        "input must have a positive height and width, got shape (2, 8, 0, 6)",
    ),
    "too_small": (
        {"input": torch.zeros(2, 8, 1, 6), "padding": 0},
        "the kernel does not fit into the padded input: the output would be -1 x 4",
    ),
}

# What compiling and exporting could treat in a way of their own.
WRONG_TRACED = ("integers", "input_device", "padding_of_one", "tile_3", "groups", "no_height", "too_small")


@pytest.mark.parametrize("mode", MODES)
def test_right_arguments(mode):
    run_in(mode, winograd_conv2d, RIGHT)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    assert_refused(MODES if wrong in WRONG_TRACED else QUICK, winograd_conv2d, RIGHT, WRONG[wrong])


def test_wrong_word_for_padding():
    with pytest.raises(ValueError, match="padding must be a number, or one for each of height and width, got 'full'"):
        winograd_conv2d(RIGHT["input"], RIGHT["weight"], padding="full", groups=2)


def test_wrong_gradient():
    s = sample("plain")
    message = "winograd_conv2d_backward: grad must have shape (2, 6, 7, 9), got (2, 6, 7, 8)"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        OP_BACKWARD(torch.zeros(2, 6, 7, 8), *s.positional, [True] * 3)
