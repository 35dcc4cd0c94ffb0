"""What nms and batched_nms mean."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st
from inductor_vision import batched_nms, nms
from inductor_vision.tests.support.boxes import CALLS, THRESHOLDS, Boxes, nms_oracle

OP = torch.ops.inductor_vision.nms.default
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_values(call):
    boxes, scores, classes = call.tensors()
    for threshold in THRESHOLDS:
        assert nms(boxes, scores, threshold).tolist() == nms_oracle(boxes, scores, threshold), threshold
        expected = nms_oracle(boxes, scores, threshold, classes)
        assert batched_nms(boxes, scores, classes, threshold).tolist() == expected, threshold


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_torchvisions_values(call, torchvision):
    boxes, scores, _ = call.tensors()
    for threshold in THRESHOLDS:
        assert torch.equal(nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold)), threshold


def test_torchvisions_classes(torchvision):
    boxes, scores, classes = Boxes(1200).tensors()
    assert (
        scores.unique().numel() == scores.numel()
    )  # torchvision's order of equal scores of two classes is not defined
    expected = torchvision.ops.batched_nms(boxes, scores, classes, 0.5)
    assert torch.equal(batched_nms(boxes, scores, classes, 0.5), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score_dtype", DTYPES, ids=str)
def test_dtypes(dtype, score_dtype):
    boxes, scores, _ = Boxes(90, dtype=dtype).tensors()
    scores = scores.to(score_dtype)
    result = nms(boxes, scores, 0.3)
    assert result.dtype == torch.int64
    assert result.tolist() == nms_oracle(boxes, scores, 0.3)


def test_low_precision_computes_in_float32():
    boxes = torch.tensor([[0, 0, 300, 300], [0, 0, 300, 298]], dtype=torch.float16)  # areas that float16 does not have
    assert nms(boxes, torch.tensor([1.0, 0.5]).half(), 0.99).tolist() == [0]
    assert nms(boxes, torch.tensor([1.0, 0.5]).half(), 0.995).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(dtype):
    boxes, scores, _ = Boxes(90, dtype=dtype).tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = nms(boxes, scores, 0.3)
    assert torch.equal(result, nms(boxes, scores, 0.3))


@pytest.mark.parametrize(("threshold", "kept"), [(1 / 3, [0]), (math.nextafter(1 / 3, 1), [0]), (0.33333335, [0, 1])])
def test_the_comparison_is_in_float64(threshold, kept):
    """In float32 a third is greater than in float64."""
    boxes = torch.tensor([[0.0, 0, 2, 1], [1, 0, 3, 1]])
    assert float(torch.tensor(1.0) / 3) > 1 / 3
    assert nms(boxes, torch.tensor([1.0, 0.5]), threshold).tolist() == kept


def test_an_overlap_equal_to_the_threshold_does_not_suppress():
    boxes = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]])
    scores = torch.tensor([1.0, 0.5])
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms(boxes, scores, math.nextafter(0.5, 0)).tolist() == [0]


def test_a_suppressed_box_does_not_suppress():
    boxes = torch.tensor([[0.0, 0, 10, 1], [4, 0, 14, 1], [8, 0, 18, 1]])
    assert nms(boxes, torch.tensor([3.0, 2.0, 1.0]), 0.4).tolist() == [0, 2]


def test_equal_scores_keep_their_order_and_nan_comes_first():
    apart = torch.arange(6.0)[:, None] * 10 + torch.tensor([0.0, 0, 1, 1])
    scores = torch.tensor([0.5, math.nan, 0.5, -0.0, 0.0, math.inf])
    assert nms(apart, scores, 0.5).tolist() == [1, 5, 0, 2, 3, 4]


def test_boxes_without_area_survive_each_other():
    assert nms(torch.ones(3, 4), torch.ones(3), 0.0).tolist() == [0, 1, 2]


def test_classes_do_not_meet_where_coordinates_are_negative(torchvision):
    """torchvision shifts each class by the largest coordinate, whatever the least one is."""
    boxes = torch.tensor([[-30.0, -30, -20, -20], [-29, -29, -19, -19], [0, 0, 10, 10]])
    scores, classes = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0, 1, 0])
    assert batched_nms(boxes, scores, classes, 0.1).tolist() == [0, 1, 2]
    boxes = torch.tensor([[0.0, 0, 10, 10], [-11, -11, -1, -1]])
    assert torchvision.ops.batched_nms(boxes, scores[:2], classes[:2], 0.1).tolist() == [0]
    assert batched_nms(boxes, scores[:2], classes[:2], 0.1).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float32, torch.float64], ids=str)
def test_dtypes_of_classes(dtype):
    boxes, scores, _ = Boxes(90).tensors()
    classes = torch.arange(90) % 2
    assert torch.equal(batched_nms(boxes, scores, classes.to(dtype), 0.3), batched_nms(boxes, scores, classes, 0.3))


def test_classes_that_are_floating_numbers_are_not_rounded():
    boxes, scores = torch.tensor([[0.0, 0, 1, 1]] * 4), torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert batched_nms(boxes, scores, torch.tensor([0.25, 0.5, 0.0, -0.0]), 0.5).tolist() == [0, 1, 2]


def test_the_operator_pads():
    boxes, scores, classes = Boxes(90).tensors()
    padded, kept = OP(boxes, scores, classes, 0.1), batched_nms(boxes, scores, classes, 0.1)
    assert padded.shape == (90,) and 0 < len(kept) < 90
    assert torch.equal(padded[: len(kept)], kept) and (padded[len(kept) :] == -1).all()


@given(st.lists(st.tuples(*[st.integers(-3, 3)] * 4, st.integers(0, 3), st.integers(0, 1)), max_size=12), st.data())
def test_any_boxes(rows, data):
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    boxes, scores, classes = table[:, :4], table[:, 4], table[:, 5].long()
    threshold = data.draw(st.sampled_from((0.0, 0.25, 1 / 3, 0.5)))
    assert nms(boxes, scores, threshold).tolist() == nms_oracle(boxes, scores, threshold)
    assert batched_nms(boxes, scores, classes, threshold).tolist() == nms_oracle(boxes, scores, threshold, classes)


def test_opcheck():
    pytest.importorskip("expecttest")
    boxes, scores, classes = Boxes(20).tensors()
    for given_classes in (None, classes):
        torch.library.opcheck(OP, (boxes, scores, given_classes, 0.5))


def test_boxes_that_require_gradients():
    boxes, scores, _ = Boxes(20).tensors()
    assert not nms(boxes.requires_grad_(), scores.requires_grad_(), 0.5).requires_grad


WRONG = {
    r"boxes must be \[N, 4\].*got \(2, 5\)": (torch.ones(2, 5), torch.ones(2), None),
    r"boxes must be \[N, 4\].*got \(4,\)": (torch.ones(4), torch.ones(2), None),
    r"boxes must be of a floating dtype, got torch.int64": (torch.ones(2, 4).long(), torch.ones(2), None),
    r"scores must be of a floating dtype, got torch.int64": (torch.ones(2, 4), torch.ones(2).long(), None),
    r"scores must be \[N\].*got \(2, 1\)": (torch.ones(2, 4), torch.ones(2, 1), None),
    r"scores must be one for each box; there are 3 and 2 boxes": (torch.ones(2, 4), torch.ones(3), None),
    r"scores must be on cpu, got meta": (torch.ones(2, 4), torch.ones(2, device="meta"), None),
    r"idxs must be one for each box; there are 1 and 2 boxes": (torch.ones(2, 4), torch.ones(2), torch.ones(1)),
    r"idxs must be \[N\].*got \(2, 2\)": (torch.ones(2, 4), torch.ones(2), torch.ones(2, 2)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    boxes, scores, classes = WRONG[message]
    with pytest.raises(RuntimeError, match=message):
        nms(boxes, scores, 0.5) if classes is None else batched_nms(boxes, scores, classes, 0.5)


def test_no_boxes_as_torchvision_takes_them():
    none = torch.empty(0)
    assert batched_nms(none, none, none.long(), 0.5).shape == (0,)
    with pytest.raises(RuntimeError, match=r"boxes must be \[N, 4\]"):
        batched_nms(torch.ones(3), torch.ones(3), torch.ones(3), 0.5)
