"""What deform_conv2d means: values, gradients, argument checks, modules; nothing here is compiled by Inductor."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from inductor_vision import DeformConv2d, deform_conv2d
from inductor_vision.ops.registry import TORCHVISION
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support import convolution
from inductor_vision.tests.support.arguments import MODES, QUICK, assert_refused, run_in, wrong_kinds
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.convolution import LOW_DTYPES, assert_same_gradients, call, gradient_like, gradients
from inductor_vision.tests.support.deform_conv2d import (
    CASES,
    HOSTILE,
    Case,
    as_torchvision,
    cases,
    oracle,
    sample,
)
from inductor_vision.tests.support.layouts import LAYOUTS, arrange
from torch import Tensor, nn
from torch.export import Dim

OP = torch.ops.inductor_vision.deform_conv2d.default
OP_BACKWARD = torch.ops.inductor_vision.deform_conv2d_backward.default

DTYPES = (torch.float32, torch.float64)


@cache
def oracles_result(name: str) -> Tensor:
    """The oracle's result for the sample in float64; kept, since the oracle is slow."""
    return call(oracle, sample(name, torch.float64))


# Values


@pytest.mark.parametrize("name", CASES)
def test_oracle_is_torchvision(torchvision, name):
    s = sample(name, torch.float64)
    assert_close(oracles_result(name), call(torchvision.ops.deform_conv2d, s), torch.float64)


@pytest.mark.parametrize("name", [*CASES, *HOSTILE])
def test_decomposition_is_the_oracle(name):
    s = sample(name, torch.float64)
    with recorded_paths() as paths:
        out = call(deform_conv2d, s)
    assert [(path.op, path.kind) for path in paths] == [("deform_conv2d", "eager")]
    assert_close(out, oracles_result(name), torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_each_dtype(name):
    """Values and gradients; those in float64 are compared with other implementations."""
    convolution.assert_same_in((torch.float32, *LOW_DTYPES), deform_conv2d, partial(sample, name))


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_low_precision_sums_in_float32(dtype):
    """4608 ones: bf16 cannot count past 256, nor fp16 past 2048."""
    channels = 512
    ones = [torch.ones(shape, dtype=dtype) for shape in ((1, channels, 3, 3), (1, channels, 3, 3))]
    out = deform_conv2d(ones[0], torch.zeros(1, 18, 1, 1, dtype=dtype), ones[1])
    assert out.item() == 9 * channels


@pytest.mark.parametrize("name", ["neither", "stride_padding_dilation", "groups_8", "depthwise_37", "channels_64"])
def test_without_offsets_it_is_a_convolution(name):
    s = sample(dataclasses.replace(CASES[name], mask=False), torch.float64)
    input, offset, weight, bias = s.args
    out = deform_conv2d(input, torch.zeros_like(offset), weight, bias, **s.kwargs)
    kwargs = {key: s.kwargs[key] for key in ("stride", "padding", "dilation")}
    expected = nn.functional.conv2d(input, weight, bias, **kwargs, groups=s.case.groups)
    assert_close(out, expected, torch.float64)


def test_defaults_are_torchvisions(torchvision):
    s = sample(Case(padding=0, mask=False), torch.float64)
    assert_close(deform_conv2d(*s.args), torchvision.ops.deform_conv2d(*s.args), torch.float64)
    assert_close(deform_conv2d(*s.args[:3]), torchvision.ops.deform_conv2d(*s.args[:3]), torch.float64)


@given(case=cases())
def test_any_case_is_the_oracle(case):
    s = sample(case, torch.float64)
    assert_close(call(deform_conv2d, s), call(oracle, s), torch.float64)


@given(case=cases())
def test_any_case_is_torchvisions(torchvision, case):
    s = sample(case, torch.float64)
    assert_close(call(deform_conv2d, s), call(torchvision.ops.deform_conv2d, s), torch.float64)
    expected = gradients(torchvision.ops.deform_conv2d, s)
    assert_same_gradients(gradients(deform_conv2d, s), expected, torch.float64)


# NaN, infinity, huge numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HOSTILE)
def test_infinite_and_huge_offsets_are_torchvisions(torchvision, name, dtype):
    """With NaN torchvision reads out of bounds, so NaN becomes infinity here."""
    s = sample(name, dtype)
    s = s.replace(offset=s.args[1].nan_to_num(torch.inf, torch.inf, -torch.inf))
    assert_close(call(deform_conv2d, s), call(torchvision.ops.deform_conv2d, s), dtype)


@pytest.mark.parametrize("dtype", (*DTYPES, *LOW_DTYPES), ids=str)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_offsets_are_offsets_outside(name, dtype):
    """Values and gradients are those of an offset that leads a little outside the image."""
    s = sample(name, dtype)
    offset = s.args[1]
    hostile = ~(offset.abs() < 1e4)
    assert hostile.any() and not hostile.all()
    outside = s.replace(offset=offset.masked_fill(hostile, -100))
    assert torch.equal(call(deform_conv2d, s), call(deform_conv2d, outside))
    actual, expected = gradients(deform_conv2d, s), gradients(deform_conv2d, outside)
    for tensor in expected:
        assert torch.equal(actual[tensor], expected[tensor]), tensor
    assert (actual["offset"][hostile] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30, -1.0, 9.0])
def test_no_pixel_is_read_outside(value):
    """An image of NaN, and nothing sampled from it: what is left is the bias."""
    s = sample(Case(size=(9, 9), kernel=(1, 1), padding=0))
    image = torch.full_like(s.args[0], torch.nan)
    first = torch.arange(9, dtype=torch.float32)  # what the offset is added to
    offset = torch.full_like(s.args[1], value)
    if abs(value) < 100:
        offset = torch.stack([offset[:, 0] - first[:, None], offset[:, 1] - first], dim=1)
    out = call(deform_conv2d, s.replace(input=image, offset=offset))
    assert torch.equal(out, s.args[3][None, :, None, None].expand_as(out))


@pytest.mark.parametrize("name", ["mask_bias", "integers", "borders", "groups_8", "depthwise", "shared"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_pixels_do_not_leak(name, value):
    """Just the results that have a bad pixel among their corners are NaN or infinite."""
    s = sample(name, torch.float64)
    image = s.args[0].clone()
    image[0, :, 2, 3] = value
    image[0, :, 0, 0] = value
    image[0, :, -1, -1] = value
    s = s.replace(input=image)
    out = call(deform_conv2d, s)
    assert not out[0].isfinite().all() and out[0].isfinite().any()
    assert out[1].isfinite().all()
    assert_close(out, call(oracle, s), torch.float64)


@pytest.mark.parametrize("name", ["mask_bias", "far", "borders", "groups_8", "depthwise", "offset_groups_2"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_masks_spoil_their_pixel(torchvision, name, value):
    """A mask is multiplied with its sample even where the sample is zero, being outside: 0 * inf is NaN."""
    s = sample(name, torch.float64)
    mask = s.kwargs["mask"].clone()
    mask[0, 1, 2, 3:5] = value
    mask[1, -1, 0, 0] = value
    s = s.replace(mask=mask)
    out = call(deform_conv2d, s)
    bad = ~out.isfinite().all(1)
    assert bad.nonzero().tolist() == [[0, 2, 3], [0, 2, 4], [1, 0, 0]]
    assert_close(out, call(oracle, s), torch.float64)
    assert_close(out, call(torchvision.ops.deform_conv2d, s), torch.float64)


# Gradients


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_torchvisions(torchvision, name):
    s = sample(name, torch.float64)
    assert_same_gradients(gradients(deform_conv2d, s), gradients(torchvision.ops.deform_conv2d, s), torch.float64)


def gradcheck(case: Case, **options) -> None:
    s = sample(dataclasses.replace(case, offsets="smooth"), torch.float64)
    convolution.assert_gradcheck(deform_conv2d, s, **options)


@pytest.mark.parametrize(
    "name",
    ["mask_bias", "neither", "stride_padding_dilation", "kernel_1x4", "groups_8", "depthwise", "shared_37",
     "offset_groups_across_groups", "depthwise_offset_groups", "empty_batch", "one_input_pixel", "input_transposed",
     "offset_sliced", "all_channels_last", "weight_permuted"],
)  # fmt: skip
def test_gradcheck(name):
    """The derivative along a random direction."""
    gradcheck(CASES[name], fast_mode=True)


@pytest.mark.parametrize(
    "case",
    [
        Case(channels=2, out_channels=2, size=(3, 4), kernel=(2, 1), padding=(1, 0)),
        Case(
            batch=1, channels=4, out_channels=4, size=(2, 3), kernel=(1, 2), padding=(1, 1), groups=2, offset_groups=4
        ),
        Case(batch=1, channels=3, out_channels=3, size=(3, 3), kernel=(2, 2), groups=3, weight_layout="shared"),
    ],
)
def test_gradcheck_of_every_element(case):
    gradcheck(case)


def test_gradient_at_exactly_minus_one():
    """The sample is zero there; its derivative by the offset is not: it is the one to the right."""
    image = torch.tensor([[[[3.0, 5.0], [7.0, 11.0]]]], requires_grad=True)
    offset = torch.tensor([-1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2).clone().requires_grad_()
    mask = torch.ones(1, 1, 2, 2, requires_grad=True)
    out = deform_conv2d(image, offset, torch.ones(1, 1, 1, 1), mask=mask)
    assert out.tolist() == [[[[0, 0], [3, 5]]]]
    out.sum().backward()
    assert offset.grad[0, 0].tolist() == [[3, 5], [4, 6]]  # by y: at y = -1, and at y = 0
    assert offset.grad[0, 1].tolist() == [[0, 0], [2, -5]]  # by x: nothing at y = -1, zeros right of the image
    assert image.grad.tolist() == [[[[1, 1], [0, 0]]]]
    assert mask.grad.tolist() == out.tolist()


def test_gradient_at_the_far_end():
    """At H and W neither the sample nor its derivative sees the image."""
    image = torch.tensor([[[[3.0, 5.0], [7.0, 11.0]]]], requires_grad=True)
    offset = torch.tensor([2.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2).clone().requires_grad_()
    out = deform_conv2d(image, offset, torch.ones(1, 1, 1, 1))
    out.sum().backward()
    assert not out.any() and not offset.grad.any() and not image.grad.any()


def test_bad_gradients_do_not_leak():
    """A pixel that is a corner with no weight, as at integer coordinates, gets nothing of the gradient."""
    image = torch.zeros(1, 1, 3, 3, requires_grad=True)
    out = deform_conv2d(image, torch.zeros(1, 2, 3, 3), torch.ones(1, 1, 1, 1))
    gradient = torch.ones(1, 1, 3, 3)
    gradient[0, 0, 1, 1] = torch.nan
    out.backward(gradient)
    assert image.grad.isnan().nonzero().tolist() == [[0, 0, 1, 1]]


def test_each_gradient_alone():
    convolution.assert_each_gradient_alone(deform_conv2d, sample("groups_2", torch.float64))


def test_gradient_of_a_non_contiguous_gradient():
    convolution.assert_same_gradients_by(
        partial(arrange, layout="channels_last"), deform_conv2d, sample("mask_bias", torch.float64)
    )


def test_double_backward_says_that_it_is_not_supported():
    convolution.assert_no_double_backward(deform_conv2d, sample("mask_bias"))


# What PyTorch asks of an operator


@pytest.mark.parametrize(
    "name", ["mask_bias", "neither", "numbers", "groups_across_offset_groups", "depthwise", "shared", "empty_batch",
             "one_input_pixel", "input_channels_last", "input_sliced", "weight_permuted", "hostile"]
)  # fmt: skip
def test_opcheck(name):
    convolution.opcheck(OP, OP_BACKWARD, sample(name))


@pytest.mark.parametrize("name", ["mask_bias", "neither", "shared", "empty_batch", "input_channels_last"])
def test_opcheck_with_dynamic_shapes(name):
    convolution.opcheck_with_dynamic_shapes(OP, sample(name))


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in CASES), ("mask_bias", torch.bfloat16)])
def test_fake_results_are_laid_out_like_real_ones(name, dtype):
    convolution.assert_fake_results_are_like_real_ones(OP, OP_BACKWARD, sample(name, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_follows_the_input(layout):
    convolution.assert_memory_format_follows(layout, call(deform_conv2d, sample(Case(layout=layout))))


def test_exported_with_dynamic_shapes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = DeformConv2d(4, 6, 3, stride=2, padding=1)

        def forward(self, input, offset, mask):
            return self.convolution(input, offset, mask)

    def arguments(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        out = ((height + 1) // 2, (width + 1) // 2)
        return torch.randn(batch, 4, height, width), torch.randn(batch, 18, *out), torch.rand(batch, 9, *out)

    model = Model()
    dynamic = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    program = torch.export.export(model, arguments(2, 7, 10), dynamic_shapes=(dynamic,) * 3)
    assert [node.target for node in program.graph.nodes].count(OP) == 1
    for size in ((3, 12, 9), (5, 20, 8), (2, 7, 10)):
        inputs = arguments(*size)
        assert torch.equal(program.module()(*inputs), model(*inputs))


# Autocast


@pytest.mark.parametrize("low", LOW_DTYPES, ids=str)
def test_autocast_computes_in_float32(low):
    """Offsets and mask come from a convolution that autocast ran in low precision; the input is float32."""
    s = sample("mask_bias")
    predict = nn.Conv2d(8, 27, 3, padding=1)
    input, _, weight, bias = s.args
    with torch.autocast("cpu", low):
        predicted = predict(input)
        assert predicted.dtype == low
        offset, mask = predicted[:, :18], predicted[:, 18:].sigmoid()
        out = deform_conv2d(input, offset, weight, bias, padding=1, mask=mask)
        from_low = deform_conv2d(input.to(low), offset, weight, bias, padding=1, mask=mask)
    assert out.dtype == torch.float32
    assert torch.equal(out, deform_conv2d(input, offset.float(), weight, bias, padding=1, mask=mask.float()))
    in_float32 = deform_conv2d(input.to(low).float(), offset.float(), weight, bias, padding=1, mask=mask.float())
    assert from_low.dtype == low
    assert torch.equal(from_low, in_float32.to(low))


def test_gradients_under_autocast():
    def of_low_offsets(input, offset, weight, bias, mask, **geometry):
        return deform_conv2d(input, offset.bfloat16(), weight, bias, mask=mask.bfloat16(), **geometry)

    s = sample("mask_bias")
    rounded = s.replace(offset=s.args[1].bfloat16().float(), mask=s.kwargs["mask"].bfloat16().float())
    convolution.assert_gradients_under_autocast(of_low_offsets, s, gradients(deform_conv2d, rounded))


def test_float64_under_autocast():
    convolution.assert_autocast_leaves_float64(deform_conv2d, sample("mask_bias", torch.float64))


# Wrong arguments


RIGHT = {
    "input": torch.zeros(2, 8, 7, 9),
    "offset": torch.zeros(2, 36, 7, 9),  # 2 offset groups
    "weight": torch.zeros(6, 4, 3, 3),  # 2 groups
    "bias": torch.zeros(6),
    "mask": torch.zeros(2, 18, 7, 9),
    "stride": 1,
    "padding": 1,
    "dilation": 1,
}

# What is changed in a right call, and what the error says.
WRONG = {
    **wrong_kinds(RIGHT),
    **convolution.WRONG_GEOMETRY,
    **convolution.WRONG_WEIGHTS,
    "input_rank": (
        {"input": torch.zeros(8, 7, 9)},
        "input must have 4 dimensions, got shape (8, 7, 9)",
    ),
    "offset_rank": (
        {"offset": torch.zeros(36, 7, 9)},
        "offset must have 4 dimensions, got shape (36, 7, 9)",
    ),
    "mask_rank": (
        {"mask": torch.zeros(2, 18, 7, 9, 1)},
        "mask must have 4 dimensions, got shape (2, 18, 7, 9, 1)",
    ),
    "no_channels": (
        {"input": torch.zeros(2, 0, 7, 9)},
        "input's channels must be a positive multiple of weight.shape[1] = 4, got 0",
    ),
    "channels": (
        {"input": torch.zeros(2, 9, 7, 9)},
        "input's channels must be a positive multiple of weight.shape[1] = 4, got 9",
    ),
    "no_height": (
        {"input": torch.zeros(2, 8, 0, 9)},
        "input must have a positive height and width, got shape (2, 8, 0, 9)",
    ),
    "kernel_too_large": (
        {"dilation": (4, 1), "padding": 0},
        "the kernel does not fit into the padded input: the output would be -1 x 7",
    ),
    "offset_channels": (
        {"offset": torch.zeros(2, 20, 7, 9)},
        "offset.shape[1] must be a positive multiple of 2 * 3 * 3 = 18, got 20",
    ),
    "no_offset_channels": (
        {"offset": torch.zeros(2, 0, 7, 9)},
        "offset.shape[1] must be a positive multiple of 2 * 3 * 3 = 18, got 0",
    ),
    "offset_groups": (
        {"offset": torch.zeros(2, 54, 7, 9)},
        "input's channels must be divisible by the 3 offset groups, got 8",
    ),
    "offset_batch": (
        {"offset": torch.zeros(3, 36, 7, 9)},
        "offset must have shape (2, 36, 7, 9), got (3, 36, 7, 9)",
    ),
    "offset_size": (
        {"offset": torch.zeros(2, 36, 6, 9)},
        "offset must have shape (2, 36, 7, 9), got (2, 36, 6, 9)",
    ),
    "mask_batch": (
        {"mask": torch.zeros(1, 18, 7, 9)},
        "mask must have shape (2, 18, 7, 9), got (1, 18, 7, 9)",
    ),
    "mask_channels": (
        {"mask": torch.zeros(2, 9, 7, 9)},
        "mask must have shape (2, 18, 7, 9), got (2, 9, 7, 9)",
    ),
    "mask_size": (
        {"mask": torch.zeros(2, 18, 7, 8)},
        "mask must have shape (2, 18, 7, 9), got (2, 18, 7, 8)",
    ),
}


# What compiling and exporting could treat in a way of their own.
WRONG_TRACED = (
    "integers", "input_device", "stride_of_three", "input_rank", "channels", "no_height", "kernel_too_large",
    "offset_batch",
)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_right_arguments(mode):
    run_in(mode, deform_conv2d, RIGHT)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    assert_refused(MODES if wrong in WRONG_TRACED else QUICK, deform_conv2d, RIGHT, WRONG[wrong])


def test_wrong_arguments_of_the_backward():
    s = sample("mask_bias")
    arguments = list(s.positional)
    arguments[1] = arguments[1][:, :, 1:]
    with pytest.raises(RuntimeError, match="deform_conv2d: offset must have shape"):
        OP_BACKWARD(gradient_like(call(deform_conv2d, s)), *arguments, [True] * 5)


# The module


@pytest.mark.parametrize("name", convolution.MODULES)
def test_module_is_torchvisions(torchvision, name):
    ours, theirs = convolution.modules_of_the_same_state(DeformConv2d, torchvision.ops.DeformConv2d, name)
    assert repr(ours) == repr(theirs)
    input = torch.randn(2, 8, 7, 9)
    case = Case(size=(7, 9), kernel=ours.kernel_size, stride=ours.stride, padding=ours.padding, dilation=ours.dilation)
    s = sample(case)
    for mask in (None, s.kwargs["mask"]):
        assert_close(ours(input, s.args[1], mask), theirs(input, s.args[1], mask), torch.float32)


def test_module_calls_the_function():
    s = sample("stride_padding_dilation")
    case = s.case
    module = DeformConv2d(case.channels, case.out_channels, case.kernel, case.stride, case.padding, case.dilation)
    expected = call(deform_conv2d, s.replace(weight=module.weight, bias=module.bias))
    assert torch.equal(module(s.args[0], s.args[1], s.kwargs["mask"]), expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (convolution.MODULES["plain"], "DeformConv2d(8, 6, kernel_size=(3, 3), stride=(1, 1))"),
        (
            convolution.MODULES["everything"],
            "DeformConv2d(8, 6, kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, "
            "bias=False)",
        ),
        (
            convolution.MODULES["some"],
            "DeformConv2d(8, 8, kernel_size=(1, 1), stride=(2, 2), padding=(3, 3), groups=8)",
        ),
    ],
)
def test_module_repr(options, text):
    assert repr(DeformConv2d(**options)) == text


@pytest.mark.parametrize("channels", [(8, 6), (6, 8)])
def test_module_channels_must_be_divisible_by_groups(channels):
    with pytest.raises(ValueError, match="_channels must be divisible by groups"):
        DeformConv2d(*channels, 3, groups=4)


# torchvision's operators in terms of this package's


@pytest.mark.parametrize(
    "name", ["mask_bias", "neither", "stride_padding_dilation", "groups_across_offset_groups", "shared"]
)
def test_torchvisions_operators(torchvision, name):
    arguments = as_torchvision(sample(name, torch.float64))
    out = TORCHVISION["deform_conv2d"](*arguments)
    assert_close(out, torch.ops.torchvision.deform_conv2d(*arguments), torch.float64)

    actual = TORCHVISION["_deform_conv2d_backward"](gradient_like(out), *arguments)
    expected = torch.ops.torchvision._deform_conv2d_backward(gradient_like(out), *arguments)
    assert len(actual) == len(expected) == 5
    for a, b in zip(actual, expected):
        assert_close(a, b, torch.float64)
