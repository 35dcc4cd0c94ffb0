"""RoIPool, forward and backward.

torchvision's kernel finds the maxima and the places where they are, always. The places are for training; for inference
nobody else computes them, this package included.

The decomposition takes part in no case: it goes over the bins pixel by pixel, which takes seconds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ...ops.registry import OPS
from ...ops.roi_pool import roi_pool
from .. import regions
from ..regions import Problem, Shape, case
from ..spec import Suite


def _theirs(*arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.torchvision.roi_pool(*arguments)


def _map_and_rois(shape: Shape) -> tuple[Tensor, Tensor]:
    input, rois = regions.maps_and_rois(shape)
    return input, regions.with_certain_bins(rois, shape.bins, inclusive=True)


def _forward(shape: Shape) -> Problem:
    bins = shape.bins
    return Problem(
        shape,
        _map_and_rois(shape),
        result=(shape.boxes, shape.channels, bins, bins),
        ours=lambda input, rois: roi_pool(input, rois, bins, 1.0),
        decomposition=lambda input, rois: OPS["roi_pool"].decomposition(input, rois, 1.0, bins, bins)[0],
        torchvision=lambda input, rois: _theirs(input, rois, 1.0, bins, bins)[0],
    )


def _training(shape: Shape) -> Problem:
    """Forward, with the places of the maxima, which are as many int32 as there are results."""
    bins = shape.bins
    result = (shape.boxes, shape.channels, bins, bins)
    return Problem(
        shape,
        _map_and_rois(shape),
        result=result,
        ours=lambda input, rois: OPS["roi_pool"](input, rois, 1.0, bins, bins),
        decomposition=lambda input, rois: OPS["roi_pool"].decomposition(input, rois, 1.0, bins, bins),
        torchvision=lambda input, rois: _theirs(input, rois, 1.0, bins, bins),
        further_bytes=math.prod(result) * torch.int32.itemsize,
    )


def _backward(shape: Shape) -> Problem:
    bins, size = shape.bins, (shape.batch, shape.channels, *shape.size)
    input, rois = _map_and_rois(shape)
    _, argmax = regions.trusted(_theirs, OPS["roi_pool"].decomposition)(input, rois, 1.0, bins, bins)
    return Problem(
        shape,
        (regions.gradient(shape, shape.channels), rois, argmax),
        result=size,
        ours=lambda grad, rois, argmax: OPS["roi_pool_backward"](grad, rois, argmax, size),
        decomposition=lambda grad, rois, argmax: OPS["roi_pool_backward"].decomposition(grad, rois, argmax, size),
        torchvision=lambda grad, rois, argmax: torch.ops.torchvision._roi_pool_backward(
            grad, rois, argmax, 1.0, bins, bins, *size
        ),
    )


def _onnx_node(problem: Problem) -> tuple[Any, dict[str, Tensor]]:
    from onnx import helper

    bins = problem.shape.bins
    node = helper.make_node("MaxRoiPool", ["input", "rois"], ["output"], pooled_shape=[bins, bins])
    return node, dict(zip(node.input, problem.tensors))


def _openvino_node(problem: Problem) -> tuple[Any, list[Tensor]]:
    from openvino import opset9

    bins = problem.shape.bins
    return lambda input, rois: opset9.roi_pooling(input, rois, [bins, bins], 1.0, "max"), list(problem.tensors)


_P3_1000 = Shape(256, (100, 136), 1000)
_P3_512 = dataclasses.replace(_P3_1000, boxes=512)

_CONTENDERS = regions.contenders(onnx_node=_onnx_node, openvino_node=_openvino_node)

SUITE = Suite(
    name="roi_pool",
    description="RoIPool, forward unless said otherwise",
    reference=regions.reference,
    remark=regions.REMARK + " torchvision's kernel always finds the indices of the maxima, too.",
    contenders=_CONTENDERS,
    cases=(
        case("p3-k1000", _forward, _P3_1000),
        case("p3-k1000-1-thread", _forward, _P3_1000, *regions.one_thread(_CONTENDERS), note=", 1 thread"),
        case("p3-k1000-training", _training, _P3_1000, *regions.TRAINING, note=", with argmax"),
        case("p3-k512-backward", _backward, _P3_512, *regions.TRAINING, note=", backward"),
    ),
)
