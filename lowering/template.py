"""The base of the C++ templates: kernel headers spliced into generated code, and Inductor's neighbours in the store.

A template's output is a dense four-dimensional buffer in *physical* order, slowest dimension first: ``[B, H, W, C]``
for channels_last, ``[B, C, H, W]`` for contiguous. The kernel hands over its results row by row, in a buffer that is
still in cache; what Inductor fused (batch norm, activation, residual, the conversion to a lower precision) is generated
into the loop that stores them.
"""

from __future__ import annotations

import abc
import pathlib
import re
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch

from ..ops.registry import accumulate_dtype
from ..paths import record_path
from .inductor import (
    DTYPE_TO_CPP,
    CppTemplateKernel,
    Placeholder,
    V,
    gen_2d_view_of_epilogue_buf,
    get_export_declaration,
    ir,
    ops,
    parse_expr_with_index_symbols,
)

_CPP = pathlib.Path(__file__).parent / "cpp"


def splice_header(name: str) -> str:
    """The text of a kernel header with the headers it includes from this package, each once, in its place.

    The generated source is then complete: an AOTInductor package needs nothing of this package.
    """
    seen: set[str] = set()

    def splice(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (_CPP / name).read_text()
        return re.sub(r'^#include "(\w+\.h)"$', lambda match: splice(match[1]), text, flags=re.MULTILINE)

    return splice(name)


class RowsTemplate(abc.ABC):
    """A kernel over images whose results are stored row by row.

    Subclasses say which header holds the kernel and how it is called.
    """

    op: str  # the operator's name
    header: str  # of its kernel, in lowering/cpp/

    def __init__(
        self, inputs: Sequence[ir.IRNode], dtype: torch.dtype, size: Sequence[Any], channels_last: bool
    ) -> None:
        """
        Args:
            inputs: realized inputs.
            dtype: of the output.
            size: of the output, [B, C, H, W].
            channels_last: memory format of the output.
        """
        self.inputs = list(inputs)
        self.dtype = dtype
        self.size = list(size)
        self.channels_last = channels_last

    @property
    def path(self) -> str:
        """What this kernel is, for reports."""
        return "row by row"

    @abc.abstractmethod
    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        """The C++ statements that run the kernel; ``store`` is the lambda it hands its results to."""

    def output(self) -> ir.TensorBox:
        """Add the kernel to the graph; its result, ``[B, C, H, W]``."""
        record_path(self.op, "template", self.path)
        physical = [self.size[d] for d in (0, 2, 3, 1)] if self.channels_last else self.size
        buffer = ir.CppTemplateBuffer(
            layout=ir.FixedLayout(torch.device("cpu"), self.dtype, physical),
            inputs=self.inputs,
            make_kernel_render=self._make_kernel_render,
            template=self,
            choice=None,
        )
        box = ir.TensorBox.create(buffer)
        return ir.TensorBox(ir.PermuteView.create(box.data, [0, 3, 1, 2])) if self.channels_last else box

    def _make_kernel_render(
        self,
        buffer: ir.CppTemplateBuffer,
        flag_template_buffer_has_other_users: bool,
        epilogue_nodes: list[ir.ComputedBuffer] | None = None,
    ) -> Any:
        kernel = CppTemplateKernel(kernel_name=str(Placeholder.KERNEL_NAME), num_threads=0)

        def render() -> str:
            epilogue = list(epilogue_nodes or [])
            with patch.object(V.graph, "get_dtype", self._get_dtype(buffer)):
                return kernel.render(
                    self, buffer=buffer, epilogue=epilogue, keep=flag_template_buffer_has_other_users or not epilogue
                )

        return kernel, render

    def _get_dtype(self, buffer: ir.CppTemplateBuffer) -> Any:
        get_dtype = V.graph.get_dtype
        return lambda name: accumulate_dtype(self.dtype) if name == self._sums(buffer).get_name() else get_dtype(name)

    def _sums(self, buffer: ir.CppTemplateBuffer) -> ir.Buffer:
        """What the kernel computes, before it is converted to the output's dtype."""
        layout = ir.FixedLayout(torch.device("cpu"), accumulate_dtype(self.dtype), buffer.get_size())
        return ir.Buffer(name=f"{buffer.get_name()}_sums", layout=layout)

    def render(
        self, kernel: CppTemplateKernel, buffer: ir.CppTemplateBuffer, epilogue: list[ir.ComputedBuffer], keep: bool
    ) -> str:
        """Generated source.

        Args:
            buffer: the template's output.
            epilogue: what Inductor fused; the last of it is what is stored.
            keep: whether the template's own output is stored as well.
        """
        last = epilogue[-1] if epilogue else buffer
        outputs = {"out": last}
        aliases = {}
        if keep and epilogue:
            outputs["own"] = buffer
        elif epilogue:
            aliases[buffer.get_name()] = last.get_name()
        names = {f"in{i}": node for i, node in enumerate(buffer.inputs)}
        signature = kernel.def_kernel(inputs=names, outputs=outputs, aliases=aliases)
        source = self.call(kernel, buffer.inputs, self._store(kernel, buffer, epilogue, keep))
        return "\n".join(
            [
                "#include <torch/csrc/inductor/cpp_prefix.h>",
                splice_header(self.header),
                f'extern "C" {get_export_declaration()}',
                signature,
                "{",
                kernel.maybe_codegen_profile(),
                source,
                "}",
            ]
        )

    def _store(
        self, kernel: CppTemplateKernel, buffer: ir.CppTemplateBuffer, epilogue: list[ir.ComputedBuffer], keep: bool
    ) -> str:
        """A lambda that stores `n_columns` neighbours of an output row, for all channels, through the epilogue."""
        accumulate = accumulate_dtype(self.dtype)
        arguments = "int64_t out_image, int64_t out_row, int64_t out_column, int64_t n_columns"
        row = f"{buffer.get_name()}_row"  # a name that no constant of the graph has
        signature = f"[&]({arguments}, const {DTYPE_TO_CPP[accumulate]}* {row}, int64_t distance)"
        if not epilogue:  # Inductor would copy one by one
            return f"{signature} {{\n{self._plain_store(kernel, buffer, row)}\n}}"
        target, reindexers = gen_2d_view_of_epilogue_buf(
            epilogue[-1], buffer, epilogue, [], default_reindexers=[None] * len(epilogue)
        )
        nodes, source = list(epilogue), buffer
        if keep:
            source = self._sums(buffer)
            nodes.insert(0, self._own_store(buffer, source))
            reindexers.insert(0, None)

        # Of image, row, column and channel: the part of the output, its place, and the strides of the row.
        ranges: list[Any] = [("out_image", "out_image + 1"), ("out_row", "out_row + 1")]
        ranges += [("out_column", "out_column + n_columns"), ()]
        strides = ["0", "0", "distance", "1"]
        if not self.channels_last:
            ranges = [ranges[d] for d in (0, 3, 1, 2)]
            strides = ["0", "distance", "0", "1"]
        part = kernel.slice_nd(target, ranges)
        sums = ir.Buffer(
            name=row,
            layout=ir.FixedLayout(
                torch.device("cpu"), accumulate, part.get_size(), parse_expr_with_index_symbols(strides)
            ),
        )
        kernel.local_buffers[row] = sums
        body = kernel.store_output(
            part, sums, orig_src=source, epilogue_nodes=nodes, offsets=self._place(), reindexers=reindexers
        )
        return f"{signature} {{\n{body}\n}}"

    def _plain_store(self, kernel: CppTemplateKernel, buffer: ir.CppTemplateBuffer, row: str) -> str:
        size = [kernel.size(buffer, d) for d in range(4)]
        if self.channels_last:
            block = f"{size[3]}, n_columns, {size[3]}"  # distance in the output, rows and columns of the block
        else:
            block = f"{kernel.stride(buffer, 1)}, {size[1]}, n_columns"
        return f"inductor_vision::store_block({row}, distance, &{kernel.index(buffer, self._place())}, {block});"

    def _place(self) -> list[str]:
        """Where in the output, in physical order, a row of results begins."""
        place = ["out_image", "out_row", "out_column"]
        place.insert(3 if self.channels_last else 1, "0")
        return place

    def _own_store(self, buffer: ir.CppTemplateBuffer, sums: ir.Buffer) -> ir.ComputedBuffer:
        """The template's output as a node of the epilogue, for when it has users beside the fused ones."""
        load = sums.make_loader()
        convert = ir.Pointwise(
            device=torch.device("cpu"),
            dtype=self.dtype,
            inner_fn=lambda index: ops.to_dtype(load(index), self.dtype),
            ranges=buffer.get_size(),
        )
        return ir.ComputedBuffer(name=buffer.get_name(), layout=buffer.get_layout(), data=convert)
