"""What depthwise_separable_conv2d means: values, gradients, argument checks, the module; nothing here is compiled by
Inductor."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from inductor_vision import DepthwiseSeparableConv2d, depthwise_separable_conv2d
from inductor_vision.ops import depthwise_separable_conv2d as ops_module
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support import convolution
from inductor_vision.tests.support.arguments import MODES, QUICK, assert_refused, run_in, wrong_kinds
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.convolution import LOW_DTYPES, assert_same_gradients, call, gradients
from inductor_vision.tests.support.depthwise_separable_conv2d import (
    ACTIVATIONS,
    CASES,
    Case,
    activate,
    cases,
    oracle,
    sample,
)
from inductor_vision.tests.support.layouts import LAYOUTS, arrange
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.modules.utils import _pair

OP = torch.ops.inductor_vision.depthwise_separable_conv2d.default
OP_BACKWARD = torch.ops.inductor_vision.depthwise_separable_conv2d_backward.default


def operator(*args, stride, padding, dilation, depthwise_activation, pointwise_activation, slope) -> Tensor:
    """The function by the operator. Eagerly it is not what computes gradients, so that its own would not be seen."""
    pairs = map(_pair, (stride, padding, dilation))
    return activate(pointwise_activation, OP(*args, slope, *pairs, depthwise_activation or "identity"))


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
    slope=None,
):
    """What the operator takes the place of, with autograd's gradients."""
    channels = input.shape[-3]
    hidden = F.conv2d(input, depthwise_weight, depthwise_bias, stride, padding, dilation, groups=channels)
    out = F.conv2d(activate(depthwise_activation, hidden, slope), pointwise_weight, pointwise_bias)
    return activate(pointwise_activation, out)


# Values


@pytest.mark.parametrize("name", CASES)
def test_decomposition_is_the_oracle(name):
    """And the oracle is two convolutions."""
    s = sample(name, torch.float64)
    with recorded_paths() as paths:
        out = call(depthwise_separable_conv2d, s)
    assert [(path.op, path.kind) for path in paths] == [("depthwise_separable_conv2d", "eager")]
    expected = call(oracle, s)
    assert_close(out, expected, torch.float64)
    assert_close(expected, call(two_convolutions, s), torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_each_dtype(name):
    """Values and gradients; those in float64 are compared with other implementations."""
    dtypes = (torch.float32, *LOW_DTYPES)
    convolution.assert_same_in(dtypes, depthwise_separable_conv2d, partial(sample, name), with_gradients=False)
    # The argument of a last activation is rounded, which may be to the other side of a kink.
    convolution.assert_same_in(dtypes, operator, partial(sample, dataclasses.replace(CASES[name], second=None)))


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


@given(case=cases())
def test_any_case_is_the_oracle(case):
    s = sample(case, torch.float64)
    assert_close(call(depthwise_separable_conv2d, s), call(oracle, s), torch.float64)


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


@pytest.mark.parametrize("first", [name for name in ACTIVATIONS if name])
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


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_autograds(name):
    s = sample(name, torch.float64)
    assert_same_gradients(gradients(operator, s), gradients(two_convolutions, s), torch.float64)


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


@pytest.mark.parametrize("mode", ["eager", "operator"])
def test_a_slope_has_no_gradient_of_what_is_positive(mode):
    """Not even of infinity, of which zero times would be NaN."""
    x, ones, slope = torch.tensor([[[[math.inf, -2.0]]]]), torch.ones(1, 1, 1, 1), torch.tensor([0.25])
    if mode == "operator":
        grad = torch.tensor([[[[0.0, 1.0]]]])
        arguments = x, ones, ones, None, None, slope, [1, 1], [0, 0], [1, 1], "prelu"
        *_, gradient = OP_BACKWARD(grad, *arguments, [False] * 5 + [True])
    else:
        slope.requires_grad_()
        out = depthwise_separable_conv2d(x, ones, ones, depthwise_activation="prelu", slope=slope)
        (gradient,) = torch.autograd.grad(out[..., 1].sum(), slope)
    assert gradient.tolist() == [-2.0]


gradcheck = partial(convolution.assert_gradcheck, operator, weight="depthwise_weight")


@pytest.mark.parametrize(
    "name", ["plain", "then_leaky_relu", "then_prelu", "then_hardswish", "then_gelu", "no_biases",
             "stride_padding_dilation", "multiplier_3_of_5", "empty_batch", "input_transposed", "weights_permuted",
             "weight_shared"]
)  # fmt: skip
def test_gradcheck(name):
    """The derivative along a random direction."""
    gradcheck(sample(name, torch.float64), fast_mode=True)


def test_gradcheck_of_every_element():
    case = Case(channels=2, multiplier=2, out_channels=3, size=(3, 4), kernel=(2, 3), stride=(1, 2), first="silu")
    gradcheck(sample(case, torch.float64))


@pytest.mark.parametrize("name", ["both_activations", "multiplier_2", "input_channels_last"])
def test_each_gradient_alone(name):
    convolution.assert_each_gradient_alone(operator, sample(name, torch.float64))


def test_gradient_of_a_non_contiguous_gradient():
    s = sample("then_relu6", torch.float64)
    convolution.assert_same_gradients_by(partial(arrange, layout="channels_last"), operator, s)


def test_double_backward_says_that_it_is_not_supported():
    convolution.assert_no_double_backward(operator, sample("plain"), "depthwise_separable_conv2d")


# What PyTorch asks of an operator


@pytest.mark.parametrize(
    "name", ["plain", "no_biases", "numbers", "then_prelu", "then_gelu", "multiplier_2", "weight_shared", "empty_batch",
             "one_input_pixel", "input_channels_last", "input_sliced", "weights_permuted"]
)  # fmt: skip
def test_opcheck(name):
    convolution.opcheck(OP, OP_BACKWARD, sample(name))


@pytest.mark.parametrize("name", ["then_prelu", "no_biases", "weight_shared", "empty_batch", "input_channels_last"])
def test_opcheck_with_dynamic_shapes(name):
    convolution.opcheck_with_dynamic_shapes(OP, sample(name))


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in CASES), ("plain", torch.bfloat16)])
def test_fake_results_are_laid_out_like_real_ones(name, dtype):
    convolution.assert_fake_results_are_like_real_ones(OP, OP_BACKWARD, sample(name, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_follows_the_input(layout):
    s = sample(Case(layout=layout, first="relu", second="relu6"))
    convolution.assert_memory_format_follows(layout, call(depthwise_separable_conv2d, s))


def test_exported_with_dynamic_shapes():
    model = DepthwiseSeparableConv2d(4, 6, 3, 2, 1, depthwise_activation="relu6", pointwise_activation="silu")
    dynamic = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    program = torch.export.export(model, (torch.randn(2, 4, 7, 10),), dynamic_shapes=(dynamic,))
    assert [node.target for node in program.graph.nodes].count(OP) == 1
    for size in ((3, 4, 12, 9), (5, 4, 20, 8), (2, 4, 7, 10)):
        x = torch.randn(size)
        assert torch.equal(program.module()(x), model(x))


def test_a_stride_that_changes_from_call_to_call():
    convolution.assert_stride_may_change(depthwise_separable_conv2d, sample("plain"))


# Autocast


@pytest.mark.parametrize("low", LOW_DTYPES, ids=str)
def test_autocast_computes_in_lower_precision(low):
    s = sample("both_activations")
    convolution.assert_autocast_lowers(low, depthwise_separable_conv2d, two_convolutions, s)


def test_gradients_under_autocast():
    s = sample("then_silu")
    expected = gradients(depthwise_separable_conv2d, s)
    convolution.assert_gradients_under_autocast(depthwise_separable_conv2d, s, expected)


def test_float64_under_autocast():
    convolution.assert_autocast_leaves_float64(depthwise_separable_conv2d, sample("plain", torch.float64))


# Wrong arguments


RIGHT = {
    "input": torch.zeros(2, 8, 7, 9),
    "depthwise_weight": torch.zeros(16, 1, 3, 3),
    "pointwise_weight": torch.zeros(6, 16, 1, 1),
    "depthwise_bias": torch.zeros(16),
    "pointwise_bias": torch.zeros(6),
    "stride": 1,
    "padding": 1,
    "dilation": 1,
}

# What is changed in a right call, and what the error says.
WRONG = {
    **wrong_kinds(RIGHT),
    **convolution.WRONG_GEOMETRY,
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

# What compiling and exporting could treat in a way of their own.
WRONG_TRACED = (
    "integers", "input_device", "stride_of_three", "input_of_two_dimensions", "channels", "no_height",
    "pointwise_channels", "kernel_too_large",
)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_right_arguments(mode):
    run_in(mode, depthwise_separable_conv2d, RIGHT)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    assert_refused(MODES if wrong in WRONG_TRACED else QUICK, depthwise_separable_conv2d, RIGHT, WRONG[wrong])


def test_wrong_arguments_of_the_operators():
    s = sample("plain")
    *arguments, _ = s.positional
    *tensors, _ = arguments[:6]
    for slope, activation, message in (
        (None, "prelu", "slope must have shape (1,), got None"),
        (torch.zeros(8), "prelu", "slope must have shape (1,), got (8,)"),
        (torch.zeros(1), "relu", "slope must be None with activation 'relu', got (1,)"),
        (
            torch.zeros(1, dtype=torch.float64),
            "prelu",
            "slope must have input's dtype torch.float32, got torch.float64",
        ),
    ):
        with pytest.raises(RuntimeError, match=re.escape(f"depthwise_separable_conv2d: {message}")):
            OP(*tensors, slope, *arguments[6:], activation)
    with pytest.raises(RuntimeError, match=r"activation must be one of identity, relu, relu6, .*, got 'softshrink'"):
        OP(*arguments, "softshrink")
    with pytest.raises(RuntimeError, match=re.escape("grad must have shape (2, 6, 7, 9), got (2, 6, 7, 8)")):
        OP_BACKWARD(torch.zeros(2, 6, 7, 8), *s.positional, [True] * 6)


@pytest.mark.parametrize("argument", ["depthwise_activation", "pointwise_activation"])
@pytest.mark.parametrize(
    "name",
    [
        *("softshrink", "identity", "", "relu(", "relu()", "relu(1)", "leaky_relu(0.1", "leaky_relu(0.1, 2)"),
        *("leaky_relu(slope)", "hardtanh(1)", "elu()", "(0.1)"),
    ],
)
def test_unknown_activations(argument, name):
    known = (
        "relu, relu6, leaky_relu(negative_slope), hardtanh(min_val, max_val), elu(alpha), selu, celu(alpha), "
        "softplus(beta, threshold), softsign, hardsigmoid, hardswish, sigmoid, tanh, silu, mish, gelu, gelu_tanh"
    )
    message = re.escape(f"{argument} must be None or one of {known}, got {name!r}")
    s = sample("plain")
    with pytest.raises(ValueError, match=message):
        depthwise_separable_conv2d(*s.args, **{argument: name})
    with pytest.raises(ValueError, match=message):
        DepthwiseSeparableConv2d(4, 4, 3, **{argument: name})


def test_a_slope_goes_with_prelu():
    s = sample("plain")
    message = re.escape("slope must be given with depthwise_activation='prelu', and only then, got ")
    with pytest.raises(ValueError, match=f"{message}none"):
        depthwise_separable_conv2d(*s.args, depthwise_activation="prelu")
    with pytest.raises(ValueError, match=f"{message}one with depthwise_activation='relu'"):
        depthwise_separable_conv2d(*s.args, depthwise_activation="relu", slope=torch.zeros(1))
    with pytest.raises(TypeError, match=r"slope must be a tensor of shape \[1\], got 0.3"):
        depthwise_separable_conv2d(*s.args, depthwise_activation="prelu", slope=0.3)
    for wrong in (
        lambda: depthwise_separable_conv2d(*s.args, pointwise_activation="prelu"),
        lambda: DepthwiseSeparableConv2d(4, 4, 3, depthwise_activation="prelu"),
    ):
        with pytest.raises(ValueError, match=r"_activation must be None or one of relu, .*, got 'prelu'"):
            wrong()


def test_every_activation_is_tested():
    tested = {name.partition("(")[0] for name in ACTIVATIONS if name}
    assert tested == ops_module.ACTIVATIONS.keys() - {"identity"}
    for text in ACTIVATIONS:
        activation = ops_module.parse_activation(text or "identity")
        name = (text or "identity").partition("(")[0]
        again = ops_module.format_activation(name, activation.parameters)
        assert ops_module.parse_activation(again) == activation


# The module


@pytest.mark.parametrize("bias", [True, False])
def test_module_is_initialized_as_two_convolutions(bias):
    torch.manual_seed(3)
    module = DepthwiseSeparableConv2d(8, 6, (3, 2), channel_multiplier=2, bias=bias)
    torch.manual_seed(3)
    depthwise = nn.Conv2d(8, 16, (3, 2), groups=8, bias=bias)
    pointwise = nn.Conv2d(16, 6, 1, bias=bias)
    expected = {}
    for name, layer in (("depthwise", depthwise), ("pointwise", pointwise)):
        expected |= {f"{name}_{key}": value for key, value in layer.state_dict().items()}
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


@pytest.mark.parametrize(
    ("bias", "norms", "padding"),
    [
        *itertools.product((True, False), itertools.product((True, False), repeat=2), (1,)),
        *((True, (True, True), padding) for padding in ((0, 2), "same", "valid")),
    ],
)
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
