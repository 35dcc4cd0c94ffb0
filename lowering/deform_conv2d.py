"""deform_conv2d as one C++ kernel: see cpp/deform_conv2d.h."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .constants import fold_constant
from .inductor import DTYPE_TO_CPP, CppCodeCache, CppTemplateKernel, V, config, ir, pick_vec_isa
from .layout import channels_last_strides, feeds_channels_last_convolution
from .registry import Template, define_internal_op, template_for
from .template import RowsTemplate, accumulate_dtype, splice_header
from .tuning import fastest


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


def _convolution(
    input: Tensor, offset: Tensor, weight_shape: Sequence[int], geometry: Sequence[Sequence[int]]
) -> Convolution:
    out_channels, group_channels, *kernel = weight_shape
    stride, padding, dilation = map(tuple, geometry)
    return Convolution(
        channels=int(input.shape[1]),
        out_channels=out_channels,
        kernel=tuple(kernel),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=int(input.shape[1]) // group_channels,
        offset_groups=int(offset.shape[1]) // (2 * kernel[0] * kernel[1]),
        dtype=input.dtype,
    )


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
    if not all(isinstance(number, int) for number in (*stride, *padding, *dilation)):
        return "stride, padding and dilation must be constants"
    return None


def _prepack(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
) -> Tensor:
    shape = [int(n) for n in weight.shape]
    convolution = _convolution(input, offset, shape, (stride, padding, dilation))
    kind, packed = pack(convolution, weight)
    return _prepacked(input, offset, packed, bias, stride, padding, dilation, mask, shape, kind)


def pack(convolution: Convolution, weight: Tensor) -> tuple[str, Tensor]:
    """The DeformKernel (cpp/deform_conv2d.h) for the weight [O, Cg, kH, kW], and the weight in the order it wants."""
    groups, taps = convolution.groups, convolution.taps
    inputs, outputs = convolution.channels // groups, convolution.out_channels // groups
    dtype = accumulate_dtype(convolution.dtype)
    if convolution.depthwise and groups > 1 and weight.stride(0) == 0:
        return "shared", weight[0].to(dtype).reshape(taps).clone()
    if convolution.depthwise:
        return "depthwise", weight.to(dtype).reshape(groups, taps).t().contiguous()  # [K, C]

    lanes = PANEL_BYTES // dtype.itemsize
    panels = -(-outputs // lanes)
    weight = weight.reshape(groups, outputs, inputs, taps)
    weight = torch.constant_pad_nd(weight, [0, 0, 0, 0, 0, panels * lanes - outputs])
    if convolution.dtype == torch.bfloat16 and inputs % 2 == 0 and bf16_dot_products():
        weight = weight.reshape(groups, panels, lanes, inputs // 2, 2, taps)
        return "gemm", weight.permute(0, 1, 5, 3, 2, 4).contiguous()  # [G, panels, K, Cg / 2, lanes, 2]
    weight = weight.to(dtype).reshape(groups, panels, lanes, inputs, taps)
    return "gemm", weight.permute(0, 1, 4, 3, 2).contiguous()  # [G, panels, K, Cg, lanes]


def _fake_prepacked(
    input: Tensor,
    offset: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
    weight_shape: Sequence[int],
    kind: str,
) -> Tensor:
    out = input.new_empty(input.shape[0], weight_shape[0], *offset.shape[2:])
    return out.contiguous(memory_format=suggest_memory_format(input))


def _lower(
    input: ir.TensorBox,
    offset: ir.TensorBox,
    packed: ir.TensorBox,
    bias: ir.TensorBox | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: ir.TensorBox | None,
    weight_shape: Sequence[int],
    kind: str,
) -> ir.TensorBox:
    node = V.graph.current_node
    fake_input, fake_offset = (arg.meta["val"] for arg in node.args[:2])
    convolution = _convolution(fake_input, fake_offset, weight_shape, (stride, padding, dilation))
    image, channels_last = _image(input, node)
    weight = ir.ExternKernel.require_contiguous(fold_constant(node.args[2], packed))
    size = ir.convert_shape_to_inductor(node.meta["val"].shape)
    blocking = default_blocking(convolution)
    if config.max_autotune:
        hints = V.graph.sizevars.optimization_hints(size)
        blocking = tuned_blocking(convolution, kind, weight, image, hints, channels_last)
    realize = ir.ExternKernel.realize_input
    return DeformConv2dTemplate(
        convolution,
        blocking,
        kind,
        image,
        realize(offset),
        realize(weight),
        mask=None if mask is None else realize(mask),
        bias=None if bias is None else ir.ExternKernel.require_contiguous(realize(bias)),
        size=size,
        channels_last=channels_last,
    ).output()


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


class DeformConv2dTemplate(RowsTemplate):
    """See cpp/deform_conv2d.h."""

    op = "deform_conv2d"
    header = "deform_conv2d.h"

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
    memory = "channels_last" if channels_last else "contiguous"
    problem = (
        f"deform_conv2d {convolution}, {kind} {weight.get_dtype()}, "
        f"{list(image_size)} with strides {list(strides)} to {memory}"
    )

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
    extent = 1 + sum((n - 1) * stride for n, stride in zip(image_size, image_strides))
    tensors = [
        torch.randn(extent, dtype=dtype).as_strided(image_size, image_strides),
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


_prepacked = define_internal_op(
    "deform_conv2d_prepacked(Tensor input, Tensor offset, Tensor packed, Tensor? bias, int[2] stride, int[2] padding, "
    "int[2] dilation, Tensor? mask, int[4] weight_shape, str kind) -> Tensor",
    fake=_fake_prepacked,
    lower=_lower,
)
template_for("deform_conv2d", Template(_refusal, prepack=_prepack))
