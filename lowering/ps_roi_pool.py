"""ps_roi_pool as one C++ kernel: see cpp/ps_roi_pool.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .common.registry import Template, serve_all, template_for
from .inductor.codegen import CppTemplateKernel, ir
from .regions import RegionsTemplate


class PSRoIPoolTemplate(RegionsTemplate):
    """See cpp/ps_roi_pool.h."""

    op = "ps_roi_pool"
    header = "ps_roi_pool.h"

    def __init__(self, input: ir.TensorBox, rois: ir.TensorBox, spatial_scale: float) -> None:
        super().__init__([input], rois)
        self.spatial_scale = spatial_scale

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        return f"""
    {self.function()}({self.position_sensitive_maps(kernel, self.spatial_scale)}, {self.boxes(kernel)}, {store});"""


class PSRoIPoolBackwardTemplate(RegionsTemplate):
    """See cpp/ps_roi_pool.h."""

    op = "ps_roi_pool_backward"
    header = "ps_roi_pool.h"

    def __init__(self, grad: ir.TensorBox, rois: ir.TensorBox, spatial_scale: float) -> None:
        super().__init__([grad], rois)
        self.spatial_scale = spatial_scale

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        return f"""
    {self.function()}({self.view(kernel, 0)}, {self.boxes(kernel)}, {self.grad_bins(kernel)},
        {self.grad_maps(kernel, self.spatial_scale)}, {store});"""


def _lower(
    input: ir.TensorBox, rois: ir.TensorBox, spatial_scale: float, pooled_height: int, pooled_width: int
) -> ir.TensorBox:
    return PSRoIPoolTemplate(input, rois, spatial_scale).output()


def _lower_backward(grad: ir.TensorBox, rois: ir.TensorBox, spatial_scale: float, size: Sequence[Any]) -> ir.TensorBox:
    return PSRoIPoolBackwardTemplate(grad, rois, spatial_scale).output()


template_for("ps_roi_pool", Template(serve_all, _lower))
template_for("ps_roi_pool_backward", Template(serve_all, _lower_backward))
