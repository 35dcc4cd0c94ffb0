"""What nms_rotated and batched_nms_rotated mean."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st
from inductor_vision import batched_nms_rotated, nms_rotated
from inductor_vision.tests.support.boxes import ROTATED_CALLS, RotatedBoxes, nms_rotated_oracle

OP = torch.ops.inductor_vision.nms_rotated.default
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("call", [call for call in ROTATED_CALLS if call.count <= 90], ids=str)
def test_values(call):
    boxes, scores, classes = call.tensors()
    for threshold in (0.0, 0.1, 0.4, 0.7, 2.0, -0.5, math.nan):
        assert nms_rotated(boxes, scores, threshold).tolist() == nms_rotated_oracle(boxes, scores, threshold), threshold
        expected = nms_rotated_oracle(boxes, scores, threshold, classes)
        assert batched_nms_rotated(boxes, scores, classes, threshold).tolist() == expected, threshold


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score_dtype", DTYPES, ids=str)
def test_dtypes(dtype, score_dtype):
    boxes, scores, _ = RotatedBoxes(40, dtype=dtype).tensors()
    scores = scores.to(score_dtype)
    result = nms_rotated(boxes, scores, 0.3)
    assert result.dtype == torch.int64
    assert result.tolist() == nms_rotated_oracle(boxes, scores, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nms_rotated(boxes, scores, 0.3), result)


@pytest.mark.parametrize("angle", [0, 90, -270, 360])
def test_an_overlap_equal_to_the_threshold_does_not_suppress(angle):
    boxes = torch.tensor([[0.0, 0, 2, 2, angle], [0, 0, 1, 2, angle]])
    scores = torch.tensor([1.0, 0.5])
    assert nms_rotated(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms_rotated(boxes, scores, math.nextafter(0.5, 0)).tolist() == [0]


def test_boxes_whose_upright_boxes_overlap_need_not():
    crossed = torch.tensor([[0.0, 0, 20, 1, 45], [4, 4, 20, 1, 45], [0, 0, 20, 1, -45]])
    assert nms_rotated(crossed, torch.tensor([3.0, 2.0, 1.0]), 0.0).tolist() == [0, 1]


def test_equal_scores_keep_their_order_and_nan_comes_first():
    apart = torch.arange(4.0)[:, None] * 10 + torch.tensor([0.0, 0, 1, 1, 0])
    apart[:, 2:4] = 1
    assert nms_rotated(apart, torch.tensor([0.5, math.nan, 0.5, math.inf]), 0.5).tolist() == [1, 3, 0, 2]


@given(
    st.lists(
        st.tuples(*[st.integers(-2, 2)] * 2, *[st.integers(-1, 3)] * 2, st.integers(0, 8), st.integers(0, 3)),
        max_size=8,
    )
)
def test_any_boxes(rows):
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    boxes, scores = table[:, :5] * torch.tensor([1, 1, 1, 1, 45]), table[:, 5]
    assert nms_rotated(boxes, scores, 0.27).tolist() == nms_rotated_oracle(boxes, scores, 0.27)


def test_opcheck():
    pytest.importorskip("expecttest")
    boxes, scores, classes = RotatedBoxes(12).tensors()
    for given_classes in (None, classes):
        torch.library.opcheck(OP, (boxes, scores, given_classes, 0.5))


def test_boxes_that_require_gradients():
    boxes, scores, _ = RotatedBoxes(12).tensors()
    assert not nms_rotated(boxes.requires_grad_(), scores.requires_grad_(), 0.5).requires_grad


WRONG = {
    r"nms_rotated: boxes must be \[N, 5\], rows of \(x, y, width, height, angle\); got \(2, 4\)": (
        torch.ones(2, 4),
        torch.ones(2),
        None,
    ),
    r"scores must be one for each box; there are 3 and 2 boxes": (torch.ones(2, 5), torch.ones(3), None),
    r"idxs must be \[N\].*got \(2, 2\)": (torch.ones(2, 5), torch.ones(2), torch.ones(2, 2)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    boxes, scores, classes = WRONG[message]
    with pytest.raises(RuntimeError, match=message):
        nms_rotated(boxes, scores, 0.5) if classes is None else batched_nms_rotated(boxes, scores, classes, 0.5)
