"""roi_align, on one or several levels, as one C++ kernel: see cpp/roi_align.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .inductor import CppTemplateKernel, ir
from .regions import RegionsTemplate, grid_sampling, serve_all
from .registry import Template, template_for


class RoIAlignTemplate(RegionsTemplate):
    """See cpp/roi_align.h."""

    op = "roi_align"
    header = "roi_align.h"

    def __init__(
        self,
        inputs: Sequence[ir.TensorBox],
        rois: ir.TensorBox,
        levels: ir.TensorBox | None,
        spatial_scales: Sequence[float],
        sampling_ratio: int,
        aligned: bool,
    ) -> None:
        super().__init__(inputs, rois, levels)
        self.spatial_scales = spatial_scales
        self.sampling = grid_sampling(sampling_ratio, aligned, position_sensitive=False)

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        return f"""{self.pyramid(kernel, self.spatial_scales)}
    {self.function()}(pyramid, {self.boxes(kernel)}, {self.bins()}, {self.sampling}, {store});"""


class RoIAlignBackwardTemplate(RegionsTemplate):
    """See cpp/roi_align.h."""

    op = "roi_align_backward"
    header = "roi_align.h"

    def __init__(
        self,
        grad: ir.TensorBox,
        rois: ir.TensorBox,
        levels: ir.TensorBox | None,
        level: int,
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool,
    ) -> None:
        super().__init__([grad], rois, levels)
        self.level = level
        self.spatial_scale = spatial_scale
        self.sampling = grid_sampling(sampling_ratio, aligned, position_sensitive=False)

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        return f"""
    {self.function()}({self.view(kernel, 0)}, {self.boxes(kernel)}, {self.grad_bins()}, {self.sampling},
        {self.grad_maps(kernel, self.spatial_scale, self.level)}, {store});"""


def _lower(
    inputs: Sequence[ir.TensorBox],
    rois: ir.TensorBox,
    levels: ir.TensorBox | None,
    spatial_scales: Sequence[float],
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> ir.TensorBox:
    return RoIAlignTemplate(inputs, rois, levels, spatial_scales, sampling_ratio, aligned).output()


def _lower_backward(
    grad: ir.TensorBox,
    rois: ir.TensorBox,
    levels: ir.TensorBox | None,
    level: int,
    spatial_scale: float,
    size: Sequence[Any],
    sampling_ratio: int,
    aligned: bool,
) -> ir.TensorBox:
    return RoIAlignBackwardTemplate(grad, rois, levels, level, spatial_scale, sampling_ratio, aligned).output()


template_for("roi_align", Template(serve_all, _lower))
template_for("roi_align_backward", Template(serve_all, _lower_backward))
