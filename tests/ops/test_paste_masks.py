"""What paste_masks means."""

from __future__ import annotations

import re

import pytest
import torch
from inductor_vision.ops.paste_masks import paste_masks
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.layouts import LAYOUTS
from inductor_vision.tests.support.paste_masks import CASES, OP, Case, oracle
from torch._subclasses import FakeTensorMode


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    case = CASES[name]
    result = paste_masks(*case.tensors(), case.image)
    assert result.shape == (len(case.boxes), 1, *case.image) and result.is_contiguous()
    assert_close(result, oracle(*case.positional), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(dtype, layout):
    case = Case(dtype=dtype, layout=layout)
    result = paste_masks(*case.tensors(), case.image)
    assert result.dtype == dtype
    assert_close(result, oracle(*case.positional), dtype)


@pytest.mark.parametrize("size", [(2, 3), (1, 1), (9, 12)])
def test_gradients(size):
    case = Case(boxes=((1, 2, 6, 4), (-3, 1, 2, 9), (4, 4, 4, 4)), size=size, image=(6, 7), dtype=torch.float64)
    masks, boxes = case.tensors()
    masks.requires_grad_()
    torch.autograd.gradcheck(lambda masks: paste_masks(masks, boxes, case.image), masks)
    with pytest.raises(RuntimeError, match=r"^paste_masks: double backward is not supported"):
        torch.autograd.gradgradcheck(lambda masks: paste_masks(masks, boxes, case.image), masks)


def test_gradients_under_autocast():
    """Also where the backward pass is under it: no product is rounded to bfloat16."""
    case = Case()
    masks, boxes = case.tensors()
    masks.requires_grad_()
    pasted = paste_masks(masks, boxes, case.image)
    (expected,) = torch.autograd.grad(pasted.sum(), masks, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (result,) = torch.autograd.grad(pasted.sum(), masks)
    assert torch.equal(result, expected)


def test_gradients_are_of_what_is_inside():
    """Whatever is outside of boxes."""
    masks, boxes = Case().tensors()
    masks.requires_grad_()
    pasted = paste_masks(masks, boxes, (40, 50))
    (expected,) = torch.autograd.grad(pasted, masks, torch.ones_like(pasted), retain_graph=True)
    inside = paste_masks(torch.ones_like(masks), boxes, (40, 50)) > 0
    (result,) = torch.autograd.grad(pasted, masks, torch.where(inside, 1.0, torch.nan))
    torch.testing.assert_close(result, expected)


def test_opcheck():
    pytest.importorskip("expecttest")
    torch.library.opcheck(OP, Case(layout="channels_last").positional)
    torch.library.opcheck(torch.ops.inductor_vision.paste_masks_backward.default, Case().positional_backward)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks, boxes: (masks[:, 0], boxes), "masks must be [N, 1, h, w], got (9, 7, 10)"),
        (lambda masks, boxes: (masks.expand(-1, 2, -1, -1), boxes), "masks must be [N, 1, h, w], got (9, 2, 7, 10)"),
        (lambda masks, boxes: (masks[..., :0], boxes), "masks must have a positive height and width"),
        (lambda masks, boxes: (masks.long(), boxes), "masks must be of a floating dtype, got torch.int64"),
        (lambda masks, boxes: (masks, boxes[:, :3]), "boxes must be [N, 4], got (9, 3)"),
        (lambda masks, boxes: (masks, boxes[1:]), "boxes must be one for each of masks; there are 8 and 9 masks"),
        (lambda masks, boxes: (masks, boxes.float()), "boxes must be of int64, got torch.float32"),
    ],
)
@pytest.mark.parametrize("fake", [False, True])
def test_errors(change, message, fake):
    masks, boxes = change(*Case().tensors())
    with FakeTensorMode() if fake else torch.no_grad() as mode:
        arguments = [mode.from_tensor(tensor) if fake else tensor for tensor in (masks, boxes)]
        with pytest.raises(RuntimeError, match="^" + re.escape(f"paste_masks: {message}")):
            paste_masks(*arguments, (40, 50))


def test_sizes_must_not_be_negative():
    with pytest.raises(RuntimeError, match=r"^paste_masks: size must not be negative, got 40 x -1"):
        paste_masks(*Case().tensors(), (40, -1))
