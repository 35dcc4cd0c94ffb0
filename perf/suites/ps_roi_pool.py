"""Position-sensitive RoIPool, forward and backward.

ONNX has no such operator. OpenVINO's counts the pixel where a box ends as part of it, and reads the last row and column
of the map, which torchvision does not: it is given boxes that end a pixel earlier, and a map without them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.ps_roi_pool import ps_roi_pool
from ...ops.regions import channel_mapping
from ...ops.registry import OPS
from .. import regions
from ..regions import Problem, Shape, case
from ..spec import Suite


def _map_and_rois(shape: Shape) -> tuple[Tensor, Tensor]:
    input, rois = regions.maps_and_rois(shape)
    return input, regions.with_certain_bins(rois, shape.bins, inclusive=False)


def _forward(shape: Shape) -> Problem:
    bins = shape.bins
    return Problem(
        shape,
        _map_and_rois(shape),
        result=(shape.boxes, shape.channels // bins**2, bins, bins),
        ours=lambda input, rois: ps_roi_pool(input, rois, bins, 1.0),
        decomposition=lambda input, rois: OPS["ps_roi_pool"].decomposition(input, rois, 1.0, bins, bins),
        torchvision=lambda input, rois: torch.ops.torchvision.ps_roi_pool(input, rois, 1.0, bins, bins)[0],
    )


def _backward(shape: Shape) -> Problem:
    bins, size = shape.bins, (shape.batch, shape.channels, *shape.size)
    _, rois = _map_and_rois(shape)
    grad = regions.gradient(shape, shape.channels // bins**2)
    mapping = channel_mapping(grad)
    return Problem(
        shape,
        (grad, rois),
        result=size,
        ours=lambda grad, rois: OPS["ps_roi_pool_backward"](grad, rois, 1.0, size),
        decomposition=lambda grad, rois: OPS["ps_roi_pool_backward"].decomposition(grad, rois, 1.0, size),
        torchvision=lambda grad, rois: torch.ops.torchvision._ps_roi_pool_backward(
            grad, rois, mapping, 1.0, bins, bins, *size
        ),
    )


def _openvino_node(problem: Problem) -> tuple[Any, list[Tensor]]:
    from openvino import opset9

    bins = problem.shape.bins
    input, rois = problem.tensors
    read = input[:, :, :-1, :-1].contiguous()
    shortened = rois - torch.tensor([0, 0, 0, 1, 1])

    def node(input: Any, rois: Any) -> Any:
        return opset9.psroi_pooling(input, rois, problem.result[1], bins, 1.0, 1, 1, "average")

    return node, [read, shortened]


_P4_1000 = Shape(490, (50, 68), 1000)

_CONTENDERS = regions.contenders(regions.DECOMPOSITION, openvino_node=_openvino_node)

SUITE = Suite(
    name="ps_roi_pool",
    description="position-sensitive RoIPool, forward unless said otherwise",
    reference=regions.reference,
    remark=regions.REMARK,
    contenders=_CONTENDERS,
    cases=(
        case("p4-k1000", _forward, _P4_1000, *regions.all_threads(_CONTENDERS)),
        case("p4-k1000-1-thread", _forward, _P4_1000, *regions.one_thread(_CONTENDERS), note=", 1 thread"),
        case("p4-k1000-backward", _backward, _P4_1000, *regions.TRAINING, note=", backward"),
    ),
)
