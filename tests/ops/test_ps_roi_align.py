"""What ps_roi_align has of its own, beside what is in test_regions.py: channels of bins, and no least size."""

from __future__ import annotations

import pytest
import torch
from inductor_vision import ps_roi_align, roi_align
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.regions import Case, sample
from torch import Tensor


def box(x1: float, y1: float, x2: float, y2: float) -> Tensor:
    return torch.tensor([[0, x1, y1, x2, y2]], dtype=torch.float64)


@pytest.mark.parametrize("ratio", [2, -1])
def test_each_bin_has_channels_of_its_own(ratio):
    """A map whose values are the numbers of its channels."""
    input = torch.arange(4.0 * 2 * 3)[:, None, None].double().expand(1, 24, 7, 9)
    out = ps_roi_align(input, box(1, 2, 8, 6), (2, 3), 1.0, ratio)
    assert_close(out, torch.arange(24.0).double().reshape(1, 4, 2, 3), torch.float64)


@pytest.mark.parametrize("name", ["plain", "ratio_1", "adaptive_larger", "samples_at_borders", "odd_scale", "bins_1x5"])
def test_it_is_roi_align_aligned_where_there_are_samples(name):
    s = sample("ps_roi_align", name, torch.float64)
    out = ps_roi_align(*s.arguments)
    of_all_channels = roi_align(*s.arguments, aligned=True)
    channels = s.channel_mapping.long()
    k, _, p, q = torch.meshgrid(*map(torch.arange, out.shape), indexing="ij")
    assert not out.isnan().any()
    assert_close(out, of_all_channels[k, channels, p, q], torch.float64)


@pytest.mark.parametrize("ratio", [1, 2, 3, -1])
def test_of_a_linear_map_it_is_the_value_at_the_centres_of_bins(ratio):
    """Coordinates count from the corner of the first pixel."""
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(12.0), indexing="ij")
    linear = (3 * y - 2 * x + 1).double().expand(1, 2, 9, 12)
    rows = 0.5 * (3 + (torch.arange(2) + 0.5) * (15 - 3) / 2) - 0.5
    out = ps_roi_align(linear, box(4, 3, 20, 15), (2, 1), 0.5, ratio)
    assert_close(out[0, 0, :, 0], (3 * rows - 2 * (0.5 * 12 - 0.5) + 1).double(), torch.float64)


def test_a_bin_for_each_pixel_is_the_map():
    input = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    of_each_bin = input.repeat_interleave(8, 1)
    assert_close(ps_roi_align(of_each_bin, box(0, 0, 4, 2), (2, 4), 1.0, 1), input, torch.float64)


def test_boxes_have_no_least_size():
    """One of a thousandth of a pixel is its centre, whatever it has around it."""
    input = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    around = box(2.4995, 3.4995, 2.5005, 3.5005)
    for ratio in (1, 2, -1):
        out = ps_roi_align(input, around, 1, 1.0, ratio)
        assert (out[0, :, 0, 0] - input[0, :, 3, 2]).abs().max() < 0.01


def test_an_empty_grid_is_nan_and_has_no_gradient(torchvision):
    """Where a box has no extent, 0 samples are divided by 0; where it is inverted, by a negative number."""
    input = torch.randn(1, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.cat([box(1, 2, 1, 4), box(1, 2, 3, 2), box(2, 2, 2, 2), box(5, 2, 1, 4), box(5, 5, 1, 1)])
    out = ps_roi_align(input, rois, 2, 1.0, -1)
    assert out[:3].isnan().all() and out[3:].eq(0).all()
    out.sum().backward()
    assert input.grad.eq(0).all()
    theirs = torchvision.ops.ps_roi_align(input, rois, 2, 1.0, -1)
    assert torch.equal(out.nan_to_num(7), theirs.nan_to_num(7))


def test_an_empty_grid_leaves_the_boxes_beside_it_alone():
    s = sample("ps_roi_align", Case(boxes="inside", sampling_ratio=-1, regions=3), torch.float64)
    rois = s.rois.clone()
    rois[1, 3] = rois[1, 1]
    out, right = ps_roi_align(s.input, rois, *s.arguments[2:]), ps_roi_align(*s.arguments)
    assert out[1].isnan().all() and torch.equal(out[[0, 2]], right[[0, 2]])


@pytest.mark.parametrize("ratio", [2, -1])
def test_the_gradient_of_a_box_inside_adds_up(ratio):
    s = sample("ps_roi_align", Case(boxes="inside", sampling_ratio=ratio), torch.float64)
    gradient = torch.ops.inductor_vision.ps_roi_align_backward(*s.positional_backward)
    for image in range(s.case.batch):
        of_bins = s.gradient[s.rois[:, 0] == image].sum(0)
        assert_close(gradient[image].sum((1, 2)), of_bins.flatten(), torch.float64)
