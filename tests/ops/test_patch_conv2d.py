"""What patch_conv2d means: values, gradients, argument checks, the module; nothing here is compiled by Inductor."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from inductor_vision import PatchConv2d, patch_conv2d
from inductor_vision.ops.patch_conv2d import CHANNELS_FIRST, CHANNELS_LAST, PATCHES_FIRST, memory_order
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.layouts import strides_of
from inductor_vision.tests.support.patch_conv2d import (
    CASES,
    LAYOUTS,
    TENSORS,
    Case,
    Sample,
    arrange,
    cases,
    gradient_like,
    gradient_oracle,
    oracle,
    sample,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

OP = torch.ops.inductor_vision.patch_conv2d.default
OP_BACKWARD = torch.ops.inductor_vision.patch_conv2d_backward.default

LOW_DTYPES = (torch.bfloat16, torch.float16)
QUICK = [name for name in CASES if name != "channels_700"]


def call(function, s: Sample) -> Tensor:
    return function(*s.args, **s.kwargs)


def convolution_of_a_batch(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """What the operator takes the place of."""
    out = F.conv2d(input.flatten(0, -4), weight, bias, stride, padding, dilation, groups)
    return out.reshape(*input.shape[:-3], *out.shape[1:])


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
def test_oracle_is_the_convolution_of_a_batch(name):
    s = sample(name, torch.float64)
    if s.args[0].numel() == 0:
        assert call(patch_conv2d, s).shape == oracle(s).shape
        return
    assert_close(oracle(s), call(convolution_of_a_batch, s), torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_decomposition_is_the_oracle(name):
    s = sample(name, torch.float64)
    with recorded_paths() as paths:
        out = call(patch_conv2d, s)
    assert [(path.op, path.kind) for path in paths] == [("patch_conv2d", "eager")]
    assert_close(out, oracle(s), torch.float64)


@pytest.mark.parametrize("dtype", (torch.float32, *LOW_DTYPES), ids=str)
@pytest.mark.parametrize("name", QUICK)
def test_values_in_each_dtype(name, dtype):
    s = sample(name, dtype)
    out = call(patch_conv2d, s)
    assert out.dtype == dtype
    assert_close(out, call(patch_conv2d, s.to(torch.float64)), dtype)


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_low_precision_sums_in_float32(dtype):
    """4608 ones: bf16 cannot count past 256, nor fp16 past 2048."""
    ones = torch.ones(1, 512, 3, 3, dtype=dtype)
    assert patch_conv2d(ones, ones).item() == 9 * 512


def test_defaults_are_those_of_a_convolution():
    s = sample(Case(padding=0, bias=False), torch.float64)
    assert_close(patch_conv2d(*s.args[:2]), convolution_of_a_batch(*s.args[:2]), torch.float64)


@settings(max_examples=100)
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


@pytest.mark.parametrize("dtype", (torch.float32, *LOW_DTYPES), ids=str)
@pytest.mark.parametrize("name", QUICK)
def test_gradients_in_each_dtype(name, dtype):
    s = sample(name, dtype)
    actual = gradients(patch_conv2d, s)
    assert all(gradient.dtype == dtype for gradient in actual.values())
    assert_same_gradients(actual, gradients(patch_conv2d, s.to(torch.float64)), dtype)


def gradcheck(case: Case, **options) -> bool:
    s = sample(case, torch.float64).requiring_grad()
    tensors = s.tensors
    if case.weight_layout == "shared":  # gradcheck wants each input to have memory of its own
        tensors["weight"] = tensors["weight"][:1].detach().requires_grad_()

    def function(*values: Tensor) -> Tensor:
        named = dict(zip(tensors, values))
        named["weight"] = named["weight"].expand(s.args[1].shape)
        return call(patch_conv2d, s.replace(**named))

    return torch.autograd.gradcheck(function, tuple(tensors.values()), **options)


@pytest.mark.parametrize("name", [name for name in QUICK if CASES[name].layout != "expanded"])
def test_gradcheck(name):
    """The derivative along a random direction."""
    assert gradcheck(CASES[name], fast_mode=True)


@pytest.mark.parametrize("layout", ["patches_first", "channels_first", "channels_last"])
def test_gradcheck_of_every_element(layout):
    case = Case(patches=2, channels=4, out_channels=2, size=(2, 3), kernel=(2, 3), stride=(1, 2), groups=2)
    assert gradcheck(dataclasses.replace(case, layout=layout))


@pytest.mark.parametrize("wanted", TENSORS)
@pytest.mark.parametrize("name", ["groups_2", "input_channels_first", "unbatched_channels_last"])
def test_each_gradient_alone(name, wanted):
    s = sample(name, torch.float64)
    expected = gradients(patch_conv2d, s)[wanted]
    s = s.requiring_grad(wanted)
    out = call(patch_conv2d, s)
    out.backward(gradient_like(out))
    assert {name for name, tensor in s.tensors.items() if tensor.grad is not None} == {wanted}
    assert_close(s.tensors[wanted].grad, expected, torch.float64)


def test_gradient_of_a_non_contiguous_gradient():
    s = sample("plain", torch.float64).requiring_grad()
    out = call(patch_conv2d, s)
    expected = torch.autograd.grad(out, list(s.tensors.values()), gradient_like(out), retain_graph=True)
    for layout in ("channels_last", "stepped", "sliced_patches_last"):
        grad = arrange(gradient_like(out), layout)
        for a, b in zip(torch.autograd.grad(out, list(s.tensors.values()), grad, retain_graph=True), expected):
            assert_close(a, b, torch.float64)


def test_double_backward_says_that_it_is_not_supported():
    s = sample("plain").requiring_grad()
    (gradient,) = torch.autograd.grad(call(patch_conv2d, s).square().sum(), s.args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="patch_conv2d: double backward is not supported"):
        gradient.sum().backward()


# What PyTorch asks of an operator


@pytest.mark.parametrize("name", sorted({*QUICK[::4], *(name for name in QUICK if name.startswith("input_"))}))
def test_opcheck(name):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    torch.library.opcheck(OP, sample(name).positional, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "name",
    ["plain", "groups_2", "no_patches", "input_channels_first", "input_channels_last", "weight_shared"],
)
def test_opcheck_with_autograd_and_dynamic_shapes(name):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    torch.library.opcheck(
        OP,
        sample(name).requiring_grad().positional,
        test_utils=("test_autograd_registration", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("name", ["no_bias", "empty_batch", "input_channels_last"])
@pytest.mark.parametrize("which", ["all", "input", "none"])
def test_opcheck_of_the_backward(name, which):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    s = sample(name)
    present = [key in s.tensors for key in TENSORS]
    wanted = {"all": present, "input": [True, False, False], "none": [False] * 3}[which]
    arguments = (gradient_like(OP(*s.positional)), *s.positional, wanted)
    torch.library.opcheck(OP_BACKWARD, arguments)


def described(result: Tensor | tuple[Tensor, ...]) -> list[tuple]:
    results = (result,) if isinstance(result, Tensor) else result
    return [(t.shape, strides_of(t), t.dtype, t.device) for t in results]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", QUICK)
def test_fake_results_are_laid_out_like_real_ones(name, dtype):
    s = sample(name, dtype)
    out = OP(*s.positional)
    wanted = [key in s.tensors for key in TENSORS]
    results = [out, OP_BACKWARD(gradient_like(out), *s.positional, wanted)]
    with FakeTensorMode() as mode:
        fake = s.replace(**{key: mode.from_tensor(tensor) for key, tensor in s.tensors.items()})
        fake_out = OP(*fake.positional)
        fake_results = [fake_out, OP_BACKWARD(torch.empty_like(fake_out), *fake.positional, wanted)]
    assert list(map(described, fake_results)) == list(map(described, results))


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


# Autocast


@pytest.mark.parametrize("low", LOW_DTYPES, ids=str)
def test_autocast_computes_in_lower_precision(low):
    """As of the convolution whose place it takes: whatever comes, low precision goes."""
    s = sample("plain")
    expected = call(patch_conv2d, s.to(low))
    for dtype in (torch.float32, *LOW_DTYPES):
        with torch.autocast("cpu", low):
            out = call(patch_conv2d, s.replace(input=s.args[0].to(dtype)))
            assert call(convolution_of_a_batch, s).dtype == low
        assert out.dtype == low
        if dtype == torch.float32:
            assert torch.equal(out, expected)


def test_gradients_under_autocast():
    s = sample("plain").requiring_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = call(patch_conv2d, s)
    actual = dict(zip(s.tensors, torch.autograd.grad(out, list(s.tensors.values()), gradient_like(out))))
    assert all(gradient.dtype == torch.float32 for gradient in actual.values())
    assert_same_gradients(actual, gradients(patch_conv2d, sample("plain")), torch.bfloat16)


def test_float64_under_autocast():
    s = sample("plain", torch.float64)
    expected = call(patch_conv2d, s)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(patch_conv2d, s), expected)


# Wrong arguments


def _right() -> dict:
    return {
        "input": torch.zeros(2, 5, 8, 4, 6),
        "weight": torch.zeros(6, 4, 3, 3),
        "bias": torch.zeros(6),
        "stride": 1,
        "padding": 1,
        "dilation": 1,
        "groups": 2,
    }


_integers = {name: value.int() for name, value in _right().items() if isinstance(value, Tensor)}

# What is changed in a right call, and what the error says.
WRONG = {
    "input_of_three_dimensions": (
        {"input": torch.zeros(8, 4, 6)},
        "input must have 5 dimensions, or 4 without a batch, got shape (8, 4, 6)",
    ),
    "input_of_six_dimensions": (
        {"input": torch.zeros(1, 2, 5, 8, 4, 6)},
        "input must have 5 dimensions, or 4 without a batch, got shape (1, 2, 5, 8, 4, 6)",
    ),
    "weight_rank": (
        {"weight": torch.zeros(6, 4, 3)},
        "weight must have 4 dimensions, got shape (6, 4, 3)",
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
        {"input": torch.zeros(2, 5, 8, 4, 6, dtype=torch.complex64)},
        "input must be one of torch.float32, torch.float64, torch.bfloat16, torch.float16, got torch.complex64",
    ),
    "weight_dtype": (
        {"weight": torch.zeros(6, 4, 3, 3, dtype=torch.bfloat16)},
        "weight must have input's dtype torch.float32, got torch.bfloat16",
    ),
    "bias_dtype": (
        {"bias": torch.zeros(6, dtype=torch.int64)},
        "bias must have input's dtype torch.float32, got torch.int64",
    ),
    "input_device": (
        {"input": torch.zeros(2, 5, 8, 4, 6, device="meta")},
        "weight must be on input's device meta, got cpu",
    ),
    "weight_device": (
        {"weight": torch.zeros(6, 4, 3, 3, device="meta")},
        "weight must be on input's device cpu, got meta",
    ),
    "bias_device": (
        {"bias": torch.zeros(6, device="meta")},
        "bias must be on input's device cpu, got meta",
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
    "padding_of_one": (
        {"padding": (1,)},
        "padding must be a number or a pair, got (1,)",
    ),
    "dilation_0": (
        {"dilation": (0, 1)},
        "dilation must be at least 1, got (0, 1)",
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
    "out_channels": (
        {"weight": torch.zeros(5, 4, 3, 3)},
        "weight.shape[0] must be divisible by groups = 8 // 4 = 2, got 5",
    ),
    "weight_empty": (
        {"weight": torch.zeros(6, 4, 0, 3)},
        "weight must not be empty, got shape (6, 4, 0, 3)",
    ),
    "no_outputs": (
        {"weight": torch.zeros(0, 4, 3, 3), "bias": torch.zeros(0)},
        "weight must not be empty, got shape (0, 4, 3, 3)",
    ),
    "bias_shape": (
        {"bias": torch.zeros(5)},
        "bias must have shape (6,), got (5,)",
    ),
    "kernel_too_large": (
        {"dilation": (3, 1), "padding": 0},
        "the kernel does not fit into the padded input: the output would be -2 x 4",
    ),
}


class _Call(nn.Module):
    def __init__(self, **geometry):
        super().__init__()
        self.geometry = geometry

    def forward(self, *tensors):
        return patch_conv2d(*tensors, **self.geometry)


def _call(changes: dict) -> tuple[_Call, list[Tensor]]:
    arguments = {**_right(), **changes}
    model = _Call(**{name: arguments.pop(name) for name in ("stride", "padding", "dilation", "groups")})
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
    with pytest.raises(RuntimeError, match=re.escape(f"patch_conv2d: {message}")):
        MODES[mode](*_call(changes))


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_of_dynamic_shape(wrong):
    """The message is the same up to its first number: a size may have a symbol for a name."""
    changes, message = WRONG[wrong]
    words = re.match(r"[^\d(-]*", message).group()
    model, tensors = _call(changes)
    with pytest.raises(RuntimeError, match=re.escape(f"patch_conv2d: {words}")):
        torch.compile(model, backend="eager", fullgraph=True, dynamic=True)(*tensors)


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

MODULES = {
    "plain": {"in_channels": 8, "out_channels": 6, "kernel_size": 3},
    "everything": {
        "in_channels": 8, "out_channels": 6, "kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0),
        "dilation": (1, 2), "groups": 2, "bias": False,
    },
    "some": {"in_channels": 8, "out_channels": 8, "kernel_size": 1, "stride": 2, "padding": 3, "groups": 8},
}  # fmt: skip


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_module_is_a_convolution(options):
    torch.manual_seed(3)
    theirs = nn.Conv2d(**options)
    torch.manual_seed(3)
    ours = PatchConv2d(**options)
    assert repr(ours) == repr(theirs).replace("Conv2d", "PatchConv2d", 1)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name

    torch.manual_seed(4)
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
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


@pytest.mark.parametrize("call", [lambda: PatchConv2d(8, 6, 3, padding="same"), lambda: _call({"padding": "same"})])
def test_padding_is_in_numbers(call):
    with pytest.raises(ValueError, match="padding must be a number, or one for each of height and width, got 'same'"):
        model, tensors = call()
        model(*tensors)


@pytest.mark.parametrize("channels", [(8, 6), (6, 8)])
def test_module_channels_must_be_divisible_by_groups(channels):
    with pytest.raises(ValueError, match="_channels must be divisible by groups"):
        PatchConv2d(*channels, 3, groups=4)
