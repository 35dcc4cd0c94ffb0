"""The base of the C++ templates: kernel headers spliced into generated code, and Inductor's neighbours in the store.

The output of a template over images or regions is a dense four-dimensional buffer in *physical* order, slowest
dimension first: ``[B, H, W, C]`` for channels_last, ``[B, C, H, W]`` for contiguous. The kernel hands over its results
block by block (``OutputBlock`` in cpp/base.h), each still in cache; what Inductor fused (batch norm, activation,
residual, the conversion to a lower precision) is generated into the loop that stores them.
"""

from __future__ import annotations

import abc
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch

from ...ops.registry import accumulate_dtype
from ...paths import record_path
from ..inductor.codegen import (
    DTYPE_TO_CPP,
    CppTemplateKernel,
    Placeholder,
    V,
    config,
    get_export_declaration,
    ir,
    lowerings,
    ops,
    parse_expr_with_index_symbols,
)
from . import epilogue as epilogues

_BCHW = "batch", "channels", "height", "width"
_CPP = pathlib.Path(__file__).parent.parent / "cpp"


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


def pointer(kernel: CppTemplateKernel, node: ir.IRNode | None) -> str:
    """To the first element of an input or output, in C++; null if there is none."""
    if node is None:
        return "nullptr"
    address = f"&{kernel.index(node, [0] * len(node.get_size()))}"
    if node.get_dtype() != V.graph.get_dtype(node.get_name()):  # a view of memory that was declared as another dtype
        address = f"reinterpret_cast<const {DTYPE_TO_CPP[node.get_dtype()]}*>({address})"
    return address


def in_cpp(value: Any) -> str:
    """A number or truth value in C++; what is C++ already stays as it is. See also :func:`double`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def members(**values: Any) -> str:
    """A value of a struct in C++, its members by name in the order of their declaration. What is left out is zero.

    Of the many numbers that kernels take, two that are swapped would compile if they were told by their places.
    """
    return f"{{{', '.join(f'.{name} = {in_cpp(value)}' for name, value in values.items())}}}"


def struct(name: str, *types: str, **values: Any) -> str:
    """A value of one of the kernels' structs, with its template arguments, see :func:`members`."""
    arguments = f"<{', '.join(types)}>" if types else ""
    return f"inductor_vision::{name}{arguments}{members(**values)}"


def sizes(kernel: CppTemplateKernel, node: ir.IRNode, *names: str) -> dict[str, str]:
    """The size of a tensor's first dimensions in C++, by these names."""
    return {name: kernel.size(node, d) for d, name in enumerate(names)}


def strides(kernel: CppTemplateKernel, node: ir.IRNode, *names: str) -> dict[str, str]:
    """The strides of a tensor's first dimensions in C++, by these names."""
    return {name: kernel.stride(node, d) for d, name in enumerate(names)}


def view(kernel: CppTemplateKernel, node: ir.IRNode) -> str:
    """A tensor of four dimensions as a View4d (cpp/base.h), or an Output4d."""
    return members(data=pointer(kernel, node), **strides(kernel, node, "image", "channel", "row", "column"))


def size_in_cpp(kernel: CppTemplateKernel, size: Sequence[Any]) -> list[str]:
    """The size of a tensor that is no buffer of the graph, in C++."""
    node = ir.Buffer(name=None, layout=ir.FixedLayout(torch.device("cpu"), torch.float32, list(size)))
    return [kernel.size(node, d) for d in range(len(size))]


def double(value: float) -> str:
    """A number in C++."""
    if math.isfinite(value):
        return repr(float(value))
    return "NAN" if math.isnan(value) else f"{'-' * (value < 0)}INFINITY"


def _block_name(buffer: ir.Buffer) -> str:
    """What a block of the buffer is called in its store; no constant of a graph is called so."""
    return f"{buffer.get_name()}_block"


def _is_read_elsewhere(buffer: ir.Buffer, epilogue: Sequence[ir.ComputedBuffer]) -> bool:
    """Whether anything but the epilogue reads an output.

    Inductor's own answer counts what only has to run later, too: the kernel that overwrites an input of the template.
    """
    users = V.graph.scheduler.name_to_buf[buffer.get_name()].users
    return any(not user.is_weak and getattr(user.node, "node", None) not in epilogue for user in users)


class KernelTemplate(abc.ABC):
    """A kernel that becomes a part of the generated code.

    Subclasses say which header holds the kernel, and how it is called.
    """

    op: str  # the operator's name
    header: str  # of its kernel, in lowering/cpp/

    def __init__(self, inputs: Sequence[ir.IRNode]) -> None:
        """
        Args:
            inputs: realized inputs.
        """
        self.inputs = list(inputs)

    @property
    def path(self) -> str:
        """What this kernel is, for reports."""
        return "one kernel"

    @abc.abstractmethod
    def render(
        self, kernel: CppTemplateKernel, buffer: ir.CppTemplateBuffer, epilogue: list[ir.ComputedBuffer], keep: bool
    ) -> str:
        """Generated source.

        Args:
            buffer: the template's output.
            epilogue: what Inductor fused; the last of it is what is stored.
            keep: whether the template's own output is stored as well.
        """

    def add(self, layout: ir.OutputSpec) -> ir.CppTemplateBuffer:
        """Add the kernel to the graph."""
        record_path(self.op, "template", self.path)
        return ir.CppTemplateBuffer(
            layout=layout,
            inputs=self.inputs,
            make_kernel_render=self._make_kernel_render,
            template=self,
            choice=None,
        )

    def add_unfused(self, *layouts: ir.FixedLayout) -> list[ir.TensorBox]:
        """Add the kernel to the graph; its results, one for each layout, with which nothing is fused."""
        buffer = self.add(layouts[0])
        results: Sequence[ir.Buffer] = [buffer]
        if len(layouts) > 1:
            results = [ir.MultiOutput(layout, buffer, [(list, i)]) for i, layout in enumerate(layouts)]
            buffer.layout = ir.MultiOutputLayout(device=torch.device("cpu"))
            buffer.outputs = results
        V.graph.no_fuse_buffer_names.update(result.get_name() for result in results)
        return [ir.TensorBox.create(result) for result in results]

    def _make_kernel_render(
        self,
        buffer: ir.CppTemplateBuffer,
        flag_template_buffer_has_other_users: bool,
        epilogue_nodes: list[ir.ComputedBuffer] | None = None,
    ) -> Any:
        kernel = CppTemplateKernel(kernel_name=str(Placeholder.KERNEL_NAME), num_threads=0)

        def render() -> str:
            epilogue = list(epilogue_nodes or [])
            keep = not epilogue or _is_read_elsewhere(buffer, epilogue)
            return kernel.render(self, buffer=buffer, epilogue=epilogue, keep=keep)

        return kernel, render

    def source(
        self,
        kernel: CppTemplateKernel,
        buffer: ir.CppTemplateBuffer,
        outputs: dict[str, ir.Buffer],
        body: Callable[[], Sequence[str]],
        aliases: dict[str, str] | None = None,
    ) -> str:
        """The source of the generated function; ``body`` makes its statements once the parameters are known.

        Where kernels are profiled (Inductor's ``cpp.enable_kernel_profile``) this one goes by its operator's name.
        """
        names = {f"in{i}": node for i, node in enumerate(buffer.inputs)}
        signature = kernel.def_kernel(inputs=names, outputs=outputs, aliases=aliases)
        return "\n".join(
            [
                "#include <torch/csrc/inductor/cpp_prefix.h>",
                *(["#include <torch/csrc/inductor/aoti_runtime/utils.h>"] if config.cpp.enable_kernel_profile else []),
                splice_header(self.header),
                f'extern "C" {get_export_declaration()}',
                signature,
                "{",
                kernel.maybe_codegen_profile(self.op),
                *body(),
                "}",
            ]
        )

    def prepare(self, kernel: CppTemplateKernel, output: ir.Buffer) -> str:
        """A statement that makes an output ready to be written."""
        size = output.get_size()
        count = " * ".join(f"int64_t({kernel.size(output, d)})" for d in range(len(size)))
        return f"inductor_vision::prepare_output({pointer(kernel, output)}, {count} * {output.get_dtype().itemsize});"

    def is_unread(self, output: ir.Buffer) -> bool:
        """Whether an output, one of several, has no users: it has no memory then."""
        return output.get_name() in V.graph.removed_buffers


class ResultsTemplate(KernelTemplate):
    """A kernel that computes some of several tensors, gradients mostly, with which nothing is fused."""

    names: tuple[str, ...]  # of all that it can compute

    def __init__(self, inputs: Sequence[ir.IRNode], wanted: Sequence[bool]) -> None:
        """
        Args:
            inputs: realized inputs.
            wanted: which results the node that is lowered wants; the others are empty tensors.
        """
        super().__init__(inputs)
        self.wanted = [name for name, want in zip(self.names, wanted) if want]

    @property
    def path(self) -> str:
        return f"gradients of {', '.join(name.removeprefix('grad_') for name in self.wanted)}"

    @abc.abstractmethod
    def call(
        self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], results: dict[str, ir.Buffer]
    ) -> Sequence[str]:
        """The C++ statements that compute ``results``, which are those that are wanted and have users."""

    def results(self) -> list[ir.TensorBox]:
        """Add the kernel to the graph; its results."""
        layouts = dict(zip(self.names, map(_fixed_layout, V.graph.current_node.meta["val"])))
        computed = {}
        if self.wanted:
            computed = dict(zip(self.wanted, self.add_unfused(*(layouts[name] for name in self.wanted))))
        return [computed[name] if name in computed else _empty(layout) for name, layout in layouts.items()]

    def render(
        self, kernel: CppTemplateKernel, buffer: ir.CppTemplateBuffer, epilogue: list[ir.ComputedBuffer], keep: bool
    ) -> str:
        results = dict(zip(self.wanted, buffer.outputs or [buffer]))
        results = {name: result for name, result in results.items() if not self.is_unread(result)}

        def body() -> list[str]:
            prepared = [self.prepare(kernel, result) for result in results.values()]
            return [*prepared, *self.call(kernel, buffer.inputs, results)]

        return self.source(kernel, buffer, results, body)


def _fixed_layout(fake: torch.Tensor) -> ir.FixedLayout:
    size, stride = (ir.convert_shape_to_inductor(numbers) for numbers in (fake.shape, fake.stride()))
    return ir.FixedLayout(torch.device("cpu"), fake.dtype, size, stride)


def _empty(layout: ir.FixedLayout) -> ir.TensorBox:
    return lowerings[torch.ops.aten.full.default](layout.size, 0, dtype=layout.dtype, device=layout.device)


class BlocksTemplate(KernelTemplate):
    """A kernel over images, or regions, whose results are stored block by block."""

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
        super().__init__(inputs)
        self.dtype = dtype
        self.size = list(size)
        self.channels_last = channels_last
        self.store_functions: list[str] = []

    @property
    def path(self) -> str:
        return "fused"

    @abc.abstractmethod
    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        """The C++ statements that run the kernel.

        ``store`` is the lambda it hands its results to; those for further results follow, as further arguments.
        """

    def output_size(self, kernel: CppTemplateKernel) -> list[str]:
        """The size of the output, [B, C, H, W], in C++."""
        return size_in_cpp(kernel, self.size)

    def _layout(self, dtype: torch.dtype) -> ir.FixedLayout:
        physical = [self.size[d] for d in (0, 2, 3, 1)] if self.channels_last else self.size
        return ir.FixedLayout(torch.device("cpu"), dtype, physical)

    def _logical(self, box: ir.TensorBox) -> ir.TensorBox:
        return ir.TensorBox(ir.PermuteView.create(box.data, [0, 3, 1, 2])) if self.channels_last else box

    def output(self) -> ir.TensorBox:
        """Add the kernel to the graph; its result, ``[B, C, H, W]``."""
        return self._logical(ir.TensorBox.create(self.add(self._layout(self.dtype))))

    def outputs(self, further: Sequence[tuple[torch.dtype, str]]) -> list[ir.TensorBox]:
        """Add the kernel to the graph where it has further results of the same size and memory format.

        Of each, the dtype and the C++ function that stores it, with the arguments of store_block. Nothing is fused.
        """
        self.store_functions = [function for _, function in further]
        layouts = [self._layout(dtype) for dtype in (self.dtype, *(dtype for dtype, _ in further))]
        return [self._logical(result) for result in self.add_unfused(*layouts)]

    def _get_dtype(self, buffer: ir.CppTemplateBuffer) -> Any:
        get_dtype = V.graph.get_dtype
        return lambda name: accumulate_dtype(self.dtype) if name == self._sums(buffer).get_name() else get_dtype(name)

    def _sums(self, buffer: ir.CppTemplateBuffer) -> ir.Buffer:
        """What the kernel computes, before it is converted to the output's dtype."""
        layout = self._layout(accumulate_dtype(self.dtype))
        return ir.Buffer(name=f"{buffer.get_name()}_sums", layout=layout)

    def render(
        self, kernel: CppTemplateKernel, buffer: ir.CppTemplateBuffer, epilogue: list[ir.ComputedBuffer], keep: bool
    ) -> str:
        first, *further = buffer.outputs or [buffer]
        last = epilogue[-1] if epilogue else first
        outputs = {"out": last, **{f"out{i}": node for i, node in enumerate(further, 1)}}
        aliases = {}
        if keep and epilogue:
            outputs["own"] = buffer
        elif epilogue:
            aliases[buffer.get_name()] = last.get_name()
        outputs = {name: node for name, node in outputs.items() if not self.is_unread(node)}

        def body() -> list[str]:
            stores = [self._store(kernel, first, epilogue, keep)]
            stores += [self._plain_store(kernel, *store) for store in zip(further, self.store_functions)]
            call = self.call(kernel, buffer.inputs, ", ".join(stores))
            return [*(self.prepare(kernel, node) for node in outputs.values()), call]

        with patch.object(V.graph, "get_dtype", self._get_dtype(buffer)):
            return self.source(kernel, buffer, outputs, body, aliases)

    def _store(
        self, kernel: CppTemplateKernel, buffer: ir.Buffer, epilogue: list[ir.ComputedBuffer], keep: bool
    ) -> str:
        """A lambda that stores a block of the output through the epilogue."""
        accumulate = accumulate_dtype(self.dtype)
        values = _block_name(buffer)
        if not epilogue:  # Inductor would copy one by one
            return self._plain_store(kernel, buffer, "store_block")
        if not keep and len(epilogue) == 1 and epilogues.only_converts(epilogue[0], accumulate):
            # Inductor would do it pixel by pixel, of as few numbers as there are channels.
            return self._plain_store(kernel, self._lying_as(buffer, epilogue[0]), "store_block")
        nodes, source = list(epilogue), buffer
        found = epilogues.reindexers(buffer, epilogue)
        assert found is not None  # or Inductor would have been told not to fuse
        reindexers: list[Any] = list(found)
        if keep:
            source = self._sums(buffer)
            nodes.insert(0, self._own_store(buffer, source))
            reindexers.insert(0, None)
        target = self._lying_as(buffer, epilogue[-1])

        # Of image, channel, row and column: the part of the output, and the strides of the block's values. It is one
        # image, but Inductor must not know: it counts loops without those of a single step when it looks for the one to
        # vectorize, and then takes another.
        ranges = [
            ("out_image", "out_image + n_images"),
            ("out_channel", "out_channel + n_channels"),
            ("out_row", "out_row + n_rows"),
            ("out_column", "out_column + n_columns"),
        ]
        if self.channels_last:
            ranges = [ranges[d] for d in (0, 2, 3, 1)]
            strides = ["0", "n_columns * distance", "distance", "1"]
        else:
            strides = ["0", "distance", "n_columns", "1"]
        part = kernel.slice_nd(target, ranges)
        sums = ir.Buffer(
            name=values,
            layout=ir.FixedLayout(
                torch.device("cpu"), accumulate, part.get_size(), parse_expr_with_index_symbols(strides)
            ),
        )
        kernel.local_buffers[values] = sums
        stored = kernel.store_output(
            part, sums, orig_src=source, epilogue_nodes=nodes, offsets=self._place(), reindexers=reindexers
        )
        return f"{self._lambda(values)}\n{stored}\n}}"

    def _lying_as(self, buffer: ir.Buffer, stored: ir.ComputedBuffer) -> ir.ReinterpretView:
        """What is stored in the place of the template's own output, in the shape of that: it lies in memory as that
        would, whatever its shape."""
        layout = ir.FixedLayout(torch.device("cpu"), stored.get_dtype(), buffer.get_size(), buffer.get_stride())
        return ir.ReinterpretView(data=ir.StorageBox(stored), layout=layout)

    def _lambda(self, values: str) -> str:
        """The head of a store, and what its body has of the block."""
        accumulate = DTYPE_TO_CPP[accumulate_dtype(self.dtype)]
        return f"""[&](const inductor_vision::OutputBlock& block, const {accumulate}* {values}, int64_t distance) {{
            const int64_t out_image = block.image, n_images = 1;
            const int64_t out_channel = block.channel, n_channels = block.channels;
            const int64_t out_row = block.row, n_rows = block.rows;
            const int64_t out_column = block.column, n_columns = block.columns;"""

    def _plain_store(self, kernel: CppTemplateKernel, buffer: ir.Buffer, function: str) -> str:
        """What stores a block of an output as it is, by a function like store_block."""
        if self.is_unread(buffer):
            return "[](const auto&...) {}"
        values = _block_name(buffer)
        if function == "store_block":
            physical = ("batch", "height", "width", "channels") if self.channels_last else _BCHW
            size = sizes(kernel, buffer, *physical)
            return struct(
                "DenseStore",
                in_cpp(self.channels_last),
                DTYPE_TO_CPP[buffer.get_dtype()],
                out=pointer(kernel, buffer),
                **{name: size[name] for name in _BCHW[1:]},
            )
        if self.channels_last:
            part = f"{kernel.size(buffer, 3)}, n_rows * n_columns, n_channels"  # distance in the output, rows, columns
        else:
            part = f"{kernel.stride(buffer, 1)}, n_channels, n_rows * n_columns"
        place = kernel.index(buffer, self._place())
        return f"{self._lambda(values)}\ninductor_vision::{function}({values}, distance, &{place}, {part});\n}}"

    def _place(self) -> list[str]:
        """Where in the output, in physical order, a block of results begins."""
        place = ["out_image", "out_channel", "out_row", "out_column"]
        return [place[d] for d in (0, 2, 3, 1)] if self.channels_last else place

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


epilogues.fuse_only_what_is_stored_alike(KernelTemplate)
