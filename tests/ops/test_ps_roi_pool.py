"""What ps_roi_pool has of its own, beside what is in test_regions.py: channels of bins, and the last pixels."""

from __future__ import annotations

import math

import pytest
import torch
from inductor_vision import ps_roi_pool
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.regions import Case, sample
from torch import Tensor

OP_BACKWARD = torch.ops.inductor_vision.ps_roi_pool_backward.default


def box(x1: float, y1: float, x2: float, y2: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([[0, x1, y1, x2, y2]], dtype=dtype)


def pooled_row(row: list[float], x1: float, x2: float) -> float:
    """The mean over a box in a map of this row, and another row that is never read."""
    input = torch.tensor([row, [math.nan] * len(row)], dtype=torch.float64)[None, None]
    return ps_roi_pool(input, box(x1, 0, x2, 1), 1).item()


def gradient_of_row(width: int, x1: float, x2: float, dtype: torch.dtype = torch.float64) -> list[float]:
    """How 12 are spread over the pixels of the first of three rows."""
    gradient = OP_BACKWARD(torch.full((1, 1, 1, 1), 12, dtype=dtype), box(x1, 0, x2, 1, dtype), 1.0, [1, 1, 3, width])
    assert gradient[0, 0, 1:].eq(0).all()
    return gradient[0, 0, 0].tolist()


def test_each_bin_has_channels_of_its_own():
    """A map whose values are the numbers of its channels."""
    input = torch.arange(4.0 * 2 * 3)[:, None, None].double().expand(1, 24, 7, 9)
    out = ps_roi_pool(input, box(1, 2, 7, 6), (2, 3))
    assert_close(out, torch.arange(24.0).double().reshape(1, 4, 2, 3), torch.float64)


def test_the_pixel_at_the_end_does_not_belong_to_the_box():
    assert pooled_row([1, 2, 4, 8, 16], 0, 2) == 1.5
    assert pooled_row([1, 2, 4, 8, 16], 1, 4) == 14 / 3
    assert gradient_of_row(5, 1, 4) == [0, 4, 4, 4, 0]


def test_boxes_without_an_extent_are_of_one_pixel():
    for end in (1, 0, -7):
        assert pooled_row([1, 2, 4, 8], 1, end) == 2
        assert gradient_of_row(4, 1, end) == [0, 12, 0, 0]


def test_bins_overlap():
    """Three pixels for two bins: the one in the middle is in both."""
    input = torch.tensor([[1.0, 2, 4, 0], [0, 0, 0, 0]]).expand(1, 2, 2, 4)
    assert ps_roi_pool(input, box(0, 0, 3, 1, torch.float32), (1, 2)).flatten().tolist() == [1.5, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("coordinate", "pixel"),
    [(0.5, 1), (1.5, 2), (2.5, 3), (0.49999997, 0), (1.4999999, 1), (-0.49999997, 0), (-0.5, -1), (3.49, 3)],
)
def test_halves_are_rounded_away_from_zero(coordinate, pixel, dtype):
    row = torch.tensor([5, 6, 7, 8, 9], dtype=dtype).expand(1, 1, 2, 5)
    out = ps_roi_pool(row, box(coordinate, 0, coordinate, 0, dtype), 1)
    assert out.item() == (5 + pixel if pixel >= 0 else 0)
    expected = [12.0 if i == pixel else 0 for i in range(5)]
    assert gradient_of_row(5, coordinate, coordinate, dtype) == expected


def test_a_number_just_below_one_half_of_float64():
    """Added to one half it is one, and so it is in float32, as which torchvision's gradient rounds it."""
    below = 0.49999999999999994
    assert pooled_row([5, 6, 7], below, below) == 5
    assert gradient_of_row(3, below, below) == [12, 0, 0]


def test_a_bin_without_pixels_is_zero():
    """And leaves the bins beside it alone."""
    input = torch.ones(1, 3, 4, 4)
    out = ps_roi_pool(input, box(-4, 0, 2, 2, torch.float32), (1, 3))
    assert out.flatten().tolist() == [0, 0, 1]


def test_the_last_row_and_column_are_never_read():
    s = sample("ps_roi_pool", Case(boxes="larger"), torch.float64)
    input = s.input.clone()
    input[..., -1], input[..., -1, :] = math.nan, math.nan
    out = ps_roi_pool(input, *s.arguments[1:])
    assert out.any() and torch.equal(out, ps_roi_pool(*s.arguments))
    assert pooled_row([1, 2, 4], 0, 3) == 1.5
    assert pooled_row([1, 2, 4], 2, 3) == 0


def test_the_gradient_is_that_of_bins_with_the_last_row_and_column():
    """As in torchvision it is not the derivative there."""
    assert gradient_of_row(3, 0, 3) == [4, 4, 4]
    assert gradient_of_row(3, 2, 3) == [0, 0, 12]
    assert gradient_of_row(1, 0, 1) == [12]


def test_the_gradient_of_a_box_inside_adds_up():
    s = sample("ps_roi_pool", Case(boxes="inside"), torch.float64)
    gradient = OP_BACKWARD(*s.positional_backward)
    for image in range(s.case.batch):
        of_bins = s.gradient[s.rois[:, 0] == image].sum(0)
        assert_close(gradient[image].sum((1, 2)), of_bins.flatten(), torch.float64)


def test_low_precision_sums_in_float32():
    """400 ones: bfloat16 cannot count past 256."""
    ones = torch.ones(1, 1, 21, 21, dtype=torch.bfloat16)
    assert ps_roi_pool(ones, box(0, 0, 21, 21, torch.float32), 1).item() == 1
    boxes = torch.zeros(300, 5)
    gradient = OP_BACKWARD(torch.ones(300, 1, 1, 1, dtype=torch.bfloat16), boxes, 1.0, [1, 1, 2, 2])
    assert gradient.flatten().tolist() == [300, 0, 0, 0]
