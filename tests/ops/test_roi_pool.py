"""What roi_pool has of its own, beside what is in test_regions.py: which pixels bins have, and which of them wins."""

from __future__ import annotations

import math
import re

import pytest
import torch
from inductor_vision import roi_pool
from inductor_vision.tests.support.regions import Case, sample
from torch import Tensor

OP = torch.ops.inductor_vision.roi_pool.default
OP_BACKWARD = torch.ops.inductor_vision.roi_pool_backward.default

NAN, INF = math.nan, math.inf
LOWEST = torch.finfo(torch.float32).min


def box(x1: float, y1: float, x2: float, y2: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([[0, x1, y1, x2, y2]], dtype=dtype)


def pooled_row(row: list[float], x1: float, x2: float, bins: int = 1, dtype: torch.dtype = torch.float32):
    """Maxima and their places in a map of one row."""
    rois = box(x1, 0, x2, 0, torch.float64 if dtype == torch.float64 else torch.float32)
    out, argmax = OP(torch.tensor(row, dtype=dtype)[None, None, None], rois, 1.0, 1, bins)
    assert out.dtype == dtype and argmax.dtype == torch.int32
    return out.flatten().tolist(), argmax.flatten().tolist()


# Which pixels bins have


def test_the_pixel_at_the_end_belongs_to_the_box():
    assert pooled_row([1, 2, 3, 4], 0, 2) == ([3], [2])
    assert pooled_row([1, 2, 3, 4], 1, 1) == ([2], [1])


def test_bins_overlap():
    """A bin begins with the pixel where its exact bounds begin and has the one where they end."""
    assert pooled_row([0, 5, 1], 0, 2, bins=2) == ([5, 5], [1, 1])
    assert pooled_row([7, 0, 1], 0, 2, bins=2) == ([7, 1], [0, 2])
    assert pooled_row([7, 8], 0, 1, bins=4) == ([7, 7, 8, 8], [0, 0, 1, 1])


def test_inverted_boxes_are_of_one_pixel():
    assert pooled_row([1, 2, 3, 4], 2, -5) == ([3], [2])
    assert pooled_row([1, 2, 3, 4], 2, 1) == ([3], [2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("coordinate", "pixel"),
    [(0.5, 1), (1.5, 2), (2.5, 3), (0.49999997, 0), (1.4999999, 1), (-0.49999997, 0), (-0.5, -1), (3.49, 3), (3.5, 4)],
)
def test_halves_are_rounded_away_from_zero(coordinate, pixel, dtype):
    right = ([5.0 + pixel], [pixel]) if 0 <= pixel < 4 else ([0], [-1])
    assert pooled_row([5, 6, 7, 8], coordinate, coordinate, dtype=dtype) == right


def test_a_number_just_below_one_half_of_float64():
    """Added to one half it is one."""
    assert pooled_row([5, 6], 0.49999999999999994, 0.49999999999999994, dtype=torch.float64) == ([5], [0])


def test_the_coordinates_are_rounded_after_they_are_scaled():
    out = roi_pool(torch.arange(8.0)[None, None, None], box(5, 0, 5, 0), 1, 0.5)
    assert out.item() == 3  # 2.5, and not half of 5


def test_a_bin_without_pixels_is_zero():
    assert pooled_row([-5, -6], -3, 1, bins=5) == ([0, 0, 0, -5, -6], [-1, -1, -1, 0, 1])
    assert pooled_row([-5, -6], 2, 9) == ([0], [-1])


# Which of them wins


def test_the_first_of_equals_wins():
    ones = torch.ones(1, 2, 4, 5, requires_grad=True)
    out = roi_pool(ones, box(1, 1, 3, 2), (1, 1))
    out.backward(torch.full_like(out, 3))
    assert ones.grad.nonzero().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert pooled_row([1, 3, 3, 2], 0, 3) == ([3], [1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("row", "value", "place"),
    [
        ([NAN, 1, 2], 2, 2),
        ([1, NAN, NAN], 1, 0),
        ([NAN, -INF, -3], -3, 2),
        ([INF, NAN, INF], INF, 0),
        ([NAN, NAN, NAN], LOWEST, -1),
        ([-INF, -INF, NAN], LOWEST, -1),
        ([LOWEST, LOWEST, NAN], LOWEST, -1),
        ([-0.0, 0.0, NAN], 0, 0),
    ],
)
def test_nan_never_wins(row, value, place, dtype):
    """Nor does what is not greater than float32's lowest number, which the low precisions round to -inf."""
    assert pooled_row(row, 0, 2, dtype=dtype) == ([torch.tensor(value, dtype=dtype).item()], [place])


def test_what_is_lower_than_float32_is_not_found():
    assert pooled_row([-1e300, -1e40], 0, 1, dtype=torch.float64) == ([LOWEST], [-1])
    assert pooled_row([-1e300, -1e38], 0, 1, dtype=torch.float64) == ([-1e38], [1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bad_pixels_are_torchvisions(torchvision, dtype):
    s = sample("roi_pool", Case(values="bad", bins=(5, 4), regions=20), dtype)
    out, argmax = OP(*s.positional)
    assert (argmax < 0).any() and out.eq(LOWEST).any() and out.eq(math.inf).any()
    expected = torch.ops.torchvision.roi_pool(*s.positional_of_torchvision)
    assert torch.equal(out, expected[0]) and torch.equal(argmax, expected[1])


# Gradients


def test_a_pixel_has_the_gradients_of_all_bins_that_it_wins():
    row = torch.tensor([0.0, 5, 1])[None, None, None].requires_grad_()
    out = roi_pool(row, torch.cat([box(0, 0, 2, 0), box(1, 0, 1, 0)]), (1, 2))
    assert out.flatten().tolist() == [5, 5, 5, 5]
    out.backward(torch.tensor([1.0, 10, 100, 1000]).reshape(out.shape))
    assert row.grad.flatten().tolist() == [0, 1111, 0]


@pytest.mark.parametrize("gradient", [1.0, math.inf, math.nan])
def test_a_place_outside_the_plane_has_no_gradient(gradient):
    argmax = torch.tensor([-1, 5, 6, 2**31 - 1, -(2**31), 2], dtype=torch.int32).reshape(1, 1, 2, 3)
    grad = torch.full((1, 1, 2, 3), gradient)
    grad[..., 0, 1], grad[..., 1, 2] = 2, 3
    out = OP_BACKWARD(grad, box(0, 0, 1, 1), argmax, [1, 1, 2, 3])
    assert out.flatten().tolist() == [0, 0, 3, 0, 0, 2]


def test_low_precision_gradients_are_summed_in_float32():
    """300 ones: bfloat16 cannot count past 256."""
    boxes = torch.zeros(300, 5)
    input = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    roi_pool(input, boxes, 1).sum().backward()
    assert input.grad.item() == 300


WRONG_ARGMAX = {
    "dtype": (
        torch.zeros(8, 5, 2, 3, dtype=torch.int64),
        "argmax must be int32 of grad's shape (8, 5, 2, 3), got torch.int64 (8, 5, 2, 3)",
    ),
    "shape": (
        torch.zeros(8, 5, 2, 2, dtype=torch.int32),
        "argmax must be int32 of grad's shape (8, 5, 2, 3), got torch.int32 (8, 5, 2, 2)",
    ),
    "device": (
        torch.zeros(8, 5, 2, 3, dtype=torch.int32, device="meta"),
        "argmax must be on cpu, got meta",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_ARGMAX)
def test_wrong_places(wrong):
    argmax, message = WRONG_ARGMAX[wrong]
    grad, rois, _, size = sample("roi_pool", "plain").positional_backward
    with pytest.raises(RuntimeError, match=re.escape(f"roi_pool: {message}")):
        OP_BACKWARD(grad, rois, argmax, size)
