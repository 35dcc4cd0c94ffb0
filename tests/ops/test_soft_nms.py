"""What soft_nms and batched_soft_nms mean."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, strategies as st
from inductor_vision import batched_soft_nms, nms, soft_nms
from inductor_vision.tests.support.boxes import CALLS, Boxes, assert_taken, soft_nms_oracle

OP = torch.ops.inductor_vision.soft_nms.default
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
RULES = (
    {},
    {"method": "gaussian"},
    {"iou_threshold": 0.0, "min_score": 0.3},
    {"iou_threshold": 0.6, "min_score": 0.0},
    {"iou_threshold": -0.5, "min_score": -math.inf},
    {"iou_threshold": math.nan},
    {"method": "gaussian", "sigma": 0.1, "min_score": 0.1},
)
HALVES = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]])  # one is half of the other


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_values(call):
    boxes, scores, classes = call.tensors()
    before = boxes.clone(), scores.clone()
    for rule in RULES:
        assert_taken(soft_nms(boxes, scores, **rule), soft_nms_oracle(boxes, scores, **rule))
        expected = soft_nms_oracle(boxes, scores, **rule, classes=classes)
        assert_taken(batched_soft_nms(boxes, scores, classes, **rule), expected)
    torch.testing.assert_close((boxes, scores), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score_dtype", DTYPES, ids=str)
def test_dtypes(dtype, score_dtype):
    boxes, scores, _ = Boxes(60, dtype=dtype).tensors()
    scores = scores.to(score_dtype)
    indices, lowered = soft_nms(boxes, scores)
    assert indices.dtype == torch.int64 and lowered.dtype == score_dtype
    assert_taken((indices, lowered), soft_nms_oracle(boxes, scores))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(dtype):
    boxes, scores, _ = Boxes(60, dtype=dtype).tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = soft_nms(boxes, scores)
    torch.testing.assert_close(result, soft_nms(boxes, scores), rtol=0, atol=0)


def test_weights():
    scores = torch.tensor([0.75, 0.5])
    assert soft_nms(HALVES, scores)[1].tolist() == [0.75, 0.25]
    assert soft_nms(HALVES, scores, iou_threshold=0.5)[1].tolist() == [0.75, 0.5]  # an overlap equal to it is none
    gaussian = soft_nms(HALVES, scores, sigma=0.25, method="gaussian")[1].tolist()
    assert gaussian == pytest.approx([0.75, 0.5 * math.exp(-0.25 / 0.25)])


@pytest.mark.parametrize(("min_score", "taken"), [(0.25, [0, 1]), (math.nextafter(0.25, 1), [0]), (0.8, [])])
def test_the_least_score_itself_is_enough(min_score, taken):
    assert soft_nms(HALVES, torch.tensor([0.75, 0.5]), min_score=min_score)[0].tolist() == taken


def test_the_comparisons_are_in_float64():
    """In float32 0.3 and 0.1 are greater than in float64."""
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1]])
    assert len(soft_nms(boxes, torch.tensor([1.0, 0.1]), 0.3)[0]) == 2
    assert soft_nms(boxes, torch.tensor([1.0, 0.1]), 0.3)[1][1] == pytest.approx(0.07)
    assert soft_nms(boxes, torch.tensor([1.0, 0.1]), 0.3001)[1][1] == torch.tensor(0.1)
    assert len(soft_nms(boxes, torch.tensor([1.0, 0.1]), 1.0, min_score=0.1)[0]) == 2
    assert len(soft_nms(boxes, torch.tensor([1.0, 0.1]), 1.0, min_score=0.100001)[0]) == 1


def test_a_lowered_box_is_overtaken_and_lowers_less():
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, 8, 1], [20, 0, 30, 1]])
    indices, scores = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7]))
    assert indices.tolist() == [0, 2, 1]
    assert scores.tolist() == pytest.approx([0.9, 0.7, 0.16])


def test_equal_scores_keep_their_order_and_nan_comes_first():
    apart = torch.arange(6.0)[:, None] * 10 + torch.tensor([0.0, 0, 1, 1])
    scores = torch.tensor([0.5, math.nan, 0.5, -0.0, 0.0, math.inf])
    assert soft_nms(apart, scores, min_score=-1.0)[0].tolist() == [1, 5, 0, 2, 3, 4]


def test_scores_that_are_not_positive_are_not_changed():
    boxes = torch.tensor([[0.0, 0, 1, 1]] * 4)
    indices, scores = soft_nms(boxes, torch.tensor([math.nan, -1.0, 0.0, 0.5]), 0.3, min_score=-math.inf)
    assert indices.tolist() == [0, 2, 3, 1]
    assert scores[1:].tolist() == [0.0, 0.0, -1.0]  # the third was lowered to 0 by the first
    assert soft_nms(boxes, torch.tensor([math.inf] * 4), 0.3, min_score=0.0)[1].tolist() == [math.inf, 0, 0, 0]


def test_as_nms_where_what_overlaps_is_dropped():
    boxes, scores, _ = Boxes(90).tensors()
    indices, lowered = soft_nms(boxes, scores, sigma=1e-9, method="gaussian")
    assert torch.equal(indices, nms(boxes, scores, 1e-3))
    assert torch.equal(lowered, scores[indices])


def test_the_operator_pads():
    boxes, scores, _ = Boxes(90).tensors()
    indices, lowered = soft_nms(boxes, scores, min_score=0.3)
    padded, padded_scores = OP(boxes, scores, None, 0.3, 0.5, 0.3, "linear")
    count = len(indices)
    assert padded.shape == padded_scores.shape == (90,) and 0 < count < 90
    assert torch.equal(padded[:count], indices) and (padded[count:] == -1).all()
    assert torch.equal(padded_scores[:count], lowered) and (padded_scores[count:] == 0).all()


@given(
    st.lists(st.tuples(*[st.integers(-3, 3)] * 4, st.integers(0, 3), st.integers(0, 1)), max_size=10),
    st.sampled_from(RULES),
)
def test_any_boxes(rows, rule):
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    boxes, scores, classes = table[:, :4], table[:, 4] / 4, table[:, 5].long()
    assert_taken(soft_nms(boxes, scores, **rule), soft_nms_oracle(boxes, scores, **rule))
    expected = soft_nms_oracle(boxes, scores, **rule, classes=classes)
    assert_taken(batched_soft_nms(boxes, scores, classes, **rule), expected)


def test_opcheck():
    pytest.importorskip("expecttest")
    boxes, scores, classes = Boxes(20).tensors()
    for given_classes, method in ((None, "linear"), (classes, "gaussian")):
        torch.library.opcheck(OP, (boxes, scores, given_classes, 0.3, 0.5, 1e-3, method))


def test_the_results_have_no_gradient():
    boxes, scores, _ = Boxes(20).tensors()
    assert not any(result.requires_grad for result in soft_nms(boxes.requires_grad_(), scores.requires_grad_()))


WRONG = {
    r"boxes must be \[N, 4\].*got \(2, 5\)": functools.partial(soft_nms, torch.ones(2, 5), torch.ones(2)),
    r"scores must be of a floating dtype, got torch.int64": functools.partial(
        soft_nms, torch.ones(2, 4), torch.ones(2).long()
    ),
    r"soft_nms: scores must be one for each box; there are 3 and 2 boxes": functools.partial(
        soft_nms, torch.ones(2, 4), torch.ones(3)
    ),
    r"idxs must be one for each box; there are 1 and 2 boxes": functools.partial(
        batched_soft_nms, torch.ones(2, 4), torch.ones(2), torch.ones(1)
    ),
    r"sigma must be greater than 0, got 0": functools.partial(soft_nms, torch.ones(2, 4), torch.ones(2), sigma=0.0),
    r"sigma must be greater than 0, got nan": functools.partial(
        soft_nms, torch.ones(2, 4), torch.ones(2), sigma=math.nan
    ),
    r"method must be one of linear, gaussian; got 'hard'": functools.partial(
        soft_nms, torch.ones(2, 4), torch.ones(2), method="hard"
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises(RuntimeError, match=message):
        WRONG[message]()
