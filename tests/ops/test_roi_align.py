"""What roi_align has of its own, beside what is in test_regions.py: where it samples, and levels."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from inductor_vision import roi_align
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.regions import Case, pyramid, roi_align_gradient_oracle, roi_align_oracle, sample
from torch import Tensor, nn
from torch.export import Dim

OP = torch.ops.inductor_vision.roi_align.default
OP_BACKWARD = torch.ops.inductor_vision.roi_align_backward.default


def box(x1: float, y1: float, x2: float, y2: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([[0, x1, y1, x2, y2]], dtype=dtype)


# Where it samples


@pytest.mark.parametrize("ratio", [1, 2, 3, -1])
@pytest.mark.parametrize("aligned", [False, True])
def test_of_a_linear_map_it_is_the_value_at_the_centres_of_bins(aligned, ratio):
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(12.0), indexing="ij")
    linear = (3 * y - 2 * x + 1).double()[None, None]
    scale, shift = 0.25, 0.5 if aligned else 0
    x1, y1, x2, y2 = 5.0, 7.0, 38.0, 30.0
    rows = scale * (y1 + (torch.arange(4) + 0.5) * (y2 - y1) / 4) - shift
    columns = scale * (x1 + (torch.arange(3) + 0.5) * (x2 - x1) / 3) - shift
    out = roi_align(linear, box(x1, y1, x2, y2), (4, 3), scale, ratio, aligned)
    assert_close(out, (3 * rows[:, None] - 2 * columns + 1)[None, None].double(), torch.float64)


def test_a_bin_for_each_pixel_is_the_map():
    """With aligned=True, boxes count from the corner of the first pixel."""
    input = torch.randn(1, 3, 5, 7, dtype=torch.float64)
    assert_close(roi_align(input, box(0, 0, 7, 5), (5, 7), 1.0, 1, True), input, torch.float64)
    assert_close(roi_align(input, box(-0.5, -0.5, 6.5, 4.5), (5, 7), 1.0, 1, False), input, torch.float64)


def sampled_at(column: Any, aligned: bool) -> Tensor:
    """The value of a row of the pixels 1, 2, 4 there, and its gradient."""
    input = torch.tensor([[[[1.0, 2, 4]]]], requires_grad=True, dtype=torch.float64)
    shift = 0.5 if aligned else 0
    out = roi_align(input, box(column - 1 + shift, -0.5 + shift, column + 1 + shift, 0.5 + shift), 1, 1.0, 1, aligned)
    out.backward(torch.ones_like(out))
    return torch.cat([out.flatten(), input.grad.flatten()])


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(
    ("column", "value", "gradient"),
    [
        (-1 - 2**-20, 0, [0, 0, 0]),
        (-1, 1, [1, 0, 0]),
        (-0.25, 1, [1, 0, 0]),
        (0, 1, [1, 0, 0]),
        (0.25, 1.25, [0.75, 0.25, 0]),
        (1, 2, [0, 1, 0]),
        (2, 4, [0, 0, 1]),
        (2.75, 4, [0, 0, 1]),
        (3, 4, [0, 0, 1]),
        (3 + 2**-20, 0, [0, 0, 0]),
    ],
)
def test_at_and_beyond_the_borders(column, value, gradient, aligned):
    """A sample in [-1, W] counts, and takes the nearest pixel where it has none on one side."""
    assert sampled_at(column, aligned).tolist() == [value, *gradient]


def test_the_pixel_beside_one_that_is_hit_counts_zero_times():
    """As in torchvision: where it is NaN, so is the bin, and no other."""
    row = torch.tensor([1.0, 2, math.nan, 4, 5])[None, None, None]
    out = roi_align(row, box(-0.5, -0.5, 4.5, 0.5, torch.float32), (1, 5), 1.0, 1)
    assert out.flatten().nan_to_num(-1).tolist() == [1, -1, -1, 4, 5]


@pytest.mark.parametrize("ratio", [1, 2, -1])
def test_boxes_are_at_least_a_pixel_unless_aligned(ratio):
    input = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    of_a_pixel = roi_align(input, box(2.25, 3.5, 3.25, 4.5), 2, 1.0, ratio)
    for x2, y2 in ((2.25, 3.5), (2.75, 4.5), (-5, 4), (-math.inf, -1e30)):
        assert torch.equal(roi_align(input, box(2.25, 3.5, x2, y2), 2, 1.0, ratio), of_a_pixel)
    of_a_point = roi_align(input, box(2.5, 3.5, 2.5, 3.5), 2, 1.0, 2, True)
    assert_close(of_a_point, input[:, :, 3, 2][..., None, None].expand(1, 4, 2, 2), torch.float64)


def test_an_empty_grid_is_zero():
    """The grid of a box without an extent, or of an inverted one, is empty if it is adaptive and aligned."""
    input = torch.randn(1, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.cat([box(1, 2, 1, 4), box(1, 2, 3, 2), box(3, 2, 1, 4), box(5, 5, 1, 1), box(1, 1, 4, 4)])
    out = roi_align(input, rois, 2, 1.0, -1, True)
    assert out[:4].eq(0).all() and out[4].any()
    out[:4].sum().backward()
    assert input.grad.eq(0).all()


@pytest.mark.parametrize("aligned", [False, True])
def test_an_adaptive_grid_is_of_each_box_and_axis(aligned):
    input = torch.randn(1, 3, 9, 17, dtype=torch.float64)
    rois = torch.cat([box(1, 1, 4, 5), box(0, 2, 16, 6.5), box(2, 0, 8, 7)])
    out = roi_align(input, rois, (2, 3), 1.0, -1, aligned)
    assert torch.equal(out, roi_align(input, rois, (2, 3), 1.0, 0, aligned))
    for k, (rows, columns) in enumerate([(2, 1), (3, 6), (4, 2)]):  # of samples in each of the 2 x 3 bins
        each = roi_align(input, rois[[k]], (2 * rows, 3 * columns), 1.0, 1, aligned)
        assert_close(out[[k]], each.reshape(1, 3, 2, rows, 3, columns).mean((3, 5)), torch.float64)


def test_low_precision_sums_in_float32():
    """400 ones: bfloat16 cannot count past 256."""
    ones = torch.ones(1, 1, 6, 6, dtype=torch.bfloat16)
    assert roi_align(ones, box(1, 1, 5, 5, torch.float32), 1, 1.0, 20).item() == 1
    gradient = OP_BACKWARD(ones[..., :1, :1], box(1, 1, 1, 1, torch.float32), None, [1.0], [1, 1, 2, 2], 20, True, 0)
    assert gradient.flatten().tolist() == [0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("ratio", [2, -1])
def test_the_gradient_of_a_box_inside_adds_up(ratio):
    s = sample("roi_align", Case(boxes="inside", sampling_ratio=ratio), torch.float64)
    gradient = OP_BACKWARD(*s.positional_backward)
    for image in range(s.case.batch):
        assert_close(gradient[image].sum((1, 2)), s.gradient[s.rois[:, 0] == image].sum((0, 2, 3)), torch.float64)


@pytest.mark.parametrize("size", [1e9, 1e30, 3e38])
def test_a_grid_of_any_size_ends(size):
    """Only those of 1e9 samples that lie in the map are taken; their mean is next to nothing."""
    input = torch.ones(1, 2, 5, 6)
    for corners in ((-size, -size, size, size), (-size, 1, 5, 3), (0, 0, size, size), (-size, -size, 4, 4)):
        out = roi_align(input, box(*corners, torch.float32), 2, 1.0, -1)
        assert out.abs().max() < 1e-6


def test_coordinates_of_float64_are_of_float64():
    """What of a map of one step differs if coordinates are float32's."""
    step = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    step[..., 1] = 1
    column = 0.1
    out = roi_align(step, box(column, 0, column, 0), 1, 1.0, 1, False) - 0.5
    assert abs(out.item() - column) < 1e-15 < abs(float(np.float32(column)) - column)


# Levels


def test_each_region_is_on_its_level():
    s = pyramid("plain", torch.float64)
    levels = torch.tensor([0, 1, 2, -1, 3] * 4)
    features = [feature.requires_grad_() for feature in s.features]
    out = OP(features, s.rois, levels, *s.positional[3:])
    gradients = torch.autograd.grad(out, features, s.gradient)
    assert out[levels == 0].any() and out[levels == 2].any()
    assert out[(levels == -1) | (levels == 3)].eq(0).all()
    for level, (feature, scale) in enumerate(zip(features, s.scales)):
        here = levels == level
        arguments = (feature, s.rois[here], s.case.bins, scale, s.case.sampling_ratio, s.case.aligned)
        assert_close(out[here], roi_align_oracle(*arguments), torch.float64)
        assert_close(gradients[level], roi_align_gradient_oracle(s.gradient[here], *arguments), torch.float64)


# What is changed in a right call on 3 maps with 20 regions, and what the error says.
WRONG_LEVELS = {
    "none": (
        {"levels": None},
        "levels must say which of the 3 feature maps each region is on",
    ),
    "dtype": (
        {"levels": torch.zeros(20, dtype=torch.int32)},
        "levels must be int64 [20], got torch.int32 (20,)",
    ),
    "number": (
        {"levels": torch.zeros(19, dtype=torch.int64)},
        "levels must be int64 [20], got torch.int64 (19,)",
    ),
    "rank": (
        {"levels": torch.zeros(20, 1, dtype=torch.int64)},
        "levels must be int64 [20], got torch.int64 (20, 1)",
    ),
    "device": (
        {"levels": torch.zeros(20, dtype=torch.int64, device="meta")},
        "levels must be on cpu, got meta",
    ),
    "scales": (
        {"spatial_scales": [0.5, 0.25]},
        "there must be a spatial scale for each of the 3 feature maps, got 2",
    ),
    "no_maps": (
        {"inputs": [], "spatial_scales": []},
        "there must be at least one feature map",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_LEVELS)
def test_wrong_levels(wrong):
    changes, message = WRONG_LEVELS[wrong]
    names = [argument.name for argument in OP._schema.arguments]
    right = dict(zip(names, pyramid("plain").positional))
    OP(**right)
    with pytest.raises(RuntimeError, match=re.escape(f"roi_align: {message}")):
        OP(**{**right, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_with_levels(dtype):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    s = pyramid("plain", dtype)
    features = [feature.requires_grad_() for feature in s.features]
    torch.library.opcheck(OP, (features, *s.positional[1:]), test_utils=("test_schema", "test_faketensor"))
    size, options = list(s.features[1].shape), (s.case.sampling_ratio, s.case.aligned)
    torch.library.opcheck(OP_BACKWARD, (s.gradient, s.rois, s.levels, s.scales, size, *options, 1))


# Export


@pytest.mark.parametrize("ratio", [2, -1])
def test_exported_with_a_list_of_boxes(ratio):
    class Model(nn.Module):
        def forward(self, input: Tensor, first: Tensor, second: Tensor) -> Tensor:
            return roi_align(input, [first, second], (2, 3), 0.5, ratio)

    def arguments(*boxes: int) -> tuple[Tensor, ...]:
        corners = [9 * torch.rand(number, 4) for number in boxes]
        return torch.randn(2, 5, 7, 9), *corners

    model = Model()
    dynamic = {0: Dim.AUTO}
    program = torch.export.export(model, arguments(3, 4), dynamic_shapes=(None, dynamic, dynamic))
    for boxes in ((3, 4), (2, 9), (20, 5)):
        inputs = arguments(*boxes)
        assert torch.equal(program.module()(*inputs), model(*inputs))
