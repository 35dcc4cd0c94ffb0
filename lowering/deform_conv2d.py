"""deform_conv2d as one C++ kernel: see cpp/deform_conv2d.h."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .inductor import (
    DTYPE_TO_CPP,
    CppCodeCache,
    CppTemplateKernel,
    V,
    config,
    ir,
    lowerings,
    pick_vec_isa,
    prune_tensors,
)
from .layout import channels_last_strides, feeds_channels_last_convolution
from .registry import Template, template_for
from .template import RowsTemplate, accumulate_dtype, splice_header
from .tuning import fastest

aten, prims = torch.ops.aten, torch.ops.prims


@dataclasses.dataclass(frozen=True)
class Convolution:
    """What is known of a call when it is compiled: all but batch and image size."""

    channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    offset_groups: int
    dtype: torch.dtype

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def depthwise(self) -> bool:
        return self.channels == self.out_channels == self.groups


@dataclasses.dataclass(frozen=True)
class Blocking:
    """DeformBlocking in cpp/deform_conv2d.h."""

    pixels: int
    depth: int
    transposed_bytes: int


MAX_DEPTH = 256  # kMaxDepth in cpp/gemm.h
PANEL_BYTES = 64  # kPanel in cpp/gemm.h


def default_blocking(convolution: Convolution) -> Blocking:
    """A tile whose samples and sums take half of the second-level cache, and so do images that are transposed."""
    half = (torch.cpu.get_capabilities().get("l2_cache_size", 0) or 512 << 10) // 2
    itemsize = accumulate_dtype(convolution.dtype).itemsize
    sums = 2 * convolution.out_channels * itemsize  # and their transposition
    if convolution.depthwise:
        samples, most = convolution.taps * (4 * 8 + 5 * itemsize), 32  # DeformSamples, of one pixel
    else:
        samples, most = MAX_DEPTH * itemsize, 96
    return Blocking(max(12, min(most, half // (samples + sums))), MAX_DEPTH, transposed_bytes=half)


def bf16_dot_products() -> bool:
    """Whether the kernel is compiled with INDUCTOR_VISION_BF16_DOT (cpp/gemm.h)."""
    isa = pick_vec_isa()
    native = config.cpp.march is None or "avx512bf16" in isa.build_arch_flags()
    return bool(isa) and isa.bit_width() == 512 and torch.cpu._is_avx512_bf16_supported() and native


def _refusal(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
) -> str | None:
    static = (*weight.shape, *stride, *padding, *dilation, input.shape[1], offset.shape[1])
    if not all(isinstance(number, int) for number in static):
        return "only batch and image size may be dynamic; the weight's shape, the channels and the geometry must not"
    return None


def _lower(
    input: ir.TensorBox,
    offset: ir.TensorBox,
    weight: ir.TensorBox,
    bias: ir.TensorBox | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: ir.TensorBox | None,
) -> tuple[ir.TensorBox, str]:
    out_channels, group_channels, *kernel = (int(n) for n in weight.get_size())
    channels = int(input.get_size()[1])
    convolution = Convolution(
        channels=channels,
        out_channels=out_channels,
        kernel=tuple(kernel),
        stride=tuple(map(int, stride)),
        padding=tuple(map(int, padding)),
        dilation=tuple(map(int, dilation)),
        groups=channels // group_channels,
        offset_groups=int(offset.get_size()[1]) // (2 * kernel[0] * kernel[1]),
        dtype=input.get_dtype(),
    )
    node = V.graph.current_node
    image, channels_last = _image(input, node)
    packed, kind = _pack(convolution, weight, node.args[2].meta["val"].stride(0) == 0)
    size = ir.convert_shape_to_inductor(node.meta["val"].shape)
    optional = [ir.ExternKernel.realize_input(t) if t is not None else None for t in (mask, bias)]
    blocking = default_blocking(convolution)
    if config.max_autotune:
        blocking = tuned_blocking(
            convolution, kind, packed, image, V.graph.sizevars.optimization_hints(size), channels_last
        )
    template = DeformConv2dTemplate(
        convolution, blocking, kind, image, ir.ExternKernel.realize_input(offset), packed,
        mask=optional[0], bias=optional[1], size=size, channels_last=channels_last,
    )  # fmt: skip
    return template.output(), template.path


def _image(input: ir.TensorBox, node: torch.fx.Node) -> tuple[ir.IRNode, bool]:
    """The input, realized with neighbouring channels or neighbouring columns, and whether to write channels_last.

    Where the input's layout is still free it becomes channels_last, which costs its producer nothing. The result has
    the memory format that it has in eager mode, unless the input is channels_last by others' choice, or Inductor runs
    a convolution behind this one channels_last: in a network that Inductor lays out so, nothing is transposed.
    """
    result = node.meta["val"]
    channels_last = channels_last_strides(result.stride(), result.shape) or feeds_channels_last_convolution(node)
    if _layout_is_free(input):
        return ir.ExternKernel.realize_input(ir.ExternKernel.require_channels_last(input)), channels_last
    image = ir.ExternKernel.realize_input(input)
    strides = image.get_layout().stride
    if channels_last_strides(strides, image.get_size()):
        return image, True
    if not V.graph.sizevars.statically_known_equals(strides[3], 1):
        image = ir.ExternKernel.realize_input(ir.ExternKernel.require_contiguous(image))
    return image, channels_last


def _layout_is_free(x: ir.TensorBox) -> bool:
    """Whether it is yet to be decided in which order x is written."""
    box = x.data
    if not isinstance(box, ir.StorageBox):
        return False
    return not isinstance(box.data, ir.Buffer) or isinstance(box.data.get_layout(), ir.FlexibleLayout)


def _pack(convolution: Convolution, weight: ir.TensorBox, shared: bool) -> tuple[ir.IRNode, str]:
    """The weight as the kernel wants it, and the DeformKernel that wants it so.

    A constant is packed now, once; anything else at every call, by a kernel that Inductor generates.
    """
    dtype = convolution.dtype
    kind = "gemm"
    if convolution.depthwise:
        kind = "shared" if shared and convolution.groups > 1 else "depthwise"
    dots = dtype == torch.bfloat16 and kind == "gemm" and bf16_dot_products()
    dots = dots and convolution.channels // convolution.groups % 2 == 0
    packed_dtype = torch.bfloat16 if dots else accumulate_dtype(dtype)

    node = ir.InputsKernel.unwrap_storage_for_input(weight)
    if node.get_name() in V.graph.constants:
        layout = node.get_layout()
        constant = V.graph.constants[node.get_name()].as_strided(layout.size, layout.stride, layout.offset)
        packed = pack(convolution, kind, packed_dtype, constant.contiguous(), _call_aten)
        packed = V.graph.add_tensor_constant(packed.contiguous())
        prune_tensors([weight], [packed])
    else:
        packed = ir.ExternKernel.require_contiguous(pack(convolution, kind, packed_dtype, weight, _call_lowering))
    return ir.ExternKernel.realize_input(packed), kind


def _call_aten(op: Any, *args: Any) -> Any:
    return op(*args)


def _call_lowering(op: Any, *args: Any) -> Any:
    return lowerings[op](*args)


def pack(convolution: Convolution, kind: str, dtype: torch.dtype, weight: Any, call: Callable[..., Any]) -> Any:
    """``weight`` [O, Cg, kH, kW] in the order of DeformKernel (cpp/deform_conv2d.h), as a view of a converted copy.

    Written once for contiguous tensors (``call`` runs the operator) and for Inductor's IR (``call`` lowers it).
    """
    view, permute = aten.view.default, aten.permute.default
    groups, taps = convolution.groups, convolution.taps
    inputs, outputs = convolution.channels // groups, convolution.out_channels // groups
    if kind == "shared":
        weight = call(aten.slice.Tensor, weight, 0, 0, 1)
    weight = call(prims.convert_element_type.default, weight, dtype)
    if kind == "shared":
        return call(view, weight, [taps])
    if kind == "depthwise":
        return call(permute, call(view, weight, [convolution.channels, taps]), [1, 0])  # [K, C]
    lanes = PANEL_BYTES // accumulate_dtype(convolution.dtype).itemsize
    panels = -(-outputs // lanes)
    weight = call(view, weight, [groups, outputs, inputs, taps])
    weight = call(aten.constant_pad_nd.default, weight, [0, 0, 0, 0, 0, panels * lanes - outputs])
    if dtype == torch.bfloat16:
        weight = call(view, weight, [groups, panels, lanes, inputs // 2, 2, taps])
        return call(permute, weight, [0, 1, 5, 3, 2, 4])  # [G, panels, K, Cg / 2, lanes, 2]
    weight = call(view, weight, [groups, panels, lanes, inputs, taps])
    return call(permute, weight, [0, 1, 4, 3, 2])  # [G, panels, K, Cg, lanes]


class DeformConv2dTemplate(RowsTemplate):
    """See cpp/deform_conv2d.h."""

    header = "deform_conv2d.h"
    name = "deform_conv2d"

    def __init__(
        self,
        convolution: Convolution,
        blocking: Blocking,
        kind: str,
        image: ir.IRNode,
        offset: ir.IRNode,
        weight: ir.IRNode,
        *,
        mask: ir.IRNode | None,
        bias: ir.IRNode | None,
        size: Sequence[Any],
        channels_last: bool,
    ) -> None:
        optional = [t for t in (mask, bias) if t is not None]
        super().__init__([image, offset, weight, *optional], convolution.dtype, size, channels_last)
        self.convolution = convolution
        self.blocking = blocking
        self.kind = kind
        self.has_mask, self.has_bias = mask is not None, bias is not None

    @property
    def path(self) -> str:
        precision = "bf16 dot products" if self.inputs[2].get_dtype() == torch.bfloat16 else "fused"
        return f"{'GEMM' if self.kind == 'gemm' else self.kind} kernel, {precision}, {self.blocking}"

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        image, offset, weight, *optional = inputs
        mask = optional.pop(0) if self.has_mask else None
        bias = optional.pop(0) if self.has_bias else None

        def pointer(node: ir.IRNode | None) -> str:
            return "nullptr" if node is None else f"&{kernel.index(node, [0] * len(node.get_size()))}"

        def view(node: ir.IRNode | None) -> str:
            strides = ["0"] * 4 if node is None else [kernel.stride(node, d) for d in range(4)]
            return f"{{{', '.join([pointer(node), *strides])}}}"

        def size(node: ir.IRNode) -> list[str]:
            return [kernel.size(node, d) for d in range(4)]

        run = run_statement(
            self.convolution, self.kind, self.channels_last, view(image), view(offset), view(mask), pointer(bias),
            pointer(weight), size(image), size(offset)[2:],
        )  # fmt: skip
        blocking = ", ".join(map(str, dataclasses.astuple(self.blocking)))
        return f"const inductor_vision::DeformBlocking blocking{{{blocking}}};\nconst auto store = {store};\n{run}"


def run_statement(
    convolution: Convolution,
    kind: str,
    channels_last: bool,
    image: str,
    offset: str,
    mask: str,
    bias: str,
    weight: str,
    image_size: Sequence[Any],
    out_size: Sequence[Any],
) -> str:
    """C++ that runs the kernel on views (``image``, ``offset``, ``mask``) and pointers, with `blocking` and `store`."""
    c = convolution
    pairs = [*c.kernel, *c.stride, *c.padding, *c.dilation]
    fields = [image, offset, mask, bias, *image_size, c.out_channels, *out_size, *pairs, c.groups, c.offset_groups]
    return f"""
    const inductor_vision::DeformConv2d<{DTYPE_TO_CPP[c.dtype]}> op{{{", ".join(map(str, fields))}}};
    inductor_vision::deform_conv2d<{str(channels_last).lower()}, inductor_vision::DeformKernel::{kind}>(
        op, {weight}, blocking, store);"""


def tuned_blocking(
    convolution: Convolution, kind: str, weight: ir.IRNode, image: ir.IRNode, size: Sequence[int], channels_last: bool
) -> Blocking:
    """The blocking that runs fastest on random data; ``size`` is the output's, with hints for what is dynamic."""
    hints = V.graph.sizevars.optimization_hints
    image_size, strides = hints(image.get_size()), hints(image.get_layout().stride)
    default = default_blocking(convolution)
    choices = [
        Blocking(pixels, depth, default.transposed_bytes)
        for pixels in (12, 24, 48, 96, 192)
        for depth in ((default.depth,) if convolution.depthwise else (128, 192, MAX_DEPTH))
    ]
    memory = "channels_last" if channels_last_strides(strides, image_size) else "contiguous"
    problem = f"deform_conv2d {convolution}, {kind} {weight.get_dtype()}, {memory} {list(image_size)}"

    def prepare() -> Callable[[Blocking], None]:
        return compile_runner(convolution, kind, weight, image_size, strides, size, channels_last)

    return fastest(problem, choices, prepare)


def compile_runner(
    convolution: Convolution,
    kind: str,
    weight: ir.IRNode,
    image_size: Sequence[int],
    image_strides: Sequence[int],
    size: Sequence[int],
    channels_last: bool,
) -> Callable[[Blocking], None]:
    """The kernel, compiled by itself on random data of these shapes, as a function of its blocking."""
    dtype = convolution.dtype
    batch, out_channels, *out_size = size
    taps = convolution.offset_groups * convolution.taps
    offset = torch.randn(batch, 2 * taps, *out_size, dtype=dtype)
    mask = torch.rand(batch, taps, *out_size, dtype=dtype)
    tensors = [
        torch.empty_strided(image_size, image_strides, dtype=dtype).normal_(),
        offset,
        mask,
        torch.zeros(V.graph.sizevars.optimization_hints(weight.get_size()), dtype=weight.get_dtype()),
        torch.empty(size, dtype=dtype),
    ]
    scalar = DTYPE_TO_CPP[dtype]

    def view(name: str, tensor: Tensor) -> str:
        return f"{{{name}, {', '.join(map(str, tensor.stride()))}}}"

    run = run_statement(
        convolution, kind, channels_last, view("image", tensors[0]), view("offset", offset), view("mask", mask),
        "nullptr", "weight", image_size, out_size,
    )  # fmt: skip
    outer, inner = ("n_columns", str(out_channels)) if channels_last else (str(out_channels), "n_columns")
    source = f"""
#include <torch/csrc/inductor/cpp_prefix.h>
{splice_header(DeformConv2dTemplate.header)}
extern "C" void run(const {scalar}* image, const {scalar}* offset, const {scalar}* mask,
    const {DTYPE_TO_CPP[weight.get_dtype()]}* weight, {scalar}* out, int64_t pixels, int64_t depth, int64_t bytes) {{
    const inductor_vision::DeformBlocking blocking{{pixels, depth, bytes}};
    const auto store = [&](int64_t b, int64_t y, int64_t x, int64_t n_columns, const auto* sums, int64_t distance) {{
        {scalar}* to = out + ((b * {out_size[0]} + y) * {out_size[1]} + x) * {out_channels};
        for (int64_t i = 0; i < {outer}; ++i) {{
            std::copy_n(sums + i * distance, {inner}, to + i * {inner});
        }}
    }};
    {run}
}}
"""
    library = CppCodeCache.load(source)

    def run_once(blocking: Blocking) -> None:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        library.run(*pointers, *map(ctypes.c_int64, dataclasses.astuple(blocking)))

    return run_once


template_for("deform_conv2d", Template(_refusal, _lower))
