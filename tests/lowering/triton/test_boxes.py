"""Suppression and keypoints, with Triton kernels, find what their decompositions do."""

from __future__ import annotations

import pytest
import torch
from inductor_vision.ops.registry import OPS
from inductor_vision.tests.support.boxes import KINDS, NAN, Boxes, RotatedBoxes
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.triton import run_program
from torch import Tensor

CALLS = [Boxes(0), Boxes(1), *(Boxes(75, kind) for kind in KINDS)]


@pytest.mark.parametrize("boxes", CALLS, ids=str)
@pytest.mark.parametrize("threshold", [0.3, 0.5, -0.5, NAN])
def test_nms(boxes: Boxes, threshold: float, device: torch.device):
    tensors = boxes.tensors()
    for classes in (None, tensors[2]):
        arguments = (*tensors[:2], classes, threshold)
        assert torch.equal(run_program("nms", arguments, device), OPS["nms"].decomposition(*arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_nms_in_other_dtypes(dtype: torch.dtype, device: torch.device):
    arguments = (*Boxes(75, dtype=dtype).tensors(), 0.4)
    assert torch.equal(run_program("nms", arguments, device), OPS["nms"].decomposition(*arguments))


def test_nms_of_more_boxes_than_a_block_of_words_has(device: torch.device):
    """A block is 64 words of 32 boxes."""
    boxes, scores, _ = Boxes(64 * 32 + 40).tensors()
    boxes = boxes + 200 * torch.arange(len(boxes))[:, None].div(60, rounding_mode="floor")
    arguments = (boxes, scores, None, 0.3)
    expected = OPS["nms"].decomposition(*arguments)
    assert (expected >= 0).sum() > 700
    assert torch.equal(run_program("nms", arguments, device), expected)


@pytest.mark.parametrize("kind", ["uniform", "tied", "improper"])
def test_nms_rotated(kind: str, device: torch.device):
    tensors = RotatedBoxes(75, kind).tensors()
    for classes in (None, tensors[2]):
        arguments = (*tensors[:2], classes, 0.3)
        expected = OPS["nms_rotated"].decomposition(*arguments)
        assert torch.equal(run_program("nms_rotated", arguments, device), expected)


@pytest.mark.parametrize("boxes", CALLS, ids=str)
@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms(boxes: Boxes, method: str, device: torch.device):
    tensors = boxes.tensors()
    for classes in (None, tensors[2]):
        check_soft_nms((*tensors[:2], classes, 0.3, 0.5, 0.05, method), device)


def test_soft_nms_of_more_boxes_than_a_block_has(device: torch.device):
    """A block is 512 boxes. Few of them are taken."""
    boxes, scores, _ = Boxes(600).tensors()
    check_soft_nms((boxes, scores, None, 0.3, 0.5, 0.95, "linear"), device)


def check_soft_nms(arguments: tuple, device: torch.device) -> None:
    indices, scores = run_program("soft_nms", arguments, device)
    right_indices, right_scores = OPS["soft_nms"].decomposition(*arguments)
    assert torch.equal(indices, right_indices)
    assert_close(scores, right_scores, torch.float32)


def heatmaps(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    maps = torch.randn(4, 2, 6, 7, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor([[1.5, 2, 9.25, 8], [0, 0, 150, 3.5], [5, 5, 5, 5], [-20, 8, -11, 2]])
    return maps.to(dtype), rois


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_heatmaps_to_keypoints(dtype: torch.dtype, device: torch.device):
    arguments = heatmaps(dtype)
    expected = OPS["heatmaps_to_keypoints"].decomposition(*arguments)
    assert_close(run_program("heatmaps_to_keypoints", arguments, device), expected, torch.float32)


def test_heatmaps_with_nan(device: torch.device):
    maps, rois = heatmaps(torch.float32)
    maps[0, 0, 3, 3] = NAN
    expected = OPS["heatmaps_to_keypoints"].decomposition(maps, rois)
    assert_close(run_program("heatmaps_to_keypoints", (maps, rois), device), expected, torch.float32)
