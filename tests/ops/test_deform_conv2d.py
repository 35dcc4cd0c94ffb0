"""What deform_conv2d means: values, gradients, argument checks, modules; nothing here is compiled by Inductor."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from inductor_vision import DeformConv2d, deform_conv2d
from inductor_vision.ops.registry import TORCHVISION
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.deform_conv2d import (
    CASES,
    HOSTILE,
    TENSORS,
    Case,
    Sample,
    as_torchvision,
    cases,
    gradient_like,
    oracle,
    sample,
)
from inductor_vision.tests.support.layouts import LAYOUTS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

OP = torch.ops.inductor_vision.deform_conv2d.default
OP_BACKWARD = torch.ops.inductor_vision.deform_conv2d_backward.default

DTYPES = (torch.float32, torch.float64)
LOW_DTYPES = (torch.bfloat16, torch.float16)


def call(function, s: Sample) -> Tensor:
    return function(*s.args, **s.kwargs)


def gradients(function, s: Sample) -> dict[str, Tensor]:
    """The gradient of each tensor of the call, by a fixed random gradient of its result."""
    s = s.requiring_grad()
    out = call(function, s)
    return dict(zip(s.tensors, torch.autograd.grad(out, list(s.tensors.values()), gradient_like(out))))


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], dtype, f"gradient of {name}")


# Values


@pytest.mark.parametrize("name", CASES)
def test_oracle_is_torchvision(torchvision, name):
    s = sample(name, torch.float64)
    assert_close(call(oracle, s), call(torchvision.ops.deform_conv2d, s), torch.float64)


@pytest.mark.parametrize("name", [*CASES, *HOSTILE])
def test_decomposition_is_the_oracle(name):
    s = sample(name, torch.float64)
    with recorded_paths() as paths:
        out = call(deform_conv2d, s)
    assert [(path.op, path.kind) for path in paths] == [("deform_conv2d", "eager")]
    assert_close(out, call(oracle, s), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_are_torchvisions(torchvision, name, dtype):
    s = sample(name, dtype)
    assert_close(call(deform_conv2d, s), call(torchvision.ops.deform_conv2d, s), dtype)


@pytest.mark.parametrize("dtype", (torch.float32, *LOW_DTYPES), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_in_each_dtype(name, dtype):
    s = sample(name, dtype)
    out = call(deform_conv2d, s)
    assert out.dtype == dtype
    assert_close(out, call(deform_conv2d, s.to(torch.float64)), dtype)


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


@settings(max_examples=100)
@given(case=cases())
def test_any_case_is_the_oracle(case):
    s = sample(case, torch.float64)
    assert_close(call(deform_conv2d, s), call(oracle, s), torch.float64)


@settings(max_examples=150)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_torchvisions(torchvision, name, dtype):
    s = sample(name, dtype)
    assert_same_gradients(gradients(deform_conv2d, s), gradients(torchvision.ops.deform_conv2d, s), dtype)


@pytest.mark.parametrize("dtype", (torch.float32, *LOW_DTYPES), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_in_each_dtype(name, dtype):
    s = sample(name, dtype)
    actual, expected = gradients(deform_conv2d, s), gradients(deform_conv2d, s.to(torch.float64))
    assert all(gradient.dtype == dtype for gradient in actual.values())
    assert_same_gradients(actual, expected, dtype)


def gradcheck(case: Case, **options) -> bool:
    s = sample(dataclasses.replace(case, offsets="smooth"), torch.float64).requiring_grad()
    tensors = s.tensors
    if case.weight_layout == "shared":  # gradcheck wants each input to have memory of its own
        tensors["weight"] = tensors["weight"][:1].detach().requires_grad_()

    def function(*values: Tensor) -> Tensor:
        named = dict(zip(tensors, values))
        named["weight"] = named["weight"].expand(s.args[2].shape)
        return call(deform_conv2d, s.replace(**named))

    return torch.autograd.gradcheck(function, tuple(tensors.values()), **options)


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if "expanded" not in (case.layout, case.offset_layout)]
)
def test_gradcheck(name):
    """The derivative along a random direction."""
    assert gradcheck(CASES[name], fast_mode=True)


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
    assert gradcheck(case)


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


@pytest.mark.parametrize("wanted", ["input", "offset", "weight", "bias", "mask"])
def test_each_gradient_alone(wanted):
    s = sample("groups_2", torch.float64)
    expected = gradients(deform_conv2d, s)[wanted]
    s = s.requiring_grad(wanted)
    out = call(deform_conv2d, s)
    out.backward(gradient_like(out))
    assert {name for name, tensor in s.tensors.items() if tensor.grad is not None} == {wanted}
    assert torch.equal(s.tensors[wanted].grad, expected)


def test_gradient_of_a_non_contiguous_gradient():
    s = sample("mask_bias", torch.float64).requiring_grad()
    out = call(deform_conv2d, s)
    expected = torch.autograd.grad(out, list(s.tensors.values()), gradient_like(out), retain_graph=True)
    strided = gradient_like(out).transpose(1, 3).contiguous().transpose(1, 3)
    actual = torch.autograd.grad(out, list(s.tensors.values()), strided)
    for a, b in zip(actual, expected):
        assert_close(a, b, torch.float64)


def test_double_backward_says_that_it_is_not_supported():
    s = sample("mask_bias").requiring_grad()
    (gradient,) = torch.autograd.grad(call(deform_conv2d, s).square().sum(), s.args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="deform_conv2d: double backward is not supported"):
        gradient.sum().backward()


# What PyTorch asks of an operator


@pytest.mark.parametrize("name", [*CASES, *HOSTILE])
def test_opcheck(name):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    torch.library.opcheck(OP, sample(name).positional, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "name",
    ["mask_bias", "neither", "numbers", "groups_across_offset_groups", "depthwise", "shared", "empty_batch",
     "one_input_pixel", "input_channels_last", "input_sliced", "weight_permuted"],
)  # fmt: skip
def test_opcheck_with_autograd_and_dynamic_shapes(name):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    torch.library.opcheck(
        OP,
        sample(name).requiring_grad().positional,
        test_utils=("test_autograd_registration", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("name", ["mask_bias", "neither", "shared", "empty_batch", "input_channels_last"])
@pytest.mark.parametrize("which", ["all", "input", "none"])
def test_opcheck_of_the_backward(name, which):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    s = sample(name)
    present = [key in s.tensors for key in TENSORS]
    wanted = {"all": present, "input": [True] + [False] * 4, "none": [False] * 5}[which]
    arguments = (gradient_like(call(deform_conv2d, s)), *s.positional, wanted)
    torch.library.opcheck(OP_BACKWARD, arguments)


def described(result: Tensor | tuple[Tensor, ...]) -> list[tuple]:
    results = (result,) if isinstance(result, Tensor) else result
    return [(t.shape, t.stride(), t.dtype, t.device) for t in results]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fake_results_are_laid_out_like_real_ones(name, dtype):
    s = sample(name, dtype)
    out = call(deform_conv2d, s)
    wanted = [key in s.tensors for key in TENSORS]
    results = [out, OP_BACKWARD(gradient_like(out), *s.positional, wanted)]
    with FakeTensorMode() as mode:
        fake = s.replace(**{key: mode.from_tensor(tensor) for key, tensor in s.tensors.items()})
        fake_out = call(deform_conv2d, fake)
        fake_results = [fake_out, OP_BACKWARD(torch.empty_like(fake_out), *fake.positional, wanted)]
    assert list(map(described, fake_results)) == list(map(described, results))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_follows_the_input(layout):
    out = call(deform_conv2d, sample(Case(layout=layout)))
    channels_last = layout in ("channels_last", "sliced_channels_last")
    assert out.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert out.is_contiguous() != channels_last


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
    s = sample("mask_bias").requiring_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = call(deform_conv2d, s.replace(offset=s.args[1].bfloat16(), mask=s.kwargs["mask"].bfloat16()))
    actual = dict(zip(s.tensors, torch.autograd.grad(out, list(s.tensors.values()), gradient_like(out))))
    assert all(gradient.dtype == torch.float32 for gradient in actual.values())
    rounded = sample("mask_bias")
    rounded = rounded.replace(offset=rounded.args[1].bfloat16().float(), mask=rounded.kwargs["mask"].bfloat16().float())
    assert_same_gradients(actual, gradients(deform_conv2d, rounded), torch.bfloat16)


def test_float64_under_autocast():
    s = sample("mask_bias", torch.float64)
    expected = call(deform_conv2d, s)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(deform_conv2d, s), expected)


# Wrong arguments


def _right() -> dict:
    return {
        "input": torch.zeros(2, 8, 7, 9),
        "offset": torch.zeros(2, 36, 7, 9),  # 2 offset groups
        "weight": torch.zeros(6, 4, 3, 3),  # 2 groups
        "bias": torch.zeros(6),
        "mask": torch.zeros(2, 18, 7, 9),
        "stride": 1,
        "padding": 1,
        "dilation": 1,
    }


_integers = {name: value.int() for name, value in _right().items() if isinstance(value, Tensor)}

# What is changed in a right call, and what the error says.
WRONG = {
    "input_rank": (
        {"input": torch.zeros(8, 7, 9)},
        "input must have 4 dimensions, got shape (8, 7, 9)",
    ),
    "offset_rank": (
        {"offset": torch.zeros(36, 7, 9)},
        "offset must have 4 dimensions, got shape (36, 7, 9)",
    ),
    "weight_rank": (
        {"weight": torch.zeros(6, 4, 3)},
        "weight must have 4 dimensions, got shape (6, 4, 3)",
    ),
    "mask_rank": (
        {"mask": torch.zeros(2, 18, 7, 9, 1)},
        "mask must have 4 dimensions, got shape (2, 18, 7, 9, 1)",
    ),
    "bias_rank": (
        {"bias": torch.zeros(6, 1)},
        "bias must have shape (6,), got (6, 1)",
    ),
    "integers": (
        _integers,
        "input must be one of torch.float32, torch.float64, torch.bfloat16, torch.float16, got torch.int32",
    ),
    "complex": (
        {"input": torch.zeros(2, 8, 7, 9, dtype=torch.complex64)},
        "input must be one of torch.float32, torch.float64, torch.bfloat16, torch.float16, got torch.complex64",
    ),
    "offset_dtype": (
        {"offset": torch.zeros(2, 36, 7, 9, dtype=torch.float64)},
        "offset must have input's dtype torch.float32, got torch.float64",
    ),
    "weight_dtype": (
        {"weight": torch.zeros(6, 4, 3, 3, dtype=torch.bfloat16)},
        "weight must have input's dtype torch.float32, got torch.bfloat16",
    ),
    "bias_dtype": (
        {"bias": torch.zeros(6, dtype=torch.int64)},
        "bias must have input's dtype torch.float32, got torch.int64",
    ),
    "mask_dtype": (
        {"mask": torch.zeros(2, 18, 7, 9, dtype=torch.float16)},
        "mask must have input's dtype torch.float32, got torch.float16",
    ),
    "input_device": (
        {"input": torch.zeros(2, 8, 7, 9, device="meta")},
        "offset must be on input's device meta, got cpu",
    ),
    "offset_device": (
        {"offset": torch.zeros(2, 36, 7, 9, device="meta")},
        "offset must be on input's device cpu, got meta",
    ),
    "weight_device": (
        {"weight": torch.zeros(6, 4, 3, 3, device="meta")},
        "weight must be on input's device cpu, got meta",
    ),
    "bias_device": (
        {"bias": torch.zeros(6, device="meta")},
        "bias must be on input's device cpu, got meta",
    ),
    "mask_device": (
        {"mask": torch.zeros(2, 18, 7, 9, device="meta")},
        "mask must be on input's device cpu, got meta",
    ),
    "stride_0": (
        {"stride": 0},
        "stride must be at least 1, got (0, 0)",
    ),
    "one_stride_negative": (
        {"stride": (1, -1)},
        "stride must be at least 1, got (1, -1)",
    ),
    "stride_of_three": (
        {"stride": (1, 1, 1)},
        "stride must be a number or a pair, got (1, 1, 1)",
    ),
    "padding_negative": (
        {"padding": (1, -1)},
        "padding must be at least 0, got (1, -1)",
    ),
    "dilation_0": (
        {"dilation": (0, 1)},
        "dilation must be at least 1, got (0, 1)",
    ),
    "no_channels": (
        {"input": torch.zeros(2, 0, 7, 9)},
        "input's channels must be a positive multiple of weight.shape[1] = 4, got 0",
    ),
    "no_height": (
        {"input": torch.zeros(2, 8, 0, 9)},
        "input must have a positive height and width, got shape (2, 8, 0, 9)",
    ),
    "channels": (
        {"input": torch.zeros(2, 9, 7, 9)},
        "input's channels must be a positive multiple of weight.shape[1] = 4, got 9",
    ),
    "out_channels": (
        {"weight": torch.zeros(5, 4, 3, 3)},
        "weight.shape[0] must be divisible by groups = 8 // 4 = 2, got 5",
    ),
    "weight_empty": (
        {"weight": torch.zeros(6, 4, 0, 3)},
        "weight must not be empty, got shape (6, 4, 0, 3)",
    ),
    "bias_shape": (
        {"bias": torch.zeros(5)},
        "bias must have shape (6,), got (5,)",
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


class _Call(nn.Module):
    def __init__(self, **geometry):
        super().__init__()
        self.geometry = geometry

    def forward(self, input, offset, weight, bias, mask):
        return deform_conv2d(input, offset, weight, bias, mask=mask, **self.geometry)


def _call(changes: dict) -> tuple[_Call, list[Tensor]]:
    arguments = {**_right(), **changes}
    model = _Call(**{name: arguments.pop(name) for name in ("stride", "padding", "dilation")})
    return model, [arguments[name] for name in TENSORS]


MODES = {
    "eager": lambda model, tensors: model(*tensors),
    "compiled": lambda model, tensors: torch.compile(model, backend="eager", fullgraph=True)(*tensors),
    "exported": lambda model, tensors: torch.export.export(model, tuple(tensors)),
}


@pytest.mark.parametrize("mode", MODES)
def test_right_arguments(mode):
    MODES[mode](*_call({}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong, mode):
    changes, message = WRONG[wrong]
    with pytest.raises(RuntimeError, match=re.escape(f"deform_conv2d: {message}")):
        MODES[mode](*_call(changes))


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_of_dynamic_shape(wrong):
    """The message is the same up to its first number: a size may have a symbol for a name."""
    changes, message = WRONG[wrong]
    words = re.match(r"[^\d(-]*", message).group()
    model, tensors = _call(changes)
    with pytest.raises(RuntimeError, match=re.escape(f"deform_conv2d: {words}")):
        torch.compile(model, backend="eager", fullgraph=True, dynamic=True)(*tensors)


def test_wrong_arguments_of_the_backward():
    s = sample("mask_bias")
    arguments = list(s.positional)
    arguments[1] = arguments[1][:, :, 1:]
    with pytest.raises(RuntimeError, match="deform_conv2d: offset must have shape"):
        OP_BACKWARD(gradient_like(call(deform_conv2d, s)), *arguments, [True] * 5)


# The module

MODULES = {
    "plain": {"in_channels": 8, "out_channels": 6, "kernel_size": 3},
    "everything": {
        "in_channels": 8, "out_channels": 6, "kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0),
        "dilation": (1, 2), "groups": 2, "bias": False,
    },
    "some": {"in_channels": 8, "out_channels": 8, "kernel_size": 1, "stride": 2, "padding": 3, "groups": 8},
}  # fmt: skip


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_module_is_torchvisions(torchvision, options):
    torch.manual_seed(3)
    theirs = torchvision.ops.DeformConv2d(**options)
    torch.manual_seed(3)
    ours = DeformConv2d(**options)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name

    torch.manual_seed(4)
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
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
        (MODULES["plain"], "DeformConv2d(8, 6, kernel_size=(3, 3), stride=(1, 1))"),
        (
            MODULES["everything"],
            "DeformConv2d(8, 6, kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, "
            "bias=False)",
        ),
        (MODULES["some"], "DeformConv2d(8, 8, kernel_size=(1, 1), stride=(2, 2), padding=(3, 3), groups=8)"),
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
