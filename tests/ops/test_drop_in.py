"""Odd arguments, given to torchvision's functions and to those of the same name here: results, dtypes, exceptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import inductor_vision
import pytest
import torch
from inductor_vision import accelerate_torchvision
from inductor_vision.ops.heatmaps_to_keypoints import heatmaps_to_keypoints
from inductor_vision.tests.support.compare import assert_close
from torch import Tensor

try:
    from torchvision.tv_tensors import BoundingBoxes
except (ImportError, RuntimeError) as error:  # the latter where its compiled library does not go with torch
    pytest.skip(f"torchvision does not load: {error}", allow_module_level=True)

Function = Callable[..., Any]


def numbers(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def tv_boxes(boxes: Tensor) -> Tensor:
    """The boxes as torchvision's transforms have them."""
    return BoundingBoxes(boxes, format="XYXY", canvas_size=(64, 64))


FIRST, SECOND = torch.tensor([[0.0, 0, 3, 3], [1, 2, 9, 7]]), torch.tensor([[2.0, 2, 5, 9]])
LISTS: dict[str, Any] = {
    "list": [FIRST, SECOND],
    "tuple": (FIRST, SECOND),
    "fewer_than_images": [FIRST],
    "without_boxes": [FIRST[:0], SECOND[:0]],
    "an_image_without_boxes": [FIRST[:0], SECOND],
    "requiring_gradients": [FIRST.clone().requires_grad_(), SECOND],
    "bounding_boxes": [tv_boxes(FIRST), tv_boxes(SECOND)],
    "one_of_bounding_boxes": [tv_boxes(FIRST), SECOND],
    "doubles": [FIRST.double(), SECOND.double()],
    "no_list": [],
    "integers": [FIRST.long(), SECOND.long()],
    "halves": [FIRST.half(), SECOND.half()],
    "three_columns": [FIRST[:, :3], SECOND],
    "five_columns": [torch.zeros(2, 5), torch.zeros(1, 5)],
    "three_dimensions": [FIRST[None], SECOND[None]],
    "one_dimension": [FIRST[0], SECOND[0]],
    "lists": [FIRST.tolist(), SECOND.tolist()],
    "nones": [None, None],
}
TENSORS: dict[str, Any] = {
    "tensor": torch.tensor([[0.0, 0, 0, 3, 3], [1, 1, 2, 9, 7]]),
    "no_boxes": torch.zeros(0, 5),
    "double": torch.zeros(2, 5).double(),
    "integer": torch.zeros(2, 5).long(),
    "four_columns": FIRST,
    "four_columns_of_bounding_boxes": tv_boxes(FIRST),
    "of_three_dimensions": torch.zeros(1, 2, 5),
    "of_one_dimension": torch.zeros(5),
    "none": None,
    "word": "boxes",
    "array": FIRST.numpy(),
}
POOLING = {
    "roi_align": (numbers(2, 8, 12, 14), 3),
    "roi_pool": (numbers(2, 8, 12, 14), 3),
    "ps_roi_align": (numbers(2, 8, 12, 14), 2),
    "ps_roi_pool": (numbers(2, 8, 12, 14), 2),
}
MAPS = {"a": numbers(2, 3, 16, 16), "b": numbers(2, 3, 8, 8)}
SIZES = [(64, 64), (64, 60)]

BOXES = torch.cat([numbers(30, 2) * 20, numbers(30, 2) * 20 + 10], dim=1)
TV_BOXES = tv_boxes(BOXES)
SCORES, CLASSES = numbers(30), torch.arange(30) % 3
NONE = torch.empty(0, dtype=torch.int64)
SUPPRESSION: dict[str, Callable[[Function], Any]] = {
    "plain": lambda f: f(BOXES, SCORES, CLASSES),
    "bounding_boxes": lambda f: f(TV_BOXES, SCORES, CLASSES),
    "strided": lambda f: f(BOXES.t().contiguous().t(), SCORES, CLASSES),
    "requiring_gradients": lambda f: f(BOXES.clone().requires_grad_(), SCORES.clone().requires_grad_(), CLASSES),
    "no_boxes": lambda f: f(BOXES[:0], SCORES[:0], CLASSES[:0]),
    "threshold_as_a_tensor": lambda f: f(BOXES, SCORES, CLASSES, torch.tensor(0.3)),
    "threshold_as_an_integer": lambda f: f(BOXES, SCORES, CLASSES, 1),
    "no_threshold": lambda f: f(BOXES, SCORES, CLASSES, None),
    "integers": lambda f: f(BOXES.long(), SCORES, CLASSES),
    "scores_as_integers": lambda f: f(BOXES, CLASSES, CLASSES),
    "one_box": lambda f: f(BOXES[0], SCORES[:1], CLASSES[:1]),
    "five_columns": lambda f: f(numbers(30, 5), SCORES, CLASSES),
    "three_dimensions": lambda f: f(BOXES[None], SCORES, CLASSES),
    "scores_of_two_dimensions": lambda f: f(BOXES, SCORES[:, None], CLASSES),
    "fewer_scores": lambda f: f(BOXES, SCORES[1:], CLASSES),
    "scores_as_doubles": lambda f: f(BOXES, SCORES.double(), CLASSES),
    "halves": lambda f: f(BOXES.half(), SCORES.half(), CLASSES),
}
BATCHED: dict[str, Callable[[Function], Any]] = {
    **SUPPRESSION,
    "classes_of_int32": lambda f: f(BOXES, SCORES, CLASSES.int()),
    "classes_of_floats": lambda f: f(BOXES, SCORES, CLASSES.float()),
    "classes_of_booleans": lambda f: f(BOXES, SCORES, CLASSES == 1),
    "fewer_classes": lambda f: f(BOXES, SCORES, CLASSES[1:]),
    "classes_of_two_dimensions": lambda f: f(BOXES, SCORES, CLASSES[:, None]),
    "nothing": lambda f: f(NONE, None, None, None),
    "nothing_of_four_columns": lambda f: f(BOXES[:0], None, None, None),
    "no_boxes_as_integers": lambda f: f(BOXES[:0].long(), SCORES[:0], CLASSES[:0]),
    "no_boxes_but_scores": lambda f: f(BOXES[:0], SCORES, CLASSES),
}
ROTATED = torch.cat([numbers(6, 2) * 20, numbers(6, 2) * 10 + 1, numbers(6, 1) * 180], dim=1)
OVERLAPS: dict[str, tuple[Any, Any]] = {
    "plain": (ROTATED, ROTATED),
    "no_boxes": (ROTATED[:0], ROTATED),
    "two_dtypes": (ROTATED, ROTATED.double()),
    "four_columns": (BOXES, BOXES),
    "one_dimension": (ROTATED[0], ROTATED),
    "three_dimensions": (ROTATED[None], ROTATED[None]),
    "integers": (ROTATED.long(), ROTATED.long()),
    "doubles": (ROTATED.double(), ROTATED.double()),
    "halves": (ROTATED.half(), ROTATED.half()),
}
OFFSET, WEIGHT = numbers(2, 18, 12, 14), numbers(4, 8, 3, 3)
IMAGE = POOLING["roi_align"][0]
CONVOLUTION: dict[str, Callable[[Function], Any]] = {
    "plain": lambda f: f(IMAGE, OFFSET, WEIGHT, padding=1),
    "lists": lambda f: f(IMAGE, OFFSET[..., :6, :7], WEIGHT, stride=[2, 2], padding=[1, 1]),
    "no_images": lambda f: f(IMAGE[:0], OFFSET[:0], WEIGHT, padding=1),
    "doubles": lambda f: f(IMAGE.double(), OFFSET.double(), WEIGHT.double(), padding=1),
    "two_dtypes": lambda f: f(IMAGE.double(), OFFSET, WEIGHT, padding=1),
    "integers": lambda f: f(IMAGE.long(), OFFSET.long(), WEIGHT.long(), padding=1),
    "word": lambda f: f(IMAGE, OFFSET, WEIGHT, padding="same"),
    "number_with_a_point": lambda f: f(IMAGE, OFFSET, WEIGHT, padding=1.0),
    "offset_of_another_size": lambda f: f(IMAGE, OFFSET, WEIGHT),
    "few_offsets": lambda f: f(IMAGE, OFFSET[:, :4], WEIGHT, padding=1),
    "bias_of_another_length": lambda f: f(IMAGE, OFFSET, WEIGHT, numbers(5), padding=1),
    "mask_of_another_length": lambda f: f(IMAGE, OFFSET, WEIGHT, padding=1, mask=OFFSET[:, :8]),
    "three_dimensions": lambda f: f(IMAGE[0], OFFSET[0], WEIGHT, padding=1),
    "three_numbers": lambda f: f(IMAGE, OFFSET, WEIGHT, padding=(1, 1, 1)),
}
HEATMAPS = numbers(3, 2, 7, 9)
OBJECTS = torch.tensor([[0.0, 0, 10, 10], [3, 2, 9, 14], [1, 1, 2, 2]])
KEYPOINTS: dict[str, tuple[Any, Any]] = {
    "plain": (HEATMAPS, OBJECTS),
    "bounding_boxes": (HEATMAPS, tv_boxes(OBJECTS)),
    "doubles": (HEATMAPS.double(), OBJECTS.double()),
    "two_dtypes": (HEATMAPS, OBJECTS.double()),
    "integers": (HEATMAPS, OBJECTS.long()),
    "no_boxes": (HEATMAPS[:0], OBJECTS[:0]),
    "maps_of_integers": (HEATMAPS.long(), OBJECTS),
    "fewer_boxes": (HEATMAPS, OBJECTS[1:]),
}


def calls() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """By name, a call of a module that has the functions."""
    for op, (image, size) in POOLING.items():
        for name, boxes in (LISTS | TENSORS).items():
            yield f"{op} {name}", lambda ops, op=op, x=image, n=size, b=boxes: getattr(ops, op)(x, b, n)
    for name, boxes in LISTS.items():
        for maps in (["a"], ["a", "b"]):
            yield (
                f"MultiScaleRoIAlign {name} {len(maps)}",
                lambda ops, b=boxes, m=maps: ops.MultiScaleRoIAlign(m, 3, 2)(MAPS, b, SIZES[: len(b)]),
            )
    for name, call in SUPPRESSION.items():
        yield f"nms {name}", lambda ops, c=call: c(lambda boxes, scores, _, t=0.3: ops.nms(boxes, scores, t))
    for name, call in BATCHED.items():
        yield f"batched_nms {name}", lambda ops, c=call: c(lambda b, s, i, t=0.3: ops.batched_nms(b, s, i, t))
    for name, pair in OVERLAPS.items():
        yield f"box_iou_rotated {name}", lambda ops, p=pair: ops.box_iou_rotated(*p)
    for name, call in CONVOLUTION.items():
        yield f"deform_conv2d {name}", lambda ops, c=call: c(ops.deform_conv2d)
    for name, pair in KEYPOINTS.items():
        yield f"heatmaps_to_keypoints {name}", lambda ops, p=pair: ops.heatmaps_to_keypoints(*p)


CALLS = dict(calls())

# What is taken here, and is an error there: other dtypes.
TAKEN = {
    *(f"{op} {name}" for op in POOLING for name in ("integers", "halves", "doubles")),
    *(f"MultiScaleRoIAlign {name} {maps}" for name in ("integers", "halves") for maps in (1, 2)),
    *(f"{op} {name}" for op in ("nms", "batched_nms") for name in ("scores_as_doubles", "halves")),
    "box_iou_rotated halves",
} - {f"{op} doubles" for op in POOLING}
# What is an error here, and a result there that leaves something out without a word.
REFUSED = {"heatmaps_to_keypoints fewer_boxes": RuntimeError, "batched_nms one_box": RuntimeError}
# Errors that are raised there by what happens to come first: an index, an attribute, a tuple.
RAISED = {
    **{
        f"{op} {name}": AssertionError
        for op in POOLING
        for name in ("one_dimension", "of_one_dimension", "lists", "nones")
    },
    **{
        f"MultiScaleRoIAlign {name} {maps}": AssertionError
        for name in ("one_dimension", "lists", "nones", "three_columns", "three_dimensions")
        for maps in (1, 2)
    },
    "deform_conv2d three_dimensions": RuntimeError,
    "deform_conv2d three_numbers": RuntimeError,
}


def outcome(call: Callable[[Any], Any], ops: Any) -> Any:
    try:
        return call(ops)
    except Exception as error:  # of any type: that is what is compared
        return error


class Ours:
    heatmaps_to_keypoints = staticmethod(heatmaps_to_keypoints)

    def __getattr__(self, name: str) -> Any:
        return getattr(inductor_vision, name)


class Theirs:
    def __init__(self, torchvision: Any) -> None:
        self.ops = torchvision.ops
        self.heatmaps_to_keypoints = torchvision.models.detection.roi_heads.heatmaps_to_keypoints

    def box_iou_rotated(self, boxes1: Tensor, boxes2: Tensor) -> Tensor:
        return self.ops.box_iou(boxes1, boxes2, fmt="cxcywhr")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)


def assert_same(ours: Any, theirs: Any) -> None:
    ours, theirs = ([value] if isinstance(value, Tensor) else value for value in (ours, theirs))
    assert len(ours) == len(theirs)
    for got, expected in zip(ours, theirs):
        assert (type(got), got.dtype) == (type(expected), expected.dtype)
        assert_close(got, expected, torch.float32)


@pytest.mark.parametrize("name", CALLS)
def test_is_as_torchvisions(torchvision, name):
    ours, theirs = outcome(CALLS[name], Ours()), outcome(CALLS[name], Theirs(torchvision))
    if name in TAKEN:
        assert isinstance(theirs, RuntimeError) and isinstance(ours, Tensor), (ours, theirs)
    elif name in REFUSED:
        assert not isinstance(theirs, Exception) and type(ours) is REFUSED[name], (ours, theirs)
    elif name in RAISED:
        assert isinstance(theirs, Exception) and type(ours) is RAISED[name], (ours, theirs)
        assert type(ours) is not type(theirs), "which is no longer an exception"
    elif name == "box_iou_rotated doubles":  # not rounded to float32, as torchvision's are
        assert (ours.dtype, theirs.dtype) == (torch.float64, torch.float32)
        assert_close(ours, theirs, torch.float32)
    elif isinstance(theirs, Exception):  # NotImplementedError, a RuntimeError, says that there is no kernel for a dtype
        expected = RuntimeError if isinstance(theirs, NotImplementedError) else type(theirs)
        assert type(ours) is expected, (ours, theirs)
    else:
        assert_same(ours, theirs)


COMPILED = [
    *(f"{op} {name}" for op in POOLING for name in ("tuple", "bounding_boxes", "one_of_bounding_boxes")),
    "roi_align integers",
    *(f"MultiScaleRoIAlign {name} 2" for name in ("tuple", "bounding_boxes", "integers")),
    *(f"{op} bounding_boxes" for op in ("nms", "batched_nms", "heatmaps_to_keypoints")),
    "heatmaps_to_keypoints integers",
]


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_it_runs(torchvision, name):
    """And so do torchvision's functions, where they take such arguments."""
    accelerate_torchvision()
    theirs, call = Theirs(torchvision), CALLS[name]
    expected = call(Ours())
    for ops in (Ours(), *([] if name in TAKEN else [theirs])):
        compiled = torch.compile(lambda ops=ops: call(ops), backend="eager", fullgraph=True)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            assert_same(compiled(), expected)
