"""heatmaps_to_keypoints as one C++ kernel: see cpp/heatmaps_to_keypoints.h."""

from __future__ import annotations

import torch

from .common.registry import Template, serve_all, template_for
from .common.template import KernelTemplate, pointer, sizes, strides, struct, view
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, ir


class HeatmapsToKeypointsTemplate(KernelTemplate):
    """See cpp/heatmaps_to_keypoints.h."""

    op = "heatmaps_to_keypoints"
    header = "heatmaps_to_keypoints.h"

    def output(self) -> ir.TensorBox:
        """Add the kernel to the graph; its result, ``[K, N, 3]``."""
        size = [*self.inputs[0].get_size()[:2], 3]
        (result,) = self.add_unfused(ir.FixedLayout(torch.device("cpu"), torch.float32, size))
        return result

    def render(
        self, kernel: CppTemplateKernel, buffer: ir.CppTemplateBuffer, epilogue: list[ir.ComputedBuffer], keep: bool
    ) -> str:
        maps, rois = self.inputs

        def body() -> list[str]:
            dtype = DTYPE_TO_CPP[maps.get_dtype()]
            size = sizes(kernel, maps, "count", "channels", "height", "width")
            images = struct("Images", dtype, view=view(kernel, maps), **size)
            rows = strides(kernel, rois, "row", "column")
            boxes = struct("HeatmapBoxes", DTYPE_TO_CPP[rois.get_dtype()], data=pointer(kernel, rois), **rows)
            return [f"inductor_vision::heatmaps_to_keypoints({images}, {boxes}, {pointer(kernel, buffer)});"]

        return self.source(kernel, buffer, {"out": buffer}, body)


def _lower(maps: ir.TensorBox, rois: ir.TensorBox) -> ir.TensorBox:
    return HeatmapsToKeypointsTemplate([ir.ExternKernel.realize_input(tensor) for tensor in (maps, rois)]).output()


template_for("heatmaps_to_keypoints", Template(serve_all, _lower))
