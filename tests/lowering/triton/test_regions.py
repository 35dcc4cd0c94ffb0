"""The programs of the operators on regions, with Triton kernels, compute what their decompositions do."""

from __future__ import annotations

import pytest
import torch
from inductor_vision.ops.registry import OPS
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.regions import HOSTILE, OPERATORS, Case, sample
from inductor_vision.tests.support.triton import run_program

BOTH = [*OPERATORS, *(f"{op}_backward" for op in OPERATORS if op != "roi_pool")]
CASES = [
    *("plain", "ratio_3", "adaptive_aligned", "adaptive_larger", "crossing", "corners_at_borders", "halves", "empty"),
    *("inverted", "no_regions", "input_channels_last", "rois_transposed", "tied", "one_pixel", "bad"),
]


def check(op: str, case: str | Case, dtype: torch.dtype, device: torch.device) -> None:
    s = sample(op.removesuffix("_backward"), case, dtype)
    arguments = s.positional_backward if op.endswith("_backward") else s.positional
    actual, expected = run_program(op, arguments, device), OPS[op].decomposition(*arguments)
    if op == "roi_pool":
        assert torch.equal(actual[1], expected[1])
        actual, expected = actual[0], expected[0]
    assert actual.dtype == dtype
    assert_close(actual, expected, dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if expected.numel() > 0 and expected.is_contiguous(memory_format=memory_format):
            assert actual.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", BOTH)
def test_values(op: str, case: str, device: torch.device):
    check(op, case, torch.float32, device)


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("op", BOTH)
def test_boxes_that_are_nan_infinite_or_huge(op: str, case: str, device: torch.device):
    """The interpreter refuses to read or write outside of tensors."""
    check(op, case, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", BOTH)
def test_dtypes(op: str, dtype: torch.dtype, device: torch.device):
    check(op, "adaptive_aligned", dtype, device)


@pytest.mark.parametrize("op", ["roi_align", "ps_roi_align"])
def test_blocks_of_bins_and_channels(op: str, device: torch.device):
    """More of both than a program has, in either memory format."""
    for layout in ("contiguous", "channels_last"):
        check(op, Case(channels=70, bins=(9, 8), regions=2, layout=layout, size=(5, 6)), torch.float32, device)


def test_levels(device: torch.device):
    """Each region is pooled from the map of its level, and from none where the level is none of theirs."""
    s = sample("roi_align", "plain")
    maps = [s.input, s.input[:, :, ::2, ::2].contiguous()]
    levels = torch.arange(len(s.rois)) % 3 - 1
    arguments = (maps, s.rois, levels, [0.5, 0.25], 2, 3, 0, True)
    assert_close(run_program("roi_align", arguments, device), OPS["roi_align"].decomposition(*arguments), torch.float32)
    for level, map in enumerate(maps):
        arguments = (s.gradient, s.rois, levels, [0.5, 0.5], list(map.shape), 0, True, level)
        expected = OPS["roi_align_backward"].decomposition(*arguments)
        assert_close(run_program("roi_align_backward", arguments, device), expected, torch.float32)
