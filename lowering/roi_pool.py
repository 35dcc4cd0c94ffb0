"""roi_pool as one C++ kernel: see cpp/roi_pool.h."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from .common.registry import Template, serve_all, template_for
from .inductor.codegen import CppTemplateKernel, V, ir
from .regions import RegionsTemplate


class RoIPoolTemplate(RegionsTemplate):
    """See cpp/roi_pool.h."""

    op = "roi_pool"
    header = "roi_pool.h"

    def __init__(self, input: ir.TensorBox, rois: ir.TensorBox, spatial_scale: float) -> None:
        super().__init__([input], rois)
        self.spatial_scale = spatial_scale

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        argmax = bool(self.store_functions)
        return f"""{self.pyramid(kernel, [self.spatial_scale])}
    {self.function(str(argmax).lower())}(
        pyramid, {self.boxes(kernel)}, {self.bins(kernel)}, {store}{"" if argmax else ", nullptr"});"""


class RoIPoolBackwardTemplate(RegionsTemplate):
    """See cpp/roi_pool.h."""

    op = "roi_pool_backward"
    header = "roi_pool.h"

    def __init__(self, grad: ir.TensorBox, argmax: ir.TensorBox, rois: ir.TensorBox) -> None:
        super().__init__([grad, argmax], rois)

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        return f"""
    {self.function()}({self.view(kernel, 0)}, {self.view(kernel, 1)}, {self.boxes(kernel)}, {self.grad_bins(kernel)},
        {self.grad_maps(kernel)}, {store});"""


def _lower(
    input: ir.TensorBox, rois: ir.TensorBox, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[ir.TensorBox, ir.TensorBox | None]:
    argmax_used = any(user.target is operator.getitem and user.args[1] == 1 for user in V.graph.current_node.users)
    template = RoIPoolTemplate(input, rois, spatial_scale)
    if argmax_used:
        out, argmax = template.outputs([(torch.int32, "store_indices")])
        return out, argmax
    return template.output(), None


def _lower_backward(grad: ir.TensorBox, rois: ir.TensorBox, argmax: ir.TensorBox, size: Sequence[Any]) -> ir.TensorBox:
    return RoIPoolBackwardTemplate(grad, argmax, rois).output()


template_for("roi_pool", Template(serve_all, _lower))
template_for("roi_pool_backward", Template(serve_all, _lower_backward))
