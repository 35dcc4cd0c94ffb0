"""Position-sensitive RoIAlign, forward and backward.

ONNX has no such operator, and neither has OpenVINO. The one that comes closest, DeformablePSROIPooling, leaves samples
outside of the image out of the average, where they count as zero here: boxes that leave the image come out differently.
"""

from __future__ import annotations

import torch

from ...ops.ps_roi_align import ps_roi_align
from ...ops.regions import channel_mapping
from ...ops.registry import OPS
from .. import regions
from ..regions import Problem, Shape, case
from ..spec import Suite


def _forward(shape: Shape) -> Problem:
    bins, samples = shape.bins, shape.samples
    return Problem(
        shape,
        regions.maps_and_rois(shape),
        result=(shape.boxes, shape.channels // bins**2, bins, bins),
        ours=lambda input, rois: ps_roi_align(input, rois, bins, 1.0, samples),
        decomposition=lambda input, rois: OPS["ps_roi_align"].decomposition(input, rois, 1.0, bins, bins, samples),
        torchvision=lambda input, rois: torch.ops.torchvision.ps_roi_align(input, rois, 1.0, bins, bins, samples)[0],
    )


def _backward(shape: Shape) -> Problem:
    bins, samples = shape.bins, shape.samples
    size = (shape.batch, shape.channels, *shape.size)
    _, rois = regions.maps_and_rois(shape)
    grad = regions.gradient(shape, shape.channels // bins**2)
    mapping = channel_mapping(grad)
    return Problem(
        shape,
        (grad, rois),
        result=size,
        ours=lambda grad, rois: OPS["ps_roi_align_backward"](grad, rois, 1.0, size, samples),
        decomposition=lambda grad, rois: OPS["ps_roi_align_backward"].decomposition(grad, rois, 1.0, size, samples),
        torchvision=lambda grad, rois: torch.ops.torchvision._ps_roi_align_backward(
            grad, rois, mapping, 1.0, bins, bins, samples, *size
        ),
    )


_P4_1000 = Shape(490, (50, 68), 1000, samples=2)

_CONTENDERS = regions.contenders(regions.DECOMPOSITION, regions.COMPILED_DECOMPOSITION)

SUITE = Suite(
    name="ps_roi_align",
    description="position-sensitive RoIAlign, forward unless said otherwise",
    reference=regions.reference,
    remark=regions.REMARK,
    contenders=_CONTENDERS,
    cases=(
        case("p4-k1000", _forward, _P4_1000, *regions.all_threads(_CONTENDERS)),
        case("p4-k1000-1-thread", _forward, _P4_1000, *regions.one_thread(_CONTENDERS), note=", 1 thread"),
        case("p4-k1000-backward", _backward, _P4_1000, *regions.TRAINING, note=", backward"),
    ),
)
