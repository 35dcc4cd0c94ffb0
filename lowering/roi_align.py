"""roi_align, on one or several levels, as one C++ kernel: see cpp/roi_align.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ops.roi_align import Arguments, BackwardArguments
from .common.registry import Template, serve_all, template_for
from .inductor.codegen import CppTemplateKernel, ir
from .regions import RegionsTemplate, grid_sampling


class RoIAlignTemplate(RegionsTemplate):
    """See cpp/roi_align.h."""

    op = "roi_align"
    header = "roi_align.h"

    def __init__(self, call: Arguments) -> None:
        super().__init__(call.inputs, call.rois, call.levels)
        self.spatial_scales = call.spatial_scales
        self.sampling = grid_sampling(call.sampling_ratio, call.aligned, position_sensitive=False)

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        return f"""{self.pyramid(kernel, self.spatial_scales)}
    {self.function()}(pyramid, {self.boxes(kernel)}, {self.bins(kernel)}, {self.sampling}, {store});"""


class RoIAlignBackwardTemplate(RegionsTemplate):
    """See cpp/roi_align.h."""

    op = "roi_align_backward"
    header = "roi_align.h"

    def __init__(self, call: BackwardArguments) -> None:
        super().__init__([call.grad], call.rois, call.levels)
        self.level, self.spatial_scale = call.item, call.spatial_scales[call.item]
        self.sampling = grid_sampling(call.sampling_ratio, call.aligned, position_sensitive=False)

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        return f"""
    {self.function()}({self.view(kernel, 0)}, {self.boxes(kernel)}, {self.grad_bins(kernel)}, {self.sampling},
        {self.grad_maps(kernel, self.spatial_scale, self.level)}, {store});"""


def _lower(*args: Any) -> ir.TensorBox:
    return RoIAlignTemplate(Arguments(*args)).output()


def _lower_backward(*args: Any) -> ir.TensorBox:
    return RoIAlignBackwardTemplate(BackwardArguments(*args)).output()


template_for("roi_align", Template(serve_all, _lower))
template_for("roi_align_backward", Template(serve_all, _lower_backward))
