"""nms as one C++ kernel: see cpp/nms.h."""

from __future__ import annotations

import torch

from .inductor import DTYPE_TO_CPP, CppTemplateKernel, V, ir
from .registry import Template, serve_all, template_for
from .template import KernelTemplate, double, pointer


class NMSTemplate(KernelTemplate):
    """See cpp/nms.h."""

    op = "nms"
    header = "nms.h"

    def __init__(
        self, boxes: ir.TensorBox, scores: ir.TensorBox, classes: ir.TensorBox | None, iou_threshold: float
    ) -> None:
        tensors = [tensor for tensor in (boxes, scores, classes) if tensor is not None]
        super().__init__([ir.ExternKernel.realize_input(tensor) for tensor in tensors])
        self.iou_threshold = iou_threshold

    def output(self) -> ir.TensorBox:
        """Add the kernel to the graph; its result, ``[N]``."""
        boxes = self.inputs[0]
        buffer = self.add(ir.FixedLayout(torch.device("cpu"), torch.int64, [boxes.get_size()[0]]))
        V.graph.no_fuse_buffer_names.add(buffer.get_name())
        return ir.TensorBox.create(buffer)

    def render(
        self, kernel: CppTemplateKernel, buffer: ir.CppTemplateBuffer, epilogue: list[ir.ComputedBuffer], keep: bool
    ) -> str:
        boxes, scores, *classes = self.inputs

        def body() -> list[str]:
            fields = [pointer(kernel, boxes), kernel.stride(boxes, 0), kernel.stride(boxes, 1)]
            fields += [pointer(kernel, scores), kernel.stride(scores, 0)]
            fields += [pointer(kernel, *classes), kernel.stride(*classes, 0)] if classes else ["nullptr", "0"]
            types = ", ".join(DTYPE_TO_CPP[node.get_dtype()] for node in (boxes, scores))
            given = f"inductor_vision::ScoredBoxes<{types}>{{{', '.join(fields)}, {kernel.size(boxes, 0)}}}"
            return [f"inductor_vision::nms({given}, {double(self.iou_threshold)}, {pointer(kernel, buffer)});"]

        return self.source(kernel, buffer, {"out": buffer}, body)


def _lower(
    boxes: ir.TensorBox, scores: ir.TensorBox, classes: ir.TensorBox | None, iou_threshold: float
) -> ir.TensorBox:
    return NMSTemplate(boxes, scores, classes, iou_threshold).output()


template_for("nms", Template(serve_all, _lower))
