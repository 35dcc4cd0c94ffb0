"""What all operators on regions have in common; what one has of its own is in the file of its name."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import inductor_vision
import pytest
import torch
from hypothesis import given
from inductor_vision.ops.registry import TORCHVISION
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.arguments import MODES, NOT_A_FLOAT, QUICK, assert_refused, run_in
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.layouts import LAYOUTS
from inductor_vision.tests.support.regions import (
    CASES,
    HOSTILE,
    OPERATORS,
    Case,
    Sample,
    cases,
    sample,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.utils import _pytree as pytree

MODULES = {"roi_align": "RoIAlign", "roi_pool": "RoIPool", "ps_roi_align": "PSRoIAlign", "ps_roi_pool": "PSRoIPool"}

LOW_DTYPES = (torch.bfloat16, torch.float16)

OF_EACH_KIND = (
    "plain", "samples_at_borders", "adaptive_aligned", "outside", "no_regions", "no_images", "no_channels", "one_pixel",
    "bad", "input_channels_last", "input_sliced", "input_expanded", "rois_sliced",
)  # fmt: skip

every_op = pytest.mark.parametrize("op", OPERATORS)
every_case = pytest.mark.parametrize("name", CASES)
# What torchvision's roi_align reads of a sample outside the map is the first pixel, times zero.
every_case_of_torchvision = pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPERATORS for name in CASES if (op, name) != ("roi_align", "bad")]
)


def function(op: str):
    return getattr(inductor_vision, op)


def custom(op: str, backward: bool = False):
    return getattr(torch.ops.inductor_vision, f"{op}_backward" if backward else op).default


def call(s: Sample) -> Tensor:
    return function(s.op)(*s.arguments)


def both(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The result, and where roi_pool found it."""
    return (result,) if isinstance(result, Tensor) else result


def expected(s: Sample) -> tuple[Tensor, ...]:
    return both(OPERATORS[s.op].oracle(*s.arguments))


def expected_gradient(s: Sample) -> Tensor:
    return OPERATORS[s.op].gradient_oracle(s.gradient, *s.arguments)


def gradient(s: Sample, of=None) -> Tensor:
    """The gradient of the input, by autograd."""
    s = s.replace(input=s.input.detach().requires_grad_())
    out = call(s) if of is None else of(*s.arguments)
    (result,) = torch.autograd.grad(out, s.input, s.gradient)
    return result


def assert_same(op: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """A maximum has no rounding errors."""
    if op == "roi_pool":
        assert torch.equal(actual, expected.to(dtype))
    else:
        assert_close(actual, expected, dtype)


def within_torchvisions_reach(s: Sample) -> Sample:
    """The call without the regions that torchvision's roi_align fails on: with a grid of minus so many samples."""
    if s.op != "roi_align" or s.case.sampling_ratio > 0 or not s.case.aligned:
        return s
    x1, y1, x2, y2 = (s.rois[:, 1:] * s.case.spatial_scale).unbind(1)
    rows, columns = ((y2 - y1) / s.case.bins[0]).ceil(), ((x2 - x1) / s.case.bins[1]).ceil()
    return s.keep(rows * columns >= 0)


# Values


@every_case_of_torchvision
def test_oracles_are_torchvision(torchvision, op, name):
    s = within_torchvisions_reach(sample(op, name, torch.float64))
    theirs = both(getattr(torch.ops.torchvision, op)(*s.positional_of_torchvision))
    for actual, value in zip(expected(s), theirs):
        assert_close(actual, value, torch.float64)
    theirs = getattr(torch.ops.torchvision, f"_{op}_backward")(*s.positional_backward_of_torchvision)
    assert_close(expected_gradient(s), theirs, torch.float64, "gradient")


@every_op
@pytest.mark.parametrize("name", [*CASES, *HOSTILE])
def test_decomposition_is_the_oracle(op, name):
    s = sample(op, name, torch.float64)
    with recorded_paths() as paths:
        out = both(custom(op)(*s.positional))
        grad = custom(op, backward=True)(*s.positional_backward)
    assert [(path.op, path.kind) for path in paths] == [(op, "eager"), (f"{op}_backward", "eager")]
    for actual, value in zip(out, expected(s)):
        assert_same(op, actual, value, actual.dtype)
    assert_close(grad, expected_gradient(s), torch.float64, "gradient")
    torch.testing.assert_close(call(s), out[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(gradient(s), grad)


@every_case_of_torchvision
def test_values_and_gradients_are_torchvisions(torchvision, op, name):
    s = within_torchvisions_reach(sample(op, name))
    theirs = getattr(torchvision.ops, op)
    assert_same(op, call(s), theirs(*s.arguments), torch.float32)
    assert_close(gradient(s), gradient(s, theirs), torch.float32, "gradient")


@pytest.mark.parametrize("dtype", (torch.float32, *LOW_DTYPES), ids=str)
@pytest.mark.parametrize("name", (*OF_EACH_KIND, *HOSTILE))
@every_op
def test_values_and_gradients_in_each_dtype(op, name, dtype):
    s = sample(op, name, dtype)
    out, grad = call(s), gradient(s)
    assert out.dtype == grad.dtype == dtype
    assert_same(op, out, expected(s)[0], dtype)
    assert_close(grad, expected_gradient(s), dtype, "gradient")


@every_op
@pytest.mark.parametrize("dtype", (*LOW_DTYPES, torch.float64), ids=str)
def test_boxes_in_the_dtype_of_the_input_and_in_float32(op, dtype):
    s = sample(op, Case(boxes="integers"), dtype)
    s = s.replace(rois=s.rois.round())  # numbers that every dtype has
    assert torch.equal(call(s.replace(rois=s.rois.to(dtype))), call(s.replace(rois=s.rois.float())))


@every_op
def test_low_precision_does_not_lose_boxes(op):
    """bfloat16 has neither 300 nor 100.5; the boxes stay in float32."""
    input = torch.zeros(301, 4, 5, 120, dtype=torch.bfloat16)
    input[300, :, :, 101:104] = 1
    rois = torch.tensor([[300, 100.6, 0.6, 103.5, 2.5]])
    assert function(op)(input, rois, 2).min() > 0.6
    assert function(op)(input, [*[torch.zeros(0, 4)] * 300, rois[:, 1:]], 2).min() > 0.6


@every_op
def test_a_list_of_boxes(op):
    s = sample(op, Case(batch=4), torch.float64)
    by_image = [s.rois[s.rois[:, 0] == image, 1:] for image in range(4)]
    by_image[2] = by_image[2][:0]
    rois = torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(by_image)])
    out = function(op)(s.input, rois, *s.arguments[2:])
    assert out.any()
    for boxes in (by_image, tuple(by_image)):
        assert torch.equal(function(op)(s.input, boxes, *s.arguments[2:]), out)
    fewer = function(op)(s.input, by_image[:1], *s.arguments[2:])
    assert torch.equal(fewer, out[: len(by_image[0])])


@every_op
def test_a_list_of_low_precision_boxes_counts_images(op):
    """bfloat16 cannot count past 256."""
    input = torch.arange(300.0)[:, None, None, None].expand(300, 4, 5, 5)
    boxes = [torch.tensor([[1, 1, 3, 3]], dtype=torch.bfloat16)] * 300
    assert function(op)(input, boxes, 2)[:, 0, 0, 0].tolist() == list(range(300))


@every_op
def test_one_number_for_both_sizes(op):
    s = sample(op, Case(bins=(2, 2)))
    out = function(op)(s.input, s.rois, 2, *s.arguments[3:])
    assert torch.equal(out, call(s))
    assert torch.equal(function(op)(s.input, s.rois, [2, 2], *s.arguments[3:]), out)


@every_op
def test_signature_and_defaults_are_torchvisions(torchvision, op):
    def described(function) -> list[tuple]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert described(function(op)) == described(getattr(torchvision.ops, op))
    ours, theirs = getattr(inductor_vision, MODULES[op]), getattr(torchvision.ops, MODULES[op])
    assert described(ours) == described(theirs)
    assert described(ours.forward) == described(theirs.forward)
    s = sample(op, "plain", torch.float64)
    assert_same(op, function(op)(*s.arguments[:3]), getattr(torchvision.ops, op)(*s.arguments[:3]), torch.float64)


@every_op
@given(case=cases())
def test_any_case_is_the_oracle(op, case):
    s = sample(op, case, torch.float64)
    assert_same(op, call(s), expected(s)[0], torch.float64)
    assert_close(gradient(s), expected_gradient(s), torch.float64, "gradient")


@every_op
@given(case=cases())
def test_any_case_is_torchvisions(torchvision, op, case):
    s = within_torchvisions_reach(sample(op, case))
    theirs = getattr(torchvision.ops, op)
    assert_same(op, call(s), theirs(*s.arguments), torch.float32)
    assert_close(gradient(s), gradient(s, theirs), torch.float32, "gradient")


# NaN, infinity, huge numbers


@every_op
@pytest.mark.parametrize("ratio", [2, -1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("coordinate", [1, 2, 3, 4])
def test_boxes_that_are_nowhere(op, ratio, bad, coordinate):
    """They are zero, but for 0 / 0; they have no gradient, and leave the boxes beside them alone."""
    s = sample(op, Case(boxes="inside", sampling_ratio=ratio, aligned=True, regions=3), torch.float64)
    rois = s.rois.clone()
    rois[1, coordinate] = bad
    out, right = call(s.replace(rois=rois)), call(s)
    assert torch.equal(out[[0, 2]], right[[0, 2]])
    assert right[1].any()
    nothing = 0.0
    if op == "ps_roi_align" and ratio < 0 and math.isnan(bad):
        nothing = math.nan
    assert torch.equal(out[1].nan_to_num(7), torch.full_like(out[1], nothing).nan_to_num(7))
    others = s.replace(rois=s.rois[[0, 2]], gradient=s.gradient[[0, 2]])
    assert_close(gradient(s.replace(rois=rois)), gradient(others), torch.float64)


@every_op
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_pixels_do_not_spread(op, bad):
    """The rightmost columns are bad, and the pixel that torchvision's roi_align reads for samples outside."""
    s = sample(op, Case(size=(8, 12), spatial_scale=1.0, regions=4), torch.float64)
    rois = torch.tensor([[0, 1, 1, 5, 6], [1, -9, -9, -4, -5], [1, 2, -3, 6, 3], [0, 3, 3, 5, 40.0]]).double()
    s = s.replace(rois=rois)
    input = s.input.clone()
    input[..., 8:] = bad
    input[..., 0, 0] = bad
    out = call(s.replace(input=input))
    assert out.isfinite().all() and torch.equal(out, call(s))


@every_op
def test_nothing_is_read_from_a_map_of_nan(op):
    s = sample(op, "outside")
    outside = ((s.rois[:, 3:] < 0) | (s.rois[:, 1:3] * s.case.spatial_scale > torch.tensor([10, 8]))).any(1)
    assert outside.all()
    assert not call(s.replace(input=torch.full_like(s.input, math.nan))).any()
    assert not gradient(s).any()


# Images

IMAGES_THAT_DO_NOT_EXIST = (-1, -1.5, 2, 2.5, 300, 1e30, -1e30, math.nan, math.inf, -math.inf)


@every_op
def test_images_in_any_order(op):
    s = sample(op, Case(batch=3, regions=7), torch.float64)
    image = torch.tensor([2, 0, 1, 2, 2, 0, 1])
    rois = s.rois.clone()
    rois[:, 0] = image
    out = call(s.replace(rois=rois))
    rois[:, 0] = 0
    for k in range(7):
        alone = s.replace(input=s.input[image[k]][None], rois=rois[[k]])
        assert torch.equal(out[[k]], call(alone))


@every_op
def test_the_image_is_truncated_towards_zero(op):
    s = sample(op, Case(boxes="inside", regions=4), torch.float64)
    rois = s.rois.clone()
    rois[:, 0] = torch.tensor([0, 0, 1, 1])
    expected = s.replace(rois=rois)
    rois = rois.clone()
    rois[:, 0] = torch.tensor([-0.5, 0.9, 1.0, 1.999])
    assert torch.equal(call(s.replace(rois=rois)), call(expected))
    assert torch.equal(gradient(s.replace(rois=rois)), gradient(expected))


@every_op
@pytest.mark.parametrize("image", IMAGES_THAT_DO_NOT_EXIST)
def test_images_that_do_not_exist(op, image):
    s = sample(op, Case(regions=3), torch.float64)
    rois = s.rois.clone()
    rois[1, 0] = image
    message = f"{op}: boxes name an image that does not exist"
    with pytest.raises(RuntimeError, match=message):
        call(s.replace(rois=rois))
    right = list(s.positional_backward)
    right[1] = rois
    with pytest.raises(RuntimeError, match=message):
        custom(op, backward=True)(*right)


@every_op
def test_a_box_and_no_images(op):
    s = sample(op, "no_images")
    with pytest.raises(RuntimeError, match=f"{op}: boxes name an image that does not exist"):
        call(s.replace(rois=torch.zeros(1, 5)))


# Gradients


def gradcheck(s: Sample, **options: Any) -> bool:
    if s.op == "ps_roi_pool":  # its gradient is not the derivative where boxes reach the last pixels
        last = torch.tensor([s.case.size[1], s.case.size[0]] * 2) - 3
        s = s.replace(rois=torch.cat([s.rois[:, :1], s.rois[:, 1:].minimum(last / s.case.spatial_scale)], 1))
    # where ps_roi_align has no samples it is NaN
    return torch.autograd.gradcheck(
        lambda input: call(s.replace(input=input)).nan_to_num(0), s.input.detach().requires_grad_(), **options
    )


@every_op
@pytest.mark.parametrize(
    "name",
    ["plain", "aligned", "adaptive", "adaptive_inverted", "crossing", "samples_at_borders", "one_pixel", "odd_scale",
     "more_bins_than_pixels", "channels_17", "input_channels_last", "input_stepped"],
)  # fmt: skip
def test_gradcheck(op, name):
    """The derivative along a random direction."""
    assert gradcheck(sample(op, name, torch.float64), fast_mode=True)


@every_op
def test_gradcheck_of_every_element(op):
    case = Case(channels=1, size=(5, 4), bins=(2, 1), regions=4, aligned=True)
    assert gradcheck(sample(op, case, torch.float64))


@every_op
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
def test_gradient_of_a_strided_gradient(op, layout):
    s = sample(op, "plain", torch.float64)
    strided = {
        "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
        "transposed": lambda g: g.transpose(1, 3).contiguous().transpose(1, 3),
        "expanded": lambda g: g[:1, :1, :1, :1].expand_as(g),
    }[layout](s.gradient)
    assert not strided.is_contiguous()
    s = s.replace(gradient=strided)
    assert_close(gradient(s), expected_gradient(s), torch.float64)


@every_op
def test_boxes_have_no_gradient(op):
    s = sample(op, "plain")
    s = s.replace(input=s.input.requires_grad_(), rois=s.rois.requires_grad_())
    call(s).backward(s.gradient)
    assert s.input.grad.any() and s.rois.grad is None
    assert not call(s.replace(input=s.input.detach(), rois=s.rois.detach())).requires_grad


@every_op
def test_double_backward_says_that_it_is_not_supported(op):
    s = sample(op, "plain")
    input = s.input.requires_grad_()
    (grad,) = torch.autograd.grad(call(s.replace(input=input)).square().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: double backward is not supported"):
        grad.sum().backward()


# What PyTorch asks of an operator


@every_op
@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_opcheck(op, name):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    s = sample(op, name)
    for operator, arguments in (
        (custom(op), s.positional),
        (custom(op, backward=True), s.positional_backward),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@every_op
@pytest.mark.parametrize("name", ["plain", "input_channels_last"])
def test_opcheck_with_autograd_and_dynamic_shapes(op, name):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    s = sample(op, name)
    s = s.replace(input=s.input.requires_grad_())
    utils = ("test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(custom(op), s.positional, test_utils=utils)
    s = s.replace(input=s.input.detach())
    torch.library.opcheck(custom(op, backward=True), s.positional_backward, test_utils=utils)


def described(*results: Any) -> list[tuple]:
    """The stride of a dimension of one element means nothing, nor does any of an empty tensor."""

    def strides(t: Tensor) -> list[int]:
        return [stride for stride, size in zip(t.stride(), t.shape) if size > 1 and t.numel() > 0]

    return [(t.shape, strides(t), t.dtype, t.device) for result in results for t in both(result)]


def on_fake_tensors(operator, *arguments: Any) -> Any:
    with FakeTensorMode() as mode:
        return operator(*pytree.tree_map_only(Tensor, mode.from_tensor, arguments))


@every_op
@every_case
def test_fake_results_are_laid_out_like_real_ones(op, name):
    s = sample(op, name, torch.bfloat16)
    arguments = [(custom(op), s.positional), (custom(op, backward=True), s.positional_backward)]
    real = described(*(operator(*positional) for operator, positional in arguments))
    assert described(*(on_fake_tensors(operator, *positional) for operator, positional in arguments)) == real


@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_follows_the_input(op, layout):
    s = sample(op, Case(layout=layout))
    channels_last = layout in ("channels_last", "sliced_channels_last")
    for result in both(custom(op)(*s.positional)):
        assert result.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert result.is_contiguous() != channels_last


@every_op
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_of_the_gradient_follows_that_of_the_result(op, memory_format):
    s = sample(op, "plain")
    arguments = list(s.positional_backward)
    arguments[0] = arguments[0].contiguous(memory_format=memory_format)
    assert custom(op, backward=True)(*arguments).is_contiguous(memory_format=memory_format)
    assert on_fake_tensors(custom(op, backward=True), *arguments).is_contiguous(memory_format=memory_format)


class Call(nn.Module):
    def __init__(self, op: str, *options: Any) -> None:
        super().__init__()
        self.op, self.options = op, options

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        return function(self.op)(input, rois, *self.options)


@every_op
def test_exported_with_any_number_of_boxes(op):
    s = sample(op, "plain")
    model = Call(op, *s.arguments[2:])
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, {0: Dim.AUTO})
    program = torch.export.export(model, (s.input, s.rois), dynamic_shapes=shapes)
    assert [node.target for node in program.graph.nodes].count(custom(op)) == 1
    for case in (s.case, Case(regions=2), Case(regions=37), Case(batch=5, size=(11, 4), regions=3)):
        other = sample(op, case)
        assert torch.equal(program.module()(other.input, other.rois), model(other.input, other.rois))


# Autocast


@every_op
@pytest.mark.parametrize("low", LOW_DTYPES, ids=str)
def test_autocast_does_not_touch_the_boxes(op, low):
    s = sample(op, "odd_scale")
    with torch.autocast("cpu", low):
        out = call(s)
        from_low = call(s.replace(input=s.input.to(low)))
    assert out.dtype == torch.float32 and torch.equal(out, call(s))
    assert from_low.dtype == low and torch.equal(from_low, call(s.replace(input=s.input.to(low))))


@every_op
def test_boxes_of_a_lower_precision_than_the_map(op):
    """As a box head under autocast makes them."""
    s = sample(op, "odd_scale")
    low = s.rois.bfloat16()
    assert torch.equal(call(s.replace(rois=low)), call(s.replace(rois=low.float())))


@every_op
def test_gradients_under_autocast(op):
    """The map comes from a convolution that autocast ran in low precision."""
    s = sample(op, "plain")
    convolution = nn.Conv2d(s.input.shape[1], s.input.shape[1], 1)
    with torch.autocast("cpu", torch.bfloat16):
        features = convolution(s.input)
        out = call(s.replace(input=features))
    assert features.dtype == out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out, features, s.gradient.bfloat16())
    assert grad.dtype == torch.bfloat16
    low = s.replace(input=features.detach(), gradient=s.gradient.bfloat16())
    assert_close(grad, expected_gradient(low), torch.bfloat16)


# Wrong arguments


RIGHT = {"input": torch.zeros(2, 12, 7, 9), "boxes": torch.zeros(3, 5), "output_size": (2, 3)}

# What is changed in a right call, and what the error says.
WRONG = {
    "input_rank": (
        {"input": torch.zeros(12, 7, 9)},
        "input must have 4 dimensions, got shape (12, 7, 9)",
    ),
    "integers": (
        {"input": torch.zeros(2, 12, 7, 9, dtype=torch.int32)},
        f"{NOT_A_FLOAT}torch.int32",
    ),
    "complex": (
        {"input": torch.zeros(2, 12, 7, 9, dtype=torch.complex64)},
        f"{NOT_A_FLOAT}torch.complex64",
    ),
    "no_height": (
        {"input": torch.zeros(2, 12, 0, 9)},
        "input must have a positive height and width, got shape (2, 12, 0, 9)",
    ),
    "no_width": (
        {"input": torch.zeros(2, 12, 7, 0)},
        "input must have a positive height and width, got shape (2, 12, 7, 0)",
    ),
    "boxes_dtype": (
        {"boxes": torch.zeros(3, 5, dtype=torch.float64)},
        "boxes must be float32, bfloat16 or float16, or have input's dtype torch.float32, got torch.float64",
    ),
    "boxes_of_integers": (
        {"boxes": torch.zeros(3, 5, dtype=torch.int64)},
        "boxes must be float32, bfloat16 or float16, or have input's dtype torch.float32, got torch.int64",
    ),
    "boxes_device": (
        {"boxes": torch.zeros(3, 5, device="meta")},
        "boxes must be on input's device cpu, got meta",
    ),
    "no_rows": (
        {"output_size": (0, 3)},
        "output_size must be positive, got (0, 3)",
    ),
    "negative_columns": (
        {"output_size": (2, -1)},
        "output_size must be positive, got (2, -1)",
    ),
    "channels": (
        {"input": torch.zeros(2, 10, 7, 9)},
        "input must have a multiple of 2 * 3 channels, got 10",
    ),
}
# What compiling and exporting could treat in a way of their own.
WRONG_TRACED = ("input_rank", "boxes_dtype", "channels")

WRONG_OF_OP = [
    (op, wrong)
    for op, operator in OPERATORS.items()
    for wrong in WRONG
    if wrong != "channels" or operator.position_sensitive
]


@pytest.mark.parametrize("mode", MODES)
@every_op
def test_right_arguments(op, mode):
    run_in(mode, function(op), RIGHT)


@pytest.mark.parametrize(("op", "wrong"), WRONG_OF_OP)
def test_wrong_arguments(op, wrong):
    assert_refused(MODES if wrong in WRONG_TRACED else QUICK, function(op), RIGHT, WRONG[wrong])


# What is neither [K, 5] nor a list of [L, 4].
WRONG_BOXES = {
    "four_columns": (
        torch.zeros(3, 4),
        AssertionError,
        "boxes as one tensor must be [K, 5], rows of (image, x1, y1, x2, y2); got (3, 4)",
    ),
    "one_dimension": (
        torch.zeros(5),
        AssertionError,
        "boxes as one tensor must be [K, 5], rows of (image, x1, y1, x2, y2); got (5,)",
    ),
    "five_columns_in_a_list": (
        [torch.zeros(1, 4), torch.zeros(2, 5)],
        AssertionError,
        "boxes[1] must be [L, 4], rows of (x1, y1, x2, y2); got (2, 5)",
    ),
    "one_dimension_in_a_list": (
        [torch.zeros(4)],
        AssertionError,
        "boxes[0] must be [L, 4], rows of (x1, y1, x2, y2); got (4,)",
    ),
    "an_empty_list": (
        [],
        ValueError,
        "boxes must be a [K, 5] tensor or a list with a [L, 4] tensor for each image, got []",
    ),
    "no_tensor": (
        None,
        AssertionError,
        "boxes must be a [K, 5] tensor or a list of [L, 4] tensors, got NoneType",
    ),
    "a_list_of_lists": (
        [[0, 0, 1, 1]],
        AssertionError,
        "boxes must be a [K, 5] tensor or a list of [L, 4] tensors, got list",
    ),
}


@every_op
@pytest.mark.parametrize("wrong", WRONG_BOXES)
def test_wrong_boxes(op, wrong):
    boxes, error, message = WRONG_BOXES[wrong]
    with pytest.raises(error, match=re.escape(f"{op}: {message}")):
        function(op)(torch.zeros(2, 12, 7, 9), boxes, (2, 3))


@every_op
@pytest.mark.parametrize("wrong", [(2,), (2, 3, 4)])
def test_wrong_output_size(op, wrong):
    with pytest.raises(ValueError, match=re.escape(f"{op}: output_size must be a number or a pair, got {wrong}")):
        function(op)(RIGHT["input"], RIGHT["boxes"], wrong)


@every_op
def test_wrong_regions_of_the_custom_operator(op):
    s = sample(op, "plain")
    s = s.replace(rois=s.rois[:, 1:])
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: boxes must be [K, 5], got shape (8, 4)")):
        custom(op)(*s.positional)


# What is changed in a right call of the backward; the size has another place in each schema.
WRONG_BACKWARD = {
    "grad_rank": (
        {"grad": torch.zeros(8, 5, 2)},
        "grad must be [K, channels, PH, PW] with K = 8, got shape (8, 5, 2)",
    ),
    "grad_of_other_regions": (
        {"grad": torch.zeros(7, 5, 2, 3)},
        "grad must be [K, channels, PH, PW] with K = 8, got shape (7, 5, 2, 3)",
    ),
    "boxes": (
        {"rois": torch.zeros(8, 4)},
        "boxes must be [K, 5], got shape (8, 4)",
    ),
    "boxes_dtype": (
        {"rois": torch.zeros(8, 5, dtype=torch.float64)},
        "boxes must be float32, bfloat16 or float16, or have input's dtype torch.float32, got torch.float64",
    ),
    "size_of_three": (
        {"size": [2, 5, 7]},
        "the size of input must be [B, C, H, W], got (2, 5, 7)",
    ),
    "no_height": (
        {"size": [2, 5, 0, 9]},
        "the size of input must be [B, C, H, W], got (2, 5, 0, 9)",
    ),
}


@every_op
@pytest.mark.parametrize("wrong", WRONG_BACKWARD)
def test_wrong_arguments_of_the_backward(op, wrong):
    changes, message = WRONG_BACKWARD[wrong]
    operator = custom(op, backward=True)
    names = [argument.name for argument in operator._schema.arguments]
    arguments = {**dict(zip(names, sample(op, "plain").positional_backward)), **changes}
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: {message}")):
        operator(**arguments)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=re.escape(f"{op}: {message}")):
        operator(**arguments)


# Modules


@every_op
@pytest.mark.parametrize("output_size", [3, (2, 3)], ids=str)
def test_module_is_torchvisions(torchvision, op, output_size):
    s = sample(op, Case(spatial_scale=0.25, sampling_ratio=3, aligned=True))
    ours, theirs = (
        getattr(library, MODULES[op])(output_size, *s.arguments[3:]) for library in (inductor_vision, torchvision.ops)
    )
    assert repr(ours) == repr(theirs)
    assert ours.state_dict() == theirs.state_dict() == {}
    for name, value in vars(theirs).items():
        assert getattr(ours, name) == value, name


@every_op
def test_module_calls_the_function(op):
    s = sample(op, Case(spatial_scale=0.25, sampling_ratio=3, aligned=True))
    by_image = [s.rois[s.rois[:, 0] == image, 1:] for image in range(s.case.batch)]
    ours = getattr(inductor_vision, MODULES[op])(*s.arguments[2:])
    assert torch.equal(ours(s.input, s.rois), call(s))
    assert torch.equal(ours(s.input, by_image), function(op)(s.input, by_image, *s.arguments[2:]))


def test_module_of_roi_align_is_not_aligned_unless_told():
    assert not inductor_vision.RoIAlign(2, 1.0, 2).aligned


# torchvision's operators in terms of this package's


@every_op
@pytest.mark.parametrize("name", ["plain", "aligned", "adaptive", "no_regions", "bins_4x1", "input_channels_last"])
def test_torchvisions_operators(torchvision, op, name):
    s = sample(op, name, torch.float64)
    actual = both(TORCHVISION[op](*s.positional_of_torchvision))
    theirs = both(getattr(torch.ops.torchvision, op)(*s.positional_of_torchvision))
    assert len(actual) == len(theirs)
    for a, b in zip(actual, theirs):
        assert a.dtype == b.dtype
        assert_same(op, a, b, b.dtype) if b.is_floating_point() else torch.testing.assert_close(a, b)
    actual = TORCHVISION[f"_{op}_backward"](*s.positional_backward_of_torchvision)
    theirs = getattr(torch.ops.torchvision, f"_{op}_backward")(*s.positional_backward_of_torchvision)
    assert_close(actual, theirs, torch.float64)
