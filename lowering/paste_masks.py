"""paste_masks as one C++ kernel: see cpp/paste_masks.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .common.registry import Template, serve_all, template_for
from .common.template import BlocksTemplate, pointer, sizes, strides, struct, view
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, ir


class PasteMasksTemplate(BlocksTemplate):
    """See cpp/paste_masks.h."""

    op = "paste_masks"
    header = "paste_masks.h"

    def __init__(self, masks: ir.IRNode, boxes: ir.IRNode, size: Sequence[Any]) -> None:
        super().__init__([masks, boxes], masks.get_dtype(), [*masks.get_size()[:2], *size], channels_last=False)

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        masks, boxes = inputs
        dtype = DTYPE_TO_CPP[self.dtype]
        size = sizes(kernel, masks, "count", "channels", "height", "width")
        *_, height, width = self.output_size(kernel)
        op = struct(
            "PasteMasks",
            dtype,
            masks=struct("Images", dtype, view=view(kernel, masks), **size),
            boxes=pointer(kernel, boxes),
            **strides(kernel, boxes, "box", "side"),
            height=height,
            width=width,
        )
        return f"inductor_vision::paste_masks({op}, {store});"


def _lower(masks: ir.TensorBox, boxes: ir.TensorBox, *size: Any) -> ir.TensorBox:
    realize = ir.ExternKernel.realize_input
    return PasteMasksTemplate(realize(masks), realize(boxes), size).output()


template_for("paste_masks", Template(serve_all, _lower))
