"""What the templates of the operators on boxes with scores share: see cpp/boxes.h."""

from __future__ import annotations

import torch

from .common.template import KernelTemplate, pointer, strides, struct
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, ir


class ScoredBoxesTemplate(KernelTemplate):
    """A kernel over boxes with scores, and perhaps classes. Nothing is fused with its results."""

    def __init__(self, boxes: ir.TensorBox, scores: ir.TensorBox, classes: ir.TensorBox | None) -> None:
        tensors = [tensor for tensor in (boxes, scores, classes) if tensor is not None]
        super().__init__([ir.ExternKernel.realize_input(tensor) for tensor in tensors])

    def add_for_each_box(self, *dtypes: torch.dtype) -> list[ir.TensorBox]:
        """Add the kernel to the graph; its results, ``[N]`` each."""
        count = self.inputs[0].get_size()[0]
        return self.add_unfused(*(ir.FixedLayout(torch.device("cpu"), dtype, [count]) for dtype in dtypes))

    def arguments(self) -> list[str]:
        """What the kernel is given between the boxes and its results, in C++."""
        return []

    def render(
        self, kernel: CppTemplateKernel, buffer: ir.CppTemplateBuffer, epilogue: list[ir.ComputedBuffer], keep: bool
    ) -> str:
        results = {f"out{i}": result for i, result in enumerate(buffer.outputs or [buffer])}
        outputs = {name: result for name, result in results.items() if not self.is_unread(result)}

        def body() -> list[str]:
            to = [self._pointer(kernel, result) for result in results.values()]
            return [f"inductor_vision::{self.op}({', '.join([self._boxes(kernel), *self.arguments(), *to])});"]

        return self.source(kernel, buffer, outputs, body)

    def _pointer(self, kernel: CppTemplateKernel, result: ir.Buffer) -> str:
        """Null where nothing reads the result."""
        null = f"static_cast<{DTYPE_TO_CPP[result.get_dtype()]}*>(nullptr)"
        return null if self.is_unread(result) else pointer(kernel, result)

    def _boxes(self, kernel: CppTemplateKernel) -> str:
        boxes, scores, *classes = self.inputs
        return struct(
            "ScoredBoxes",
            *(DTYPE_TO_CPP[node.get_dtype()] for node in (boxes, scores)),
            boxes=pointer(kernel, boxes),
            **strides(kernel, boxes, "row", "column"),
            scores=pointer(kernel, scores),
            score_distance=kernel.stride(scores, 0),
            classes=pointer(kernel, classes[0] if classes else None),
            class_distance=kernel.stride(classes[0], 0) if classes else 0,
            count=kernel.size(boxes, 0),
        )
