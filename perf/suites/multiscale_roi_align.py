"""RoIAlign on the feature maps of a pyramid, forward.

ONNX has no such operator. OpenVINO's, ExperimentalDetectronROIFeatureExtractor, takes one image, and its CPU plugin
has only a plain implementation of it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ...ops.multiscale_roi_align import assign_levels, multiscale_roi_align
from ...ops.registry import OPS
from ...ops.roi_align import roi_align
from .. import regions
from ..regions import Problem, Shape, case
from ..spec import Contender, Job, Prepared, Suite


def _forward(shape: Shape) -> Problem:
    bins, samples, scales = shape.bins, shape.samples, [1 / stride for stride in shape.strides]

    def ours(*tensors: Tensor) -> Tensor:
        *maps, rois = tensors
        return multiscale_roi_align(maps, rois, bins, scales, samples)

    def decomposition(*tensors: Tensor) -> Tensor:
        *maps, rois = tensors
        levels = _levels(shape, rois)
        return OPS["roi_align"].decomposition(maps, rois, levels, scales, bins, bins, samples, False)

    def torchvision(*tensors: Tensor) -> Tensor:
        from torchvision.ops import MultiScaleRoIAlign

        *maps, rois = tensors
        names = [str(stride) for stride in shape.strides]
        boxes = [rois[rois[:, 0] == image, 1:] for image in range(shape.batch)]
        return MultiScaleRoIAlign(names, bins, samples)(dict(zip(names, maps)), boxes, [shape.size] * shape.batch)

    return Problem(
        shape,
        regions.maps_and_rois(shape),
        result=(shape.boxes, shape.channels, bins, bins),
        ours=ours,
        decomposition=decomposition,
        torchvision=torchvision,
    )


def _levels(shape: Shape, rois: Tensor) -> Tensor:
    """Which of the maps each box is on."""
    finest, coarsest = (int(math.log2(stride)) for stride in (shape.strides[0], shape.strides[-1]))
    return assign_levels(rois, finest, coarsest, canonical_scale=224, canonical_level=4)


def _four_calls(job: Job) -> Prepared:
    """One call for each map, with the boxes on it, and their results put in the order of the boxes, which is two passes
    over them for Inductor.

    Which boxes are on a map, and the order, are known beforehand: no shape depends on data. A map without boxes has no
    call.
    """
    problem, shape = job.inputs, job.inputs.shape
    *maps, rois = problem.tensors
    levels = _levels(shape, rois)
    used = levels.unique().tolist()

    def calls(order: Tensor, *tensors: Tensor) -> Tensor:
        results = [
            roi_align(map, on_map, shape.bins, 1 / shape.strides[level], shape.samples)
            for level, map, on_map in zip(used, tensors[: len(used)], tensors[len(used) :])
        ]
        return torch.cat(results)[order]

    order = levels.argsort(stable=True).argsort()
    return regions.compiled(
        calls, [order, *(maps[level] for level in used), *(rois[levels == level] for level in used)]
    )


def _openvino_node(problem: Problem) -> tuple[Any, list[Tensor]]:
    from openvino.utils.node_factory import NodeFactory

    shape = problem.shape
    *maps, rois = problem.tensors
    boxes, _ = regions.boxes_and_images(rois)

    def node(boxes: Any, *maps: Any) -> Any:
        attributes = {
            "output_size": shape.bins,
            "sampling_ratio": shape.samples,
            "pyramid_scales": list(shape.strides),
            "aligned": False,
        }
        inputs = [parameter.output(0) for parameter in (boxes, *maps)]
        name = "ExperimentalDetectronROIFeatureExtractor"
        return NodeFactory("opset6").create(name, inputs, attributes).output(0)  # the second output is the boxes

    return node, [boxes, *maps]


_FPN = Shape(256, (800, 1088), 1000, samples=2, strides=(4, 8, 16, 32))

_CONTENDERS = regions.contenders(
    Contender("four-calls", "ours", _four_calls, compiled=True), openvino_node=_openvino_node
)

SUITE = Suite(
    name="multiscale_roi_align",
    description="RoIAlign on a pyramid of feature maps, forward",
    reference=regions.reference,
    remark=regions.REMARK,
    contenders=_CONTENDERS,
    cases=(
        case("fpn-k1000", _forward, _FPN),
        case("fpn-k1000-bf16", _forward, dataclasses.replace(_FPN, dtype=torch.bfloat16)),
        case("fpn-k1000-1-thread", _forward, _FPN, *regions.one_thread(_CONTENDERS), note=", 1 thread"),
    ),
)
