"""box_iou_rotated as one C++ kernel: see cpp/box_iou_rotated.h."""

from __future__ import annotations

import torch

from .common.registry import Template, serve_all, template_for
from .common.template import KernelTemplate, pointer, strides, struct
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, ir


class RotatedIoUTemplate(KernelTemplate):
    """See cpp/box_iou_rotated.h. Nothing is fused with its result."""

    op = "box_iou_rotated"
    header = "box_iou_rotated.h"

    def output(self) -> ir.TensorBox:
        """Add the kernel to the graph; its result, ``[N, M]``."""
        size = [boxes.get_size()[0] for boxes in self.inputs]
        (result,) = self.add_unfused(ir.FixedLayout(torch.device("cpu"), self.inputs[0].get_dtype(), size))
        return result

    def render(
        self, kernel: CppTemplateKernel, buffer: ir.CppTemplateBuffer, epilogue: list[ir.ComputedBuffer], keep: bool
    ) -> str:
        def boxes(node: ir.IRNode) -> str:
            return struct(
                "RotatedBoxes",
                DTYPE_TO_CPP[node.get_dtype()],
                boxes=pointer(kernel, node),
                **strides(kernel, node, "row", "column"),
                count=kernel.size(node, 0),
            )

        def body() -> list[str]:
            arguments = [*map(boxes, self.inputs), pointer(kernel, buffer)]
            return [f"inductor_vision::box_iou_rotated({', '.join(arguments)});"]

        return self.source(kernel, buffer, {"out": buffer}, body)


def _lower(boxes1: ir.TensorBox, boxes2: ir.TensorBox) -> ir.TensorBox:
    return RotatedIoUTemplate([ir.ExternKernel.realize_input(boxes) for boxes in (boxes1, boxes2)]).output()


template_for("box_iou_rotated", Template(serve_all, _lower))
