"""ps_roi_align as one C++ kernel: see cpp/ps_roi_align.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .common.registry import Template, serve_all, template_for
from .inductor.codegen import CppTemplateKernel, ir
from .regions import RegionsTemplate, grid_sampling


class PSRoIAlignTemplate(RegionsTemplate):
    """See cpp/ps_roi_align.h."""

    op = "ps_roi_align"
    header = "ps_roi_align.h"

    def __init__(self, input: ir.TensorBox, rois: ir.TensorBox, spatial_scale: float, sampling_ratio: int) -> None:
        super().__init__([input], rois)
        self.spatial_scale = spatial_scale
        self.sampling = grid_sampling(sampling_ratio, aligned=True, position_sensitive=True)

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        return f"""
    {self.function()}({self.position_sensitive_maps(kernel, self.spatial_scale)}, {self.boxes(kernel)},
        {self.sampling}, {store});"""


class PSRoIAlignBackwardTemplate(RegionsTemplate):
    """See cpp/ps_roi_align.h."""

    op = "ps_roi_align_backward"
    header = "ps_roi_align.h"

    def __init__(self, grad: ir.TensorBox, rois: ir.TensorBox, spatial_scale: float, sampling_ratio: int) -> None:
        super().__init__([grad], rois)
        self.spatial_scale = spatial_scale
        self.sampling = grid_sampling(sampling_ratio, aligned=True, position_sensitive=True)

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        return f"""
    {self.function()}({self.view(kernel, 0)}, {self.boxes(kernel)}, {self.grad_bins(kernel)}, {self.sampling},
        {self.grad_maps(kernel, self.spatial_scale)}, {store});"""


def _lower(
    input: ir.TensorBox,
    rois: ir.TensorBox,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
) -> ir.TensorBox:
    return PSRoIAlignTemplate(input, rois, spatial_scale, sampling_ratio).output()


def _lower_backward(
    grad: ir.TensorBox, rois: ir.TensorBox, spatial_scale: float, size: Sequence[Any], sampling_ratio: int
) -> ir.TensorBox:
    return PSRoIAlignBackwardTemplate(grad, rois, spatial_scale, sampling_ratio).output()


template_for("ps_roi_align", Template(serve_all, _lower))
template_for("ps_roi_align_backward", Template(serve_all, _lower_backward))
