"""What multiscale_deformable_attention means."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from inductor_vision import MultiScaleDeformableAttention, multiscale_deformable_attention
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.multiscale_deformable_attention import (
    CASES,
    LAYOUTS,
    OP,
    OP_BACKWARD,
    Case,
    gradient_oracle,
    oracle,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def by_grid_sample(case: Case) -> Tensor:
    """As models compute it: a grid_sample for each level."""
    value, locations, weights = (tensor.double() for tensor in case.tensors())
    levels = value.split([height * width for height, width in case.sizes], dim=1)
    found = []
    for level, (height, width), at in zip(levels, case.sizes, (2 * locations - 1).split(case.points, dim=3)):
        maps = level.permute(0, 2, 3, 1).reshape(-1, case.channels, height, width)
        found.append(F.grid_sample(maps, at.transpose(1, 2).flatten(0, 1), align_corners=False))  # [B * H, D, Q, P]
    out = (torch.cat(found, dim=3) * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(3)
    return out.view(case.batch, -1, case.queries).transpose(1, 2)


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    case = CASES[name]
    result = multiscale_deformable_attention(*case.arguments)
    assert result.shape == (case.batch, case.queries, case.heads * case.channels)
    assert result.dtype == case.dtype and result.is_contiguous()
    assert_close(result, oracle(case), case.dtype)


@pytest.mark.parametrize("name", ["three levels", "points that differ", "wide", "integers", "many points"])
def test_is_what_grid_sample_computes(name):
    case = dataclasses.replace(CASES[name], dtype=FP64)
    assert_close(multiscale_deformable_attention(*case.arguments), by_grid_sample(case), FP64)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    case = CASES[name]
    for what, result, tensor, expected in zip(
        ("value", "locations", "weights"), OP_BACKWARD(*case.positional_backward), case.tensors(), gradient_oracle(case)
    ):
        assert result.dtype == tensor.dtype and result.is_contiguous()
        assert_close(result, expected, case.dtype, f"gradient of {what}")


@pytest.mark.parametrize("method", ["default", pytest.param("discrete", marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_function(method):
    case = Case(
        method=method, locations="smooth", dtype=FP64, batch=1, heads=2, channels=3, queries=3, points=(3, 1, 2)
    )
    value, shapes, locations, weights, *others = case.arguments
    tensors = [tensor.requires_grad_() for tensor in (value, locations, weights)]

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return multiscale_deformable_attention(value, shapes, locations, weights, *others)

    torch.autograd.gradcheck(function, tensors, fast_mode=True)
    with pytest.raises(RuntimeError, match=r"^multiscale_deformable_attention: double backward is not supported"):
        torch.autograd.gradgradcheck(function, tensors)


DTYPES = [(FP64, FP64), (FP64, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, BF16)]


@pytest.mark.parametrize(("dtype", "others"), DTYPES, ids=str)
def test_dtypes(dtype, others):
    """Locations and weights may have another dtype than the value; sums are float32 at least."""
    case = Case(dtype=dtype, others=others)
    result = multiscale_deformable_attention(*case.arguments)
    assert result.dtype == dtype
    assert_close(result, oracle(case), dtype)
    for gradient, tensor, expected in zip(
        OP_BACKWARD(*case.positional_backward), case.tensors(), gradient_oracle(case)
    ):
        assert gradient.dtype == tensor.dtype
        assert_close(gradient, expected, max(dtype, others, key=lambda dtype: torch.finfo(dtype).eps))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    case = Case(layout=layout)
    assert_close(multiscale_deformable_attention(*case.arguments), oracle(case), FP32)


def test_float32_locations_keep_their_precision_beside_bfloat16():
    """Of 1000 pixels bfloat16 coordinates cannot tell neighbours."""
    value = torch.arange(1000.0).bfloat16().reshape(1, 1000, 1, 1)
    locations = torch.tensor([500.5, 501.5]).div(1000).reshape(1, 2, 1, 1, 1)
    locations = torch.cat([locations, torch.full_like(locations, 0.5)], dim=-1)
    out = multiscale_deformable_attention(value, [(1, 1000)], locations, torch.ones(1, 2, 1, 1))
    assert out.flatten().tolist() == value[0, 500:502, 0, 0].tolist()


def test_under_autocast_nothing_is_converted():
    case = Case(dtype=BF16, others=FP32)
    with torch.autocast("cpu", dtype=BF16):
        result = multiscale_deformable_attention(*case.arguments)
    assert torch.equal(result, multiscale_deformable_attention(*case.arguments))


@pytest.mark.parametrize("method", ["default", "discrete"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_point_that_is_not_finite_contributes_nothing(bad, method):
    value, shapes, locations, weights, points, _ = Case().arguments
    locations[:, 2, :, 3, 0] = bad
    weights[:, 2, :, 3] = torch.nan  # not even 0 * NaN
    without = weights.clone()
    without[:, 2, :, 3] = 0
    result = multiscale_deformable_attention(value, shapes, locations, weights, points, method)
    locations[:, 2, :, 3] = 0.5
    assert torch.equal(result, multiscale_deformable_attention(value, shapes, locations, without, points, method))


def test_corners_that_do_not_exist_are_not_read():
    """They are not 0 times the pixel that is there in memory: of the next row, level or head."""
    value = torch.full((1, 3 + 4, 2, 2), torch.nan)
    value[0, :3, 0] = 1
    locations = torch.full((1, 1, 2, 2, 1, 2), -5.0)
    locations[:, :, :, 0] = torch.tensor([1.1, 0.5])  # 0.8 pixels beyond the last of 1 x 3
    out = multiscale_deformable_attention(value, [(1, 3), (2, 2)], locations, torch.ones(1, 1, 2, 2, 1))
    assert torch.allclose(out[0, 0, :2], torch.tensor(0.2)) and out[0, 0, 2:].isnan().all()


# The forms that arguments may have


def test_levels_may_be_a_dimension_of_their_own():
    case = Case()
    value, shapes, locations, weights, _, _ = case.arguments
    by_level = locations.unflatten(3, (3, 2)), weights.unflatten(3, (3, 2))
    expected = multiscale_deformable_attention(*case.arguments)
    assert torch.equal(multiscale_deformable_attention(value, shapes, *by_level), expected)
    assert torch.equal(multiscale_deformable_attention(value, shapes, locations, weights), expected)
    for tensor in (torch.tensor(shapes), torch.tensor(shapes, dtype=torch.int32)):
        assert torch.equal(multiscale_deformable_attention(value, tensor, *by_level), expected)
    module = MultiScaleDeformableAttention()
    assert torch.equal(module(value, torch.tensor(shapes), list(shapes), None, *by_level, 64), expected)
    assert torch.equal(module(value, torch.tensor(shapes), None, None, *by_level), expected)
    with pytest.raises(ValueError, match="value_spatial_shapes or value_spatial_shapes_list must be given"):
        module(value, None, None, None, *by_level)


@pytest.mark.parametrize(
    "name",
    ["points that differ", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tensor of sizes", "discrete"))],
)
def test_opcheck(name):
    pytest.importorskip("expecttest")
    case = CASES[name]
    torch.library.opcheck(OP, case.positional)
    torch.library.opcheck(OP_BACKWARD, case.positional_backward)


@given(
    batch=st.integers(0, 2),
    heads=st.integers(1, 3),
    channels=st.integers(1, 5),
    queries=st.integers(0, 4),
    levels=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=3),
    method=st.sampled_from(("default", "discrete")),
    locations=st.sampled_from(("random", "borders", "integers", "hostile")),
    layout=st.sampled_from(LAYOUTS),
    as_tensor=st.booleans(),
)
def test_any_call(levels, **described):
    sizes, points = tuple((height, width) for height, width, _ in levels), tuple(count for *_, count in levels)
    case = Case(sizes=sizes, points=points, dtype=FP64, **described)
    result = multiscale_deformable_attention(*case.arguments)
    assert_close(result, oracle(case), FP64)
    for gradient, expected in zip(OP_BACKWARD(*case.positional_backward), gradient_oracle(case)):
        assert_close(gradient, expected, FP64)


def changed(**changes: Any) -> dict[str, Any]:
    value, shapes, locations, weights, points, method = Case().arguments
    call = {
        "value": value,
        "value_spatial_shapes": shapes,
        "sampling_locations": locations,
        "attention_weights": weights,
        "num_points": points,
        "method": method,
    }
    return {**call, **changes}


_VALUE, _SHAPES, _LOCATIONS, _WEIGHTS, *_ = Case().arguments

WRONG = {
    "value must be [B, S, H, D], got shape (2, 49, 24)": changed(value=_VALUE.flatten(2)),
    "value must be one of torch.float32, torch.float64, torch.bfloat16, torch.float16, got torch.int64": changed(
        value=_VALUE.long()
    ),
    "value must have as many pixels as the levels have, of heights and widths [(5, 7), (3, 4), (1, 3)], got 49": (
        changed(value_spatial_shapes=((5, 7), (3, 4), (1, 3)))
    ),
    "value_spatial_shapes must be positive, got [(5, 7), (7, 2), (0, 2)]": changed(
        value_spatial_shapes=((5, 7), (7, 2), (0, 2))
    ),
    "value_spatial_shapes must have a (height, width) for each of 3 levels, got [(5, 7), (7, 2)]": changed(
        value_spatial_shapes=((5, 7), (7, 2))
    ),
    "value_spatial_shapes must be pairs of (height, width), got ((49,), (1, 1), (1, 1))": changed(
        value_spatial_shapes=((49,), (1, 1), (1, 1))
    ),
    "value_spatial_shapes must be [3, 2], got shape (2, 2)": changed(value_spatial_shapes=torch.ones(2, 2).long()),
    "value_spatial_shapes must be integers, got torch.float32": changed(value_spatial_shapes=torch.ones(3, 2)),
    "sampling_locations must have shape (2, 5, 3, 6, 2), the points of all levels together, got (2, 5, 3, 5, 2)": (
        changed(sampling_locations=_LOCATIONS[:, :, :, 1:])
    ),
    "sampling_locations must be [B, Q, H, L, P, 2] or [B, Q, H, K, 2] with the K points of all levels, got shape "
    "(2, 5, 18, 2)": changed(sampling_locations=_LOCATIONS.flatten(2, 3)),
    "sampling_locations must be [B, Q, H, 3, P, 2] and attention_weights [B, Q, H, 3, P], or both without levels; got "
    "shapes (2, 5, 3, 2, 3, 2) and (2, 5, 3, 6)": changed(sampling_locations=_LOCATIONS.unflatten(3, (2, 3))),
    "sampling_locations of 6 points must have as many on each of 4 levels, or num_points must say how many": changed(
        value_spatial_shapes=((1, 1),) * 4, num_points=None
    ),
    "sampling_locations must be float32, bfloat16 or float16, or have value's dtype torch.float32, got "
    "torch.float64": changed(sampling_locations=_LOCATIONS.double()),
    "attention_weights must have shape (2, 5, 3, 6), the points of all levels together, got (2, 5, 3, 5)": changed(
        attention_weights=_WEIGHTS[..., 1:]
    ),
    "attention_weights must be float32, bfloat16 or float16, or have value's dtype torch.float32, got "
    "torch.int64": changed(attention_weights=_WEIGHTS.long()),
    "each level must have a point, and there must be one; got [2, 4, 0]": changed(num_points=(2, 4, 0)),
    "method must be one of default, discrete; got 'nearest'": changed(method="nearest"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    """The fake kernel raises what eager mode raises."""
    for mode in (contextlib.nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, pytest.raises(RuntimeError, match=f"^multiscale_deformable_attention: {re.escape(message)}"):
            multiscale_deformable_attention(**WRONG[message])


WRONG_SIZES = {
    "too many": [(5, 7), (3, 4), (2, 2)],
    "too few": [(5, 7), (3, 4), (1, 1)],
    "none": [(5, 7), (7, 2), (0, 2)],
    "negative": [(-5, -7), (3, 4), (1, 2)],
    "overflowing": [(2**62, 4), (7, 7), (2**62, 4)],
}


@pytest.mark.parametrize("name", WRONG_SIZES)
def test_wrong_sizes_in_a_tensor(name):
    with pytest.raises(RuntimeError, match="value_spatial_shapes must be positive, and have as many pixels as value"):
        multiscale_deformable_attention(**changed(value_spatial_shapes=torch.tensor(WRONG_SIZES[name])))


def test_wrong_gradients():
    case = Case()
    grad, *others = case.positional_backward
    for wrong, message in ((grad[:, 1:], "grad must have shape"), (grad.double(), "grad must have value's dtype")):
        with pytest.raises(RuntimeError, match=f"^multiscale_deformable_attention: {message}"):
            OP_BACKWARD(wrong, *others)
