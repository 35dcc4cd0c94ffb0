"""Public functions and modules under torch.fx, which records a call of each, and torch.jit, which none supports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import inductor_vision
import pytest
import torch
from torch import Tensor, nn

PUBLIC = {
    name: value
    for name, value in vars(inductor_vision).items()
    if getattr(value, "__module__", "").startswith("inductor_vision.ops.")
}

X = torch.randn(2, 12, 8, 9)
ROIS = torch.tensor([[0.0, 1, 1, 6, 7], [1, 0, 2, 5, 5]])
BOXES = torch.tensor([[0.0, 0, 4, 4], [1, 0, 4, 4], [5, 5, 9, 9]])
ROTATED = torch.cat([BOXES, torch.tensor([[0.0], [30], [45]])], dim=1)
SCORES, CLASSES = torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 1, 0])
DEPTHWISE, POINTWISE = torch.randn(12, 1, 3, 3), torch.randn(4, 12, 1, 1)
ATTENTION = torch.randn(2, 8, 2, 3), torch.rand(2, 5, 2, 4, 2), torch.rand(2, 5, 2, 4)
LEVELS = {"a": X, "b": X[:, :, ::2, ::2]}

# A call of each function, and a module with what it is called with.
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "deform_conv2d": (
        lambda x, offset, weight: inductor_vision.deform_conv2d(x, offset, weight, padding=1),
        (X, torch.randn(2, 18, 8, 9), torch.randn(4, 12, 3, 3)),
    ),
    "patch_conv2d": (lambda x, w: inductor_vision.patch_conv2d(x[None], w, padding=1), (X, torch.randn(4, 12, 3, 3))),
    "winograd_conv2d": (inductor_vision.winograd_conv2d, (X, torch.randn(4, 12, 3, 3))),
    "depthwise_separable_conv2d": (
        lambda x, w, v: inductor_vision.depthwise_separable_conv2d(x, w, v, depthwise_activation="relu"),
        (X, DEPTHWISE, POINTWISE),
    ),
    "multiscale_deformable_attention": (
        lambda v, x, w: inductor_vision.multiscale_deformable_attention(v, [(2, 3), (1, 2)], x, w),
        ATTENTION,
    ),
    "roi_align": (lambda x, rois: inductor_vision.roi_align(x, rois, 2, aligned=True), (X, ROIS)),
    "roi_pool": (lambda x, rois: inductor_vision.roi_pool(x, rois, output_size=2), (X, ROIS)),
    "ps_roi_align": (lambda x, rois: inductor_vision.ps_roi_align(x, rois, 2), (X, ROIS)),
    "ps_roi_pool": (lambda x, rois: inductor_vision.ps_roi_pool(x, rois, 2), (X, ROIS)),
    "multiscale_roi_align": (
        lambda x, y, boxes: inductor_vision.multiscale_roi_align([x, y], [boxes, boxes], 2, [1.0, 0.5]),
        (X, LEVELS["b"], BOXES),
    ),
    "nms": (lambda boxes, scores: inductor_vision.nms(boxes, scores, 0.5), (BOXES, SCORES)),
    "batched_nms": (
        lambda boxes, scores, idxs: inductor_vision.batched_nms(boxes, scores, idxs, 0.5),
        (BOXES, SCORES, CLASSES),
    ),
    "nms_rotated": (lambda boxes, scores: inductor_vision.nms_rotated(boxes, scores, 0.5), (ROTATED, SCORES)),
    "batched_nms_rotated": (
        lambda boxes, scores, idxs: inductor_vision.batched_nms_rotated(boxes, scores, idxs, 0.5),
        (ROTATED, SCORES, CLASSES),
    ),
    "soft_nms": (lambda boxes, scores: inductor_vision.soft_nms(boxes, scores)[1], (BOXES, SCORES)),
    "batched_soft_nms": (
        lambda boxes, scores, idxs: inductor_vision.batched_soft_nms(boxes, scores, idxs)[1],
        (BOXES, SCORES, CLASSES),
    ),
    "box_iou_rotated": (lambda a, b: inductor_vision.box_iou_rotated(a, b), (ROTATED, ROTATED)),
}

MODULES: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
    "DeformConv2d": (inductor_vision.DeformConv2d(12, 4, 3, padding=1), (X, torch.randn(2, 18, 8, 9))),
    "PatchConv2d": (inductor_vision.PatchConv2d(12, 4, 3), (X,)),
    "DepthwiseSeparableConv2d": (inductor_vision.DepthwiseSeparableConv2d(12, 4, 3), (X,)),
    "MultiScaleDeformableAttention": (
        inductor_vision.MultiScaleDeformableAttention(),
        (ATTENTION[0], None, [(2, 3), (1, 2)], None, *(tensor.unflatten(3, (2, 2)) for tensor in ATTENTION[1:])),
    ),
    "RoIAlign": (inductor_vision.RoIAlign(2, 1.0, 2), (X, ROIS)),
    "RoIPool": (inductor_vision.RoIPool(2, 1.0), (X, [BOXES, BOXES])),
    "PSRoIAlign": (inductor_vision.PSRoIAlign(2, 1.0, 2), (X, ROIS)),
    "PSRoIPool": (inductor_vision.PSRoIPool(2, 1.0), (X, ROIS)),
    "MultiScaleRoIAlign": (
        inductor_vision.MultiScaleRoIAlign(["a", "b"], 2, 2), (LEVELS, [BOXES, BOXES], [(8, 9), (7, 8)])
    ),
}  # fmt: skip


def test_every_public_function_and_module_is_here():
    assert set(FUNCTIONS) | set(MODULES) == set(PUBLIC)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_call_of_a_function_is_recorded(name):
    function, arguments = FUNCTIONS[name]
    traced = torch.fx.symbolic_trace(function)
    assert [node.target for node in traced.graph.nodes].count(PUBLIC[name]) == 1
    torch.testing.assert_close(traced(*arguments), function(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_the_call_that_a_module_makes_is_recorded(name):
    module, arguments = MODULES[name]
    traced = torch.fx.symbolic_trace(module)
    functions = [node.target for node in traced.graph.nodes if node.target in map(PUBLIC.get, FUNCTIONS)]
    assert [function.__name__ for function in functions] == [CALLED[name]]
    torch.testing.assert_close(traced(*arguments), module(*arguments), rtol=0, atol=0)


CALLED = {
    "DeformConv2d": "deform_conv2d",
    "PatchConv2d": "patch_conv2d",
    "DepthwiseSeparableConv2d": "depthwise_separable_conv2d",
    "MultiScaleDeformableAttention": "multiscale_deformable_attention",
    "RoIAlign": "roi_align",
    "RoIPool": "roi_pool",
    "PSRoIAlign": "ps_roi_align",
    "PSRoIPool": "ps_roi_pool",
    "MultiScaleRoIAlign": "multiscale_roi_align",
}


def refused(name: str) -> Any:
    return pytest.raises(
        RuntimeError, match=rf"inductor_vision\.{name}: torch\.jit\.script is not supported.*accelerate_torchvision\(\)"
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_scripting_says_what_to_do_instead(name):
    with refused(name):
        torch.jit.script(MODULES[name][0] if name in MODULES else PUBLIC[name])


def calls_nms(boxes: Tensor, scores: Tensor) -> Tensor:
    return inductor_vision.nms(boxes, scores, 0.5)


def test_scripting_what_calls_a_function_says_what_to_do_instead():
    with refused("nms"):
        torch.jit.script(calls_nms)


def test_scripting_what_holds_a_module_says_what_to_do_instead():
    with refused("PatchConv2d"):
        torch.jit.script(nn.Sequential(nn.ReLU(), MODULES["PatchConv2d"][0]))
