"""RoIAlign on one feature map, forward and backward. Sizes are those of the maps of an 800 x 1088 image, p2 to p4."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...ops.registry import OPS
from ...ops.roi_align import roi_align
from .. import regions
from ..regions import Problem, Shape, case
from ..spec import Suite


def _forward(shape: Shape) -> Problem:
    bins, samples, aligned = shape.bins, shape.samples, shape.aligned
    return Problem(
        shape,
        regions.maps_and_rois(shape),
        result=(shape.boxes, shape.channels, bins, bins),
        ours=lambda input, rois: roi_align(input, rois, bins, 1.0, samples, aligned),
        decomposition=lambda input, rois: OPS["roi_align"].decomposition(
            [input], rois, None, [1.0], bins, bins, samples, aligned
        ),
        torchvision=lambda input, rois: torch.ops.torchvision.roi_align(input, rois, 1.0, bins, bins, samples, aligned),
    )


def _backward(shape: Shape) -> Problem:
    bins, samples, aligned = shape.bins, shape.samples, shape.aligned
    size = (shape.batch, shape.channels, *shape.size)
    _, rois = regions.maps_and_rois(shape)
    return Problem(
        shape,
        (regions.gradient(shape, shape.channels), rois),
        result=size,
        ours=lambda grad, rois: OPS["roi_align_backward"](grad, rois, None, [1.0], size, samples, aligned, 0),
        decomposition=lambda grad, rois: OPS["roi_align_backward"].decomposition(
            grad, rois, None, [1.0], size, samples, aligned, 0
        ),
        torchvision=lambda grad, rois: torch.ops.torchvision._roi_align_backward(
            grad, rois, 1.0, bins, bins, *size, samples, aligned
        ),
    )


def _onnx_node(problem: Problem) -> tuple[Any, dict[str, Tensor]]:
    from onnx import helper

    shape = problem.shape
    node = helper.make_node(
        "RoiAlign",
        ["input", "boxes", "images"],
        ["output"],
        output_height=shape.bins,
        output_width=shape.bins,
        sampling_ratio=shape.samples,
        coordinate_transformation_mode="half_pixel" if shape.aligned else "output_half_pixel",
    )
    input, rois = problem.tensors
    boxes, images = regions.boxes_and_images(rois)
    return node, {"input": input, "boxes": boxes, "images": images}


def _openvino_node(problem: Problem) -> tuple[Any, list[Tensor]]:
    from openvino import opset9

    shape = problem.shape

    def node(input: Any, boxes: Any, images: Any) -> Any:
        mode = "half_pixel_for_nn" if shape.aligned else "asymmetric"
        return opset9.roi_align(input, boxes, images, shape.bins, shape.bins, shape.samples, 1.0, "avg", mode)

    input, rois = problem.tensors
    boxes, images = regions.boxes_and_images(rois)
    return node, [input, boxes, images.int()]


_P2_1000 = Shape(256, (200, 272), 1000, samples=2)
_P3_1000 = Shape(256, (100, 136), 1000, samples=2)
_P4_MASKS = Shape(256, (50, 68), 100, bins=14, samples=2)
_P4_ADAPTIVE = Shape(256, (50, 68), 512, samples=0, aligned=True)

_CONTENDERS = regions.contenders(
    regions.DECOMPOSITION, regions.COMPILED_DECOMPOSITION, onnx_node=_onnx_node, openvino_node=_openvino_node
)
_DEFAULTS = [contender.name for contender in _CONTENDERS if contender.default]
_ONE_THREAD = regions.one_thread(_CONTENDERS)
_FEW_BOXES = regions.all_threads(_CONTENDERS)

_vary = dataclasses.replace

SUITE = Suite(
    name="roi_align",
    description="RoIAlign on one feature map, forward unless said otherwise",
    reference=regions.reference,
    remark=regions.REMARK
    + " On a large contiguous map a few boxes cost what it takes to bring the channels around them together.",
    contenders=_CONTENDERS,
    cases=(
        case("p2-k1000", _forward, _P2_1000),
        case("p3-k1000", _forward, _P3_1000, *_DEFAULTS, "decomposition-compiled"),
        case("p4-k100-14x14", _forward, _P4_MASKS),
        case("p4-k512-adaptive", _forward, _P4_ADAPTIVE),
        case("p3-k1000-bf16", _forward, _vary(_P3_1000, dtype=torch.bfloat16)),
        case("p2-k1000-1-thread", _forward, _P2_1000, *_ONE_THREAD, note=", 1 thread"),
        case("p3-k1000-1-thread", _forward, _P3_1000, *_ONE_THREAD, note=", 1 thread"),
        case("p4-k100-14x14-1-thread", _forward, _P4_MASKS, *_ONE_THREAD, note=", 1 thread"),
        case("p3-k1000-b4", _forward, _vary(_P3_1000, batch=4)),
        case("odd-1-box", _forward, _vary(_P2_1000, boxes=1), *_FEW_BOXES),
        case("odd-10-boxes", _forward, _vary(_P2_1000, boxes=10), *_FEW_BOXES),
        case("odd-37-channels", _forward, _vary(_P3_1000, channels=37)),
        case("p3-k512-backward", _backward, _vary(_P3_1000, boxes=512), *regions.TRAINING, note=", backward"),
    ),
)
