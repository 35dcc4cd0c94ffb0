"""What depthwise_separable_conv2d means: values, gradients, argument checks, the module; nothing here is compiled by
Inductor."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from inductor_vision import DepthwiseSeparableConv2d, depthwise_separable_conv2d
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.depthwise_separable_conv2d import (
    ACTIVATIONS,
    CASES,
    TENSORS,
    Case,
    Sample,
    cases,
    gradient_like,
    oracle,
    sample,
)
from inductor_vision.tests.support.layouts import LAYOUTS, strides_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.nn.modules.utils import _pair

OP = torch.ops.inductor_vision.depthwise_separable_conv2d.default
OP_BACKWARD = torch.ops.inductor_vision.depthwise_separable_conv2d_backward.default

LOW_DTYPES = (torch.bfloat16, torch.float16)


def call(function, s: Sample) -> Tensor:
    return function(*s.args, **s.kwargs)


def activate(name: str | None, x: Tensor) -> Tensor:
    return x if name is None else getattr(F, name)(x)


def operator(*args, stride, padding, dilation, depthwise_activation, pointwise_activation) -> Tensor:
    """The function by the operator. Eagerly it is not what computes gradients, so that its own would not be seen."""
    pairs = map(_pair, (stride, padding, dilation))
    return activate(pointwise_activation, OP(*args, *pairs, depthwise_activation or "identity"))


def two_convolutions(
    input,
    depthwise_weight,
    pointwise_weight,
    depthwise_bias=None,
    pointwise_bias=None,
    stride=1,
    padding=0,
    dilation=1,
    depthwise_activation=None,
    pointwise_activation=None,
):
    """What the operator takes the place of, with autograd's gradients."""
    channels = input.shape[-3]
    hidden = F.conv2d(input, depthwise_weight, depthwise_bias, stride, padding, dilation, groups=channels)
    out = F.conv2d(activate(depthwise_activation, hidden), pointwise_weight, pointwise_bias)
    return activate(pointwise_activation, out)


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
def test_oracle_is_two_convolutions(name):
    s = sample(name, torch.float64)
    assert_close(call(oracle, s), call(two_convolutions, s), torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_decomposition_is_the_oracle(name):
    s = sample(name, torch.float64)
    with recorded_paths() as paths:
        out = call(depthwise_separable_conv2d, s)
    assert [(path.op, path.kind) for path in paths] == [("depthwise_separable_conv2d", "eager")]
    assert_close(out, call(oracle, s), torch.float64)


@pytest.mark.parametrize("dtype", (torch.float32, *LOW_DTYPES), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_in_each_dtype(name, dtype):
    s = sample(name, dtype)
    out = call(depthwise_separable_conv2d, s)
    assert out.dtype == dtype
    assert_close(out, call(depthwise_separable_conv2d, s.to(torch.float64)), dtype)


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_low_precision_sums_in_float32(dtype):
    """9 * 512 ones: bf16 cannot count past 256, nor fp16 past 2048. And nothing is rounded in between."""
    channels = 512
    ones, weight = torch.ones(1, channels, 3, 3, dtype=dtype), torch.ones(channels, 1, 3, 3, dtype=dtype)
    bias = torch.full((channels,), 2.0**-9, dtype=dtype)  # lost if 9 + bias were rounded
    out = depthwise_separable_conv2d(ones, weight, torch.ones(1, channels, 1, 1, dtype=dtype), bias)
    assert out.item() == torch.tensor(9 * channels + 1.0).to(dtype).item()
    differences = torch.ones(1, channels, 1, 1, dtype=dtype)
    differences[:, ::2] = -1  # all of it cancels but for what the first bias has more
    bias[1] = 2.0**-8
    assert depthwise_separable_conv2d(ones, weight, differences, bias).item() == 2.0**-9


@pytest.mark.parametrize("name", ["plain", "both_activations", "multiplier_2", "input_channels_last"])
def test_unbatched_input(name):
    s = sample(name, torch.float64)
    out = call(depthwise_separable_conv2d, s)
    one = call(depthwise_separable_conv2d, s.replace(input=s.args[0][1]))
    assert one.shape == out.shape[1:]
    assert_close(one, out[1], torch.float64)


@settings(max_examples=150)
@given(case=cases())
def test_any_case_is_the_oracle(case):
    s = sample(case, torch.float64)
    assert_close(call(depthwise_separable_conv2d, s), call(oracle, s), torch.float64)


@settings(max_examples=100)
@given(case=cases())
def test_any_gradient_is_autograds(case):
    s = sample(case, torch.float64)
    expected = gradients(two_convolutions, s)
    assert_same_gradients(gradients(operator, s), expected, torch.float64)


# NaN and infinity


@pytest.mark.parametrize("name", ["plain", "numbers", "padding_beyond_the_kernel", "input_channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_pixels_do_not_leak(name, value):
    """A pixel spoils the results that have it under their kernel, and no others; padding is not multiplied with it."""
    s = sample(dataclasses.replace(CASES[name], first=None), torch.float64)  # which would bound it
    image = s.args[0].clone()
    image[0, 3, 2, 3] = value
    image[0, 0, 0, 0] = value
    s = s.replace(input=image)
    out = call(depthwise_separable_conv2d, s)
    assert not out[0].isfinite().all() and out[0].isfinite().any()
    assert out[1].isfinite().all()
    assert_close(out, call(oracle, s), torch.float64)


@pytest.mark.parametrize("first", ["relu", "relu6", "leaky_relu", "hardsigmoid", "hardswish", "gelu", "silu"])
def test_nan_passes_through_activations(first):
    s = sample(dataclasses.replace(CASES["plain"], first=first), torch.float64)
    image = s.args[0].clone()
    image[0, 3, 2, 3] = torch.nan
    out = call(depthwise_separable_conv2d, s.replace(input=image))
    assert out.isnan().all(1).nonzero().tolist() == [[0, y, x] for y in (1, 2, 3) for x in (2, 3, 4)]


def test_padding_is_not_multiplied():
    """Infinite weights that lie on the padding alone add nothing: 0 * inf would be NaN."""
    weight = torch.ones(2, 1, 3, 3)
    weight[:, :, 0] = torch.inf
    out = depthwise_separable_conv2d(torch.ones(1, 2, 4, 4), weight, torch.ones(1, 2, 1, 1), padding=1)
    assert out[0, 0].tolist() == [[8, 12, 12, 8], *[[torch.inf] * 4] * 3]


# Gradients


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_autograds(name, dtype):
    s = sample(name, dtype)
    assert_same_gradients(gradients(operator, s), gradients(two_convolutions, s), dtype)


@pytest.mark.parametrize("name", ["plain", "both_activations", "input_channels_last", "weights_permuted"])
def test_gradients_in_eager_mode(name):
    """They are autograd's, of two convolutions: faster where each step is a pass over memory, and said to be so."""
    s = sample(name)
    with recorded_paths() as paths:
        actual = gradients(depthwise_separable_conv2d, s)
    assert [(path.kind, path.detail) for path in paths] == [
        ("eager", "the call was not compiled; two convolutions ran, for gradients")
    ]
    expected = gradients(two_convolutions, s)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for low in LOW_DTYPES:  # where the operator itself is more accurate
        with recorded_paths() as paths:
            actual = gradients(depthwise_separable_conv2d, s.to(low))
        assert {path.op for path in paths} == {"depthwise_separable_conv2d", "depthwise_separable_conv2d_backward"}


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_in_low_precision(name, dtype):
    s = sample(name, dtype)
    if s.case.second is not None:  # of which the argument is rounded, which may be to the other side of a kink
        s = sample(dataclasses.replace(s.case, second=None), dtype)
    actual, expected = (
        gradients(operator, s),
        gradients(operator, s.to(torch.float64)),
    )
    assert all(gradient.dtype == dtype for gradient in actual.values())
    assert_same_gradients(actual, expected, dtype)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.layout != "expanded"])
def test_gradcheck(name):
    """The derivative along a random direction."""
    s = sample(name, torch.float64).requiring_grad()
    tensors = s.tensors
    if s.case.weight_layout == "shared":  # gradcheck wants each input to have memory of its own
        tensors["depthwise_weight"] = tensors["depthwise_weight"][:1].detach().requires_grad_()

    def function(*values: Tensor) -> Tensor:
        named = dict(zip(tensors, values))
        named["depthwise_weight"] = named["depthwise_weight"].expand(s.args[1].shape)
        return call(operator, s.replace(**named))

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)


def test_gradcheck_of_every_element():
    case = Case(channels=2, multiplier=2, out_channels=3, size=(3, 4), kernel=(2, 3), stride=(1, 2), first="silu")
    s = sample(case, torch.float64).requiring_grad()
    assert torch.autograd.gradcheck(
        lambda *values: call(operator, s.replace(**dict(zip(s.tensors, values)))),
        tuple(s.tensors.values()),
    )


@pytest.mark.parametrize("name", ["both_activations", "multiplier_2", "input_channels_last"])
@pytest.mark.parametrize("wanted", TENSORS)
def test_each_gradient_alone(wanted, name):
    s = sample(name, torch.float64)
    expected = gradients(operator, s)[wanted]
    s = s.requiring_grad(wanted)
    out = call(operator, s)
    out.backward(gradient_like(out))
    assert {name for name, tensor in s.tensors.items() if tensor.grad is not None} == {wanted}
    assert_close(s.tensors[wanted].grad, expected, torch.float64)


def test_gradient_of_a_non_contiguous_gradient():
    s = sample("then_relu6", torch.float64).requiring_grad()
    out = call(operator, s)
    expected = torch.autograd.grad(out, list(s.tensors.values()), gradient_like(out), retain_graph=True)
    strided = gradient_like(out).transpose(1, 3).contiguous().transpose(1, 3)
    actual = torch.autograd.grad(out, list(s.tensors.values()), strided)
    for a, b in zip(actual, expected):
        assert_close(a, b, torch.float64)


def test_double_backward_says_that_it_is_not_supported():
    s = sample("plain").requiring_grad()
    out = call(operator, s)
    (gradient,) = torch.autograd.grad(out.square().sum(), s.args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="depthwise_separable_conv2d: double backward is not supported"):
        gradient.sum().backward()


# What PyTorch asks of an operator


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    torch.library.opcheck(OP, sample(name).positional, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "name",
    ["plain", "no_biases", "numbers", "then_gelu", "multiplier_2", "weight_shared", "empty_batch", "one_input_pixel",
     "input_channels_last", "input_sliced", "weights_permuted"],
)  # fmt: skip
def test_opcheck_with_autograd_and_dynamic_shapes(name):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    torch.library.opcheck(
        OP,
        sample(name).requiring_grad().positional,
        test_utils=("test_autograd_registration", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("name", ["then_relu6", "no_biases", "weight_shared", "empty_batch", "input_channels_last"])
@pytest.mark.parametrize("which", ["all", "input", "none"])
def test_opcheck_of_the_backward(name, which):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    s = sample(name)
    present = [key in s.tensors for key in TENSORS]
    wanted = {"all": present, "input": [True] + [False] * 4, "none": [False] * 5}[which]
    arguments = (gradient_like(OP(*s.positional)), *s.positional, wanted)
    torch.library.opcheck(OP_BACKWARD, arguments)


def described(result: Tensor | tuple[Tensor, ...]) -> list[tuple]:
    results = (result,) if isinstance(result, Tensor) else result
    return [(t.shape, strides_of(t), t.dtype, t.device) for t in results]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", CASES)
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
def test_memory_format_follows_the_input(layout):
    out = call(depthwise_separable_conv2d, sample(Case(layout=layout, first="relu", second="relu6")))
    channels_last = layout in ("channels_last", "sliced_channels_last")
    assert out.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert out.is_contiguous() != channels_last


def test_exported_with_dynamic_shapes():
    model = DepthwiseSeparableConv2d(4, 6, 3, 2, 1, depthwise_activation="relu6", pointwise_activation="silu")
    dynamic = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    program = torch.export.export(model, (torch.randn(2, 4, 7, 10),), dynamic_shapes=(dynamic,))
    assert [node.target for node in program.graph.nodes].count(OP) == 1
    for size in ((3, 4, 12, 9), (5, 4, 20, 8), (2, 4, 7, 10)):
        x = torch.randn(size)
        assert torch.equal(program.module()(x), model(x))


# Autocast


@pytest.mark.parametrize("low", LOW_DTYPES, ids=str)
def test_autocast_computes_in_lower_precision(low):
    """As of the two convolutions whose place it takes: whatever comes, low precision goes."""
    s = sample("both_activations")
    expected = call(depthwise_separable_conv2d, s.to(low))
    for dtype in (torch.float32, *LOW_DTYPES):
        with torch.autocast("cpu", low):
            out = call(depthwise_separable_conv2d, s.replace(input=s.args[0].to(dtype)))
            assert call(two_convolutions, s).dtype == low
        assert out.dtype == low
        if dtype == torch.float32:
            assert torch.equal(out, expected)


def test_gradients_under_autocast():
    s = sample("then_silu").requiring_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = call(depthwise_separable_conv2d, s)
    actual = dict(zip(s.tensors, torch.autograd.grad(out, list(s.tensors.values()), gradient_like(out))))
    assert all(gradient.dtype == torch.float32 for gradient in actual.values())
    assert_same_gradients(actual, gradients(depthwise_separable_conv2d, sample("then_silu")), torch.bfloat16)


def test_float64_under_autocast():
    s = sample("plain", torch.float64)
    expected = call(depthwise_separable_conv2d, s)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(depthwise_separable_conv2d, s), expected)


# Wrong arguments


def _right() -> dict:
    return {
        "input": torch.zeros(2, 8, 7, 9),
        "depthwise_weight": torch.zeros(16, 1, 3, 3),
        "pointwise_weight": torch.zeros(6, 16, 1, 1),
        "depthwise_bias": torch.zeros(16),
        "pointwise_bias": torch.zeros(6),
        "stride": 1,
        "padding": 1,
        "dilation": 1,
    }


_integers = {name: value.int() for name, value in _right().items() if isinstance(value, Tensor)}

# What is changed in a right call, and what the error says.
WRONG = {
    "input_of_two_dimensions": (
        {"input": torch.zeros(7, 9)},
        "input must have 4 dimensions, or 3 without a batch, got shape (7, 9)",
    ),
    "input_of_five_dimensions": (
        {"input": torch.zeros(1, 2, 8, 7, 9)},
        "input must have 4 dimensions, or 3 without a batch, got shape (1, 2, 8, 7, 9)",
    ),
    "depthwise_weight_rank": (
        {"depthwise_weight": torch.zeros(16, 3, 3)},
        "depthwise_weight must have 4 dimensions, got shape (16, 3, 3)",
    ),
    "pointwise_weight_rank": (
        {"pointwise_weight": torch.zeros(6, 16)},
        "pointwise_weight must have 4 dimensions, got shape (6, 16)",
    ),
    "depthwise_weight_empty": (
        {"depthwise_weight": torch.zeros(16, 1, 0, 3)},
        "depthwise_weight must not be empty, got shape (16, 1, 0, 3)",
    ),
    "pointwise_weight_empty": (
        {"pointwise_weight": torch.zeros(0, 16, 1, 1)},
        "pointwise_weight must not be empty, got shape (0, 16, 1, 1)",
    ),
    "integers": (
        _integers,
        "input must be one of torch.float32, torch.float64, torch.bfloat16, torch.float16, got torch.int32",
    ),
    "depthwise_weight_dtype": (
        {"depthwise_weight": torch.zeros(16, 1, 3, 3, dtype=torch.bfloat16)},
        "depthwise_weight must have input's dtype torch.float32, got torch.bfloat16",
    ),
    "pointwise_weight_dtype": (
        {"pointwise_weight": torch.zeros(6, 16, 1, 1, dtype=torch.float64)},
        "pointwise_weight must have input's dtype torch.float32, got torch.float64",
    ),
    "depthwise_bias_dtype": (
        {"depthwise_bias": torch.zeros(16, dtype=torch.float16)},
        "depthwise_bias must have input's dtype torch.float32, got torch.float16",
    ),
    "pointwise_bias_dtype": (
        {"pointwise_bias": torch.zeros(6, dtype=torch.int64)},
        "pointwise_bias must have input's dtype torch.float32, got torch.int64",
    ),
    "input_device": (
        {"input": torch.zeros(2, 8, 7, 9, device="meta")},
        "depthwise_weight must be on input's device meta, got cpu",
    ),
    "pointwise_weight_device": (
        {"pointwise_weight": torch.zeros(6, 16, 1, 1, device="meta")},
        "pointwise_weight must be on input's device cpu, got meta",
    ),
    "stride_0": (
        {"stride": 0},
        "stride must be at least 1, got (0, 0)",
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
        "depthwise_weight.shape[0] must be a multiple of input's 0 channels, got 16",
    ),
    "no_height": (
        {"input": torch.zeros(2, 8, 0, 9)},
        "input must have a positive height and width, got shape (2, 8, 0, 9)",
    ),
    "channels": (
        {"input": torch.zeros(2, 9, 7, 9)},
        "depthwise_weight.shape[0] must be a multiple of input's 9 channels, got 16",
    ),
    "not_depthwise": (
        {"depthwise_weight": torch.zeros(16, 2, 3, 3)},
        "depthwise_weight must have shape [C * M, 1, kH, kW], got (16, 2, 3, 3)",
    ),
    "pointwise_channels": (
        {"pointwise_weight": torch.zeros(6, 8, 1, 1)},
        "pointwise_weight must have shape [O, 16, 1, 1], got (6, 8, 1, 1)",
    ),
    "not_pointwise": (
        {"pointwise_weight": torch.zeros(6, 16, 1, 3)},
        "pointwise_weight must have shape [O, 16, 1, 1], got (6, 16, 1, 3)",
    ),
    "depthwise_bias_shape": (
        {"depthwise_bias": torch.zeros(8)},
        "depthwise_bias must have shape (16,), got (8,)",
    ),
    "pointwise_bias_shape": (
        {"pointwise_bias": torch.zeros(6, 1)},
        "pointwise_bias must have shape (6,), got (6, 1)",
    ),
    "kernel_too_large": (
        {"dilation": (4, 1), "padding": 0},
        "the kernel does not fit into the padded input: the output would be -1 x 7",
    ),
}


class _Call(nn.Module):
    def __init__(self, **geometry):
        super().__init__()
        self.geometry = geometry

    def forward(self, *tensors):
        return depthwise_separable_conv2d(*tensors, **self.geometry)


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
    with pytest.raises(RuntimeError, match=re.escape(f"depthwise_separable_conv2d: {message}")):
        MODES[mode](*_call(changes))


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_of_dynamic_shape(wrong):
    """The message is the same up to its first number: a size may have a symbol for a name."""
    changes, message = WRONG[wrong]
    words = re.match(r"[^\d(-]*", message).group()
    model, tensors = _call(changes)
    with pytest.raises(RuntimeError, match=re.escape(f"depthwise_separable_conv2d: {words}")):
        torch.compile(model, backend="eager", fullgraph=True, dynamic=True)(*tensors)


def test_wrong_arguments_of_the_operators():
    s = sample("plain")
    *arguments, _ = s.positional
    with pytest.raises(RuntimeError, match=r"activation must be one of identity, relu, relu6, .*, got 'tanh'"):
        OP(*arguments, "tanh")
    with pytest.raises(RuntimeError, match=re.escape("grad must have shape (2, 6, 7, 9), got (2, 6, 7, 8)")):
        OP_BACKWARD(torch.zeros(2, 6, 7, 8), *s.positional, [True] * 5)


@pytest.mark.parametrize("argument", ["depthwise_activation", "pointwise_activation"])
@pytest.mark.parametrize("name", ["tanh", "identity", ""])
def test_unknown_activations(argument, name):
    known = ", ".join(name for name in ACTIVATIONS if name is not None)
    message = re.escape(f"{argument} must be None or one of {known}, got {name!r}")
    s = sample("plain")
    with pytest.raises(ValueError, match=message):
        depthwise_separable_conv2d(*s.args, **{argument: name})
    with pytest.raises(ValueError, match=message):
        DepthwiseSeparableConv2d(4, 4, 3, **{argument: name})


# The module


@pytest.mark.parametrize("bias", [True, False])
def test_module_is_initialized_as_two_convolutions(bias):
    torch.manual_seed(3)
    module = DepthwiseSeparableConv2d(8, 6, (3, 2), channel_multiplier=2, bias=bias)
    torch.manual_seed(3)
    depthwise = nn.Conv2d(8, 16, (3, 2), groups=8, bias=bias)
    pointwise = nn.Conv2d(16, 6, 1, bias=bias)
    expected = {}
    for name, convolution in (("depthwise", depthwise), ("pointwise", pointwise)):
        expected |= {f"{name}_{key}": value for key, value in convolution.state_dict().items()}
    assert module.state_dict().keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(module.state_dict()[name], value), name

    other = DepthwiseSeparableConv2d(8, 6, (3, 2), channel_multiplier=2, bias=bias)
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 8, 5, 6)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("name", ["stride_padding_dilation", "both_activations", "multiplier_2", "no_biases"])
def test_module_calls_the_function(name):
    s = sample(name)
    case = s.case
    module = DepthwiseSeparableConv2d(
        case.channels, case.out_channels, case.kernel, case.stride, case.padding, case.dilation, case.multiplier,
        case.biases[0], case.first, case.second,
    )  # fmt: skip
    module.load_state_dict({name: tensor for name, tensor in s.tensors.items() if name != "input"})
    assert torch.equal(module(s.args[0]), call(depthwise_separable_conv2d, s))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "DepthwiseSeparableConv2d(8, 6, kernel_size=(3, 3), stride=(1, 1))"),
        (
            {
                "stride": 2, "padding": (1, 0), "dilation": 2, "channel_multiplier": 2, "bias": False,
                "depthwise_activation": "relu6", "pointwise_activation": "silu",
            },
            "DepthwiseSeparableConv2d(8, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 0), dilation=(2, 2), "
            "channel_multiplier=2, depthwise_activation=relu6, pointwise_activation=silu, depthwise_bias=False, "
            "pointwise_bias=False)",
        ),
    ],
)  # fmt: skip
def test_module_repr(options, text):
    assert repr(DepthwiseSeparableConv2d(8, 6, 3, **options)) == text


def _norm(channels: int, affine: bool = True) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-3, affine=affine).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("padding", [1, (0, 2), "same", "valid"])
@pytest.mark.parametrize("norms", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_module_from_convolutions(bias, norms, padding):
    depthwise = nn.Conv2d(6, 12, 3, 1, padding, dilation=2, groups=6, bias=bias)
    pointwise = nn.Conv2d(12, 10, 1, bias=bias)
    norm, last_norm = (_norm(n, affine=n == 12) if wanted else None for n, wanted in zip((12, 10), norms))
    layers = [depthwise, norm, nn.ReLU6(), pointwise, last_norm, nn.Hardswish()]
    layers = nn.Sequential(*(layer for layer in layers if layer is not None)).double().eval()
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    module = DepthwiseSeparableConv2d.from_convolutions(depthwise, pointwise, norm, "relu6", last_norm, "hardswish")
    assert not module.training
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    assert_close(module(x), layers(x), torch.float64)
    with torch.no_grad():  # weights are copies
        for parameter in module.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


_depthwise, _pointwise = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1)

WRONG_LAYERS = {
    "groups": (
        [nn.Conv2d(4, 4, 3, groups=2), _pointwise],
        "depthwise must have as many groups as input channels, got 2 groups and 4 channels",
    ),
    "padding_mode": (
        [nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"), _pointwise],
        "depthwise must pad with zeros, got padding_mode='reflect'",
    ),
    "one_sided": (
        [nn.Conv2d(4, 4, 2, padding="same", groups=4), _pointwise],
        "depthwise must pad both sides alike, got padding='same' with kernel_size=(2, 2)",
    ),
    "kernel": ([_depthwise, nn.Conv2d(4, 6, 3)], "pointwise must be a 1 x 1 convolution"),
    "stride": ([_depthwise, nn.Conv2d(4, 6, 1, stride=2)], "pointwise must be a 1 x 1 convolution"),
    "padding": ([_depthwise, nn.Conv2d(4, 6, 1, padding=1)], "pointwise must be a 1 x 1 convolution"),
    "grouped": ([_depthwise, nn.Conv2d(4, 6, 1, groups=2)], "pointwise must be a 1 x 1 convolution"),
    "channels": ([_depthwise, nn.Conv2d(5, 6, 1)], "pointwise must take depthwise's 4 channels, got 5"),
    "features": ([_depthwise, _pointwise, nn.BatchNorm2d(5)], "depthwise_norm must have 4 features, got 5"),
    "statistics": (
        [_depthwise, _pointwise, nn.BatchNorm2d(4, track_running_stats=False)],
        "depthwise_norm must have running statistics",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_LAYERS)
def test_module_from_wrong_layers(wrong):
    layers, message = WRONG_LAYERS[wrong]
    with pytest.raises(ValueError, match=re.escape(message)):
        DepthwiseSeparableConv2d.from_convolutions(*layers)
