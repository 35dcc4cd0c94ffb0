"""What box_iou_rotated means."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st
from inductor_vision import box_iou_rotated
from inductor_vision.tests.support.boxes import INF, NAN, ROTATED_CALLS, RotatedBoxes, rotated_iou_oracle
from torch import Tensor

OP = torch.ops.inductor_vision.box_iou_rotated.default
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def oracle(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    rows1, rows2 = ([tuple(row) for row in boxes.double().tolist()] for boxes in (boxes1, boxes2))
    table = [[rotated_iou_oracle(a, b) for b in rows2] for a in rows1]
    return torch.tensor(table, dtype=torch.float64).reshape(len(rows1), len(rows2))


@pytest.mark.parametrize("call", [call for call in ROTATED_CALLS if call.count <= 90], ids=str)
def test_values(call):
    boxes = call.tensors()[0].double()
    torch.testing.assert_close(box_iou_rotated(boxes, boxes[:30]), oracle(boxes, boxes[:30]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["uniform", "tied", "same", "improper"])
def test_torchvisions_values(kind, torchvision):
    """They are off by some 1e-6 themselves."""
    boxes = RotatedBoxes(90, kind).tensors()[0]
    boxes = boxes[(boxes.abs() < 1e10).all(dim=1)]
    expected = torchvision.ops.box_iou(boxes, boxes[:40], fmt="cxcywhr")
    torch.testing.assert_close(box_iou_rotated(boxes, boxes[:40]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    boxes = RotatedBoxes(40, dtype=dtype).tensors()[0]
    result = box_iou_rotated(boxes, boxes[3:20])
    torch.testing.assert_close(result, oracle(boxes, boxes[3:20]).to(dtype), rtol=1e-2, atol=1e-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(box_iou_rotated(boxes, boxes[3:20]), result)


def test_known_values():
    square = torch.tensor([[5.0, 7, 2, 2, 0]]).double()
    on_its_corner = torch.tensor([[5.0, 7, 2, 2, 45]]).double()
    octagon = 8 * (math.sqrt(2) - 1)
    assert box_iou_rotated(square, on_its_corner).item() == pytest.approx(octagon / (8 - octagon), abs=1e-14)
    wide = torch.tensor([[0.0, 0, 4, 2, 0]])
    assert box_iou_rotated(wide, torch.tensor([[0.0, 0, 4, 2, 90], [0, 0, 2, 4, 90]])).tolist() == [
        [pytest.approx(1 / 3), 1.0]
    ]


def test_angles_are_counter_clockwise_to_the_eye():
    """Turned so, a wide box leads to the right and up, where y is less."""
    wide, right_and_up = torch.tensor([[0.0, 0, 10, 1, 45]]), torch.tensor([[3.0, -3, 1, 1, 0]])
    assert box_iou_rotated(wide, right_and_up).item() > 0.05
    assert box_iou_rotated(wide * torch.tensor([1, 1, 1, 1, -1]), right_and_up).item() == 0


@pytest.mark.parametrize("far", [0.0, 1e6, 2.0**60])
def test_far_from_the_origin(far):
    """What counts is where boxes are relative to each other."""
    boxes = torch.tensor([[0.0, 0, 2**12, 2**10, 30], [2**9, 2**10, 2**12, 2**11, 70]]).double()
    moved = boxes + torch.tensor([far, -far, 0, 0, 0])
    assert torch.equal(box_iou_rotated(moved, moved), box_iou_rotated(boxes, boxes))


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e9, 1e30])
def test_of_any_size(size):
    boxes = RotatedBoxes(20).tensors()[0].double()
    scaled = boxes * torch.tensor([size, size, size, size, 1])
    torch.testing.assert_close(box_iou_rotated(scaled, scaled), box_iou_rotated(boxes, boxes), rtol=0, atol=1e-12)


def test_needles():
    needle = torch.tensor([[0.0, 0, 1e6, 1e-3, 20.0], [0, 0, 1e6, 1e-3, 20.001], [1e-3, 0, 1e6, 1e-3, 20]]).double()
    torch.testing.assert_close(box_iou_rotated(needle, needle), oracle(needle, needle), rtol=0, atol=1e-6)


def test_boxes_that_overlap_none():
    plain = [0.0, 0, 2, 2, 0]
    hostile = [[0.0, 0, 0, 2, 0], [0, 0, -2, 2, 0], [0, 0, 2, NAN, 0], [INF, 0, 2, 2, 0], [0, 0, INF, 2, 0]]
    hostile += [[0.0, 0, 2, 2, INF], [NAN] * 5, [0, 0, 1e200, 1e200, 0], [3, 0, 1, 1, 0], [2, 0, 2, 2, 90]]
    boxes = torch.tensor([plain, *hostile]).double()
    result = box_iou_rotated(boxes, boxes)
    assert result[0].tolist() == [1.0] + [0.0] * len(hostile)
    assert result.diag().tolist() == [1.0] + [0.0] * 8 + [1.0, 1.0]


def test_two_negative_sides_are_as_good_as_positive_ones():
    boxes = torch.tensor([[0.0, 0, 2, 3, 10], [0, 0, -2, -3, 10]])
    assert box_iou_rotated(boxes, boxes).tolist() == [[1, 1], [1, 1]]


@given(
    st.lists(st.tuples(*[st.integers(-3, 3)] * 2, *[st.integers(1, 4)] * 2, st.integers(-8, 8)), min_size=2, max_size=6)
)
def test_any_boxes(rows):
    boxes = torch.tensor(rows, dtype=torch.float64) * torch.tensor([1, 1, 1, 1, 22.5])
    torch.testing.assert_close(box_iou_rotated(boxes, boxes), oracle(boxes, boxes), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0), (0, 0)])
def test_no_boxes(rows, columns):
    assert box_iou_rotated(torch.ones(rows, 5), torch.ones(columns, 5)).shape == (rows, columns)


def test_opcheck():
    pytest.importorskip("expecttest")
    boxes = RotatedBoxes(12).tensors()[0]
    torch.library.opcheck(OP, (boxes, boxes[:5]))


def test_the_result_has_no_gradient():
    boxes = RotatedBoxes(5).tensors()[0].requires_grad_()
    assert not box_iou_rotated(boxes, boxes).requires_grad


WRONG = {
    r"boxes1 must be \[N, 5\], rows of \(x, y, width, height, angle\); got \(2, 4\)": (
        torch.ones(2, 4),
        torch.ones(2, 5),
    ),
    r"boxes2 must be \[N, 5\].*got \(5,\)": (torch.ones(2, 5), torch.ones(5)),
    r"boxes1 must be of a floating dtype, got torch.int64": (torch.ones(2, 5).long(), torch.ones(2, 5)),
    r"boxes2 must be torch.float32, as boxes1 is; got torch.float64": (torch.ones(2, 5), torch.ones(2, 5).double()),
    r"boxes2 must be on cpu, got meta": (torch.ones(2, 5), torch.ones(2, 5, device="meta")),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises(RuntimeError, match=message):
        box_iou_rotated(*WRONG[message])
