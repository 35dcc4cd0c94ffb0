"""deform_conv2d as one C++ kernel: see cpp/deform_conv2d.h."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.deform_conv2d import Arguments, empty_output
from ..ops.registry import accumulate_dtype
from .constants import fold_constant
from .inductor import DTYPE_TO_CPP, CppCodeCache, CppTemplateKernel, V, config, ir, pick_vec_isa, valid_vec_isa_list
from .layout import channels_last_strides, layout_is_free, realize_image, writes_channels_last
from .registry import Template, define_internal_op, template_for
from .template import BlocksTemplate, splice_header
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
    # The flags of the set that is picked may leave them out beside others, but g++ compiles for all that the CPU has
    # (-march=native); a valid set that has them says that CPU and compiler do.
    known = any("avx512bf16" in valid.build_arch_flags() for valid in valid_vec_isa_list())
    return bool(isa) and isa.bit_width() == 512 and known


def _convolution(call: Arguments, weight_shape: Sequence[int]) -> Convolution:
    out_channels, group_channels, *kernel = weight_shape
    channels = int(call.input.shape[1])
    return Convolution(
        channels=channels,
        out_channels=out_channels,
        kernel=tuple(kernel),
        stride=tuple(call.stride),
        padding=tuple(call.padding),
        dilation=tuple(call.dilation),
        groups=channels // group_channels,
        offset_groups=int(call.offset.shape[1]) // (2 * kernel[0] * kernel[1]),
        dtype=call.input.dtype,
    )


def _refusal(*args: Any) -> str | None:
    call = Arguments(*args)
    if not all(isinstance(number, int) for number in (*call.stride, *call.padding, *call.dilation)):
        return "stride, padding and dilation must be constants"
    return None


def _prepack(*args: Any) -> Tensor:
    call = Arguments(*args)
    shape = [int(n) for n in call.weight.shape]
    kind, packed = pack(_convolution(call, shape), call.weight)
    return _prepacked(*call._replace(weight=packed), shape, kind)


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


def _fake_prepacked(*args: Any) -> Tensor:
    call, (out_channels, *_) = Arguments(*args[:-2]), args[-2]
    return empty_output(call.input, out_channels, call.offset.shape[2:])


def _lower(*args: Any) -> ir.TensorBox:
    call, (weight_shape, kind) = Arguments(*args[:-2]), args[-2:]  # of Inductor IR; `weight` is packed
    node = V.graph.current_node
    fake = Arguments(*torch.fx.map_arg(node.args[:-2], lambda argument: argument.meta["val"]))
    convolution = _convolution(fake, weight_shape)
    image, channels_last = _layouts(call.input, node)
    instance = Instance(convolution, kind, channels_last)
    weight = ir.ExternKernel.require_contiguous(fold_constant(node.args[2], call.weight))
    size = ir.convert_shape_to_inductor(node.meta["val"].shape)
    blocking = default_blocking(convolution)
    if config.max_autotune:
        blocking = tuned_blocking(instance, weight, image, V.graph.sizevars.optimization_hints(size))
    realize = ir.ExternKernel.realize_input
    return DeformConv2dTemplate(
        instance,
        blocking,
        image,
        realize(call.offset),
        realize(weight),
        mask=None if call.mask is None else realize(call.mask),
        bias=None if call.bias is None else ir.ExternKernel.require_contiguous(realize(call.bias)),
        size=size,
    ).output()


def _layouts(input: ir.TensorBox, node: torch.fx.Node) -> tuple[ir.IRNode, bool]:
    """The input, realized, and whether to write channels_last.

    If the input is channels_last by others' choice, so is the result: nothing is transposed in a network that Inductor
    lays out so.
    """
    chosen = not layout_is_free(input)
    image = realize_image(input)
    by_others = chosen and channels_last_strides(image.get_layout().stride, image.get_size())
    return image, by_others or writes_channels_last(node)


@dataclasses.dataclass(frozen=True)
class Instance:
    """An instance of the C++ function template."""

    convolution: Convolution
    kind: str  # a DeformKernel
    channels_last: bool  # the memory format of the result

    def statement(self, tensors: Sequence[str], weight: str, size: Sequence[Any], out_size: Sequence[Any]) -> str:
        """C++ that runs it, where `blocking` and `store` are defined.

        Args:
            tensors: image, offset and mask as View4d, bias as a pointer.
            weight: a pointer.
            size: of the image, [B, C, H, W].
            out_size: height and width.
        """
        c = self.convolution
        pairs = [*c.kernel, *c.stride, *c.padding, *c.dilation]
        fields = [*tensors, *size, c.out_channels, *out_size, *pairs, c.groups, c.offset_groups]
        return f"""
    const inductor_vision::DeformConv2d<{DTYPE_TO_CPP[c.dtype]}> op{{{", ".join(map(str, fields))}}};
    inductor_vision::deform_conv2d<{str(self.channels_last).lower()}, inductor_vision::DeformKernel::{self.kind}>(
        op, {weight}, blocking, store);"""


class DeformConv2dTemplate(BlocksTemplate):
    """See cpp/deform_conv2d.h."""

    op = "deform_conv2d"
    header = "deform_conv2d.h"

    def __init__(
        self,
        instance: Instance,
        blocking: Blocking,
        image: ir.IRNode,
        offset: ir.IRNode,
        weight: ir.IRNode,
        *,
        mask: ir.IRNode | None,
        bias: ir.IRNode | None,
        size: Sequence[Any],
    ) -> None:
        optional = [t for t in (mask, bias) if t is not None]
        super().__init__([image, offset, weight, *optional], instance.convolution.dtype, size, instance.channels_last)
        self.instance = instance
        self.blocking = blocking
        self.has_mask, self.has_bias = mask is not None, bias is not None

    @property
    def path(self) -> str:
        precision = "bf16 dot products" if self.inputs[2].get_dtype() == torch.bfloat16 else "fused"
        kind = "GEMM" if self.instance.kind == "gemm" else self.instance.kind
        return f"{kind} kernel, {precision}, {self.blocking}"

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

        tensors = [view(image), view(offset), view(mask), pointer(bias)]
        run = self.instance.statement(tensors, pointer(weight), size(image), size(offset)[2:])
        blocking = ", ".join(map(str, dataclasses.astuple(self.blocking)))
        return f"const inductor_vision::DeformBlocking blocking{{{blocking}}};\nconst auto store = {store};\n{run}"


def tuned_blocking(instance: Instance, weight: ir.IRNode, image: ir.IRNode, out_size: Sequence[int]) -> Blocking:
    """The blocking that runs fastest on random data; ``out_size`` is [B, O, Ho, Wo], with hints for what is dynamic."""
    hints = V.graph.sizevars.optimization_hints
    size, strides = hints(image.get_size()), hints(image.get_layout().stride)
    default = default_blocking(instance.convolution)
    choices = [
        Blocking(pixels, depth, default.transposed_bytes)
        for pixels in (12, 24, 48, 96, 192)
        for depth in ((default.depth,) if instance.convolution.depthwise else (128, 192, MAX_DEPTH))
    ]
    problem = f"deform_conv2d {instance}, weight {weight.get_dtype()}, {list(size)} with strides {list(strides)}"

    def prepare() -> Callable[[Blocking], None]:
        packed = torch.zeros(hints(weight.get_size()), dtype=weight.get_dtype())
        return compile_runner(instance, packed, size, strides, out_size)

    return fastest(problem, choices, prepare)


def compile_runner(
    instance: Instance, weight: Tensor, size: Sequence[int], strides: Sequence[int], out_size: Sequence[int]
) -> Callable[[Blocking], None]:
    """The kernel, compiled by itself on a random image of this size, as a function of its blocking."""
    dtype, scalar = instance.convolution.dtype, DTYPE_TO_CPP[instance.convolution.dtype]
    batch, out_channels, height, width = out_size
    taps = instance.convolution.offset_groups * instance.convolution.taps
    extent = 1 + sum((n - 1) * stride for n, stride in zip(size, strides))
    image = torch.randn(extent, dtype=dtype).as_strided(size, strides)
    offset = torch.randn(batch, 2 * taps, height, width, dtype=dtype)
    mask = torch.rand(batch, taps, height, width, dtype=dtype)
    out = torch.empty(out_size, dtype=dtype)

    def view(name: str, tensor: Tensor) -> str:
        return f"{{{name}, {', '.join(map(str, tensor.stride()))}}}"

    tensors = [view("image", image), view("offset", offset), view("mask", mask), "nullptr"]
    outer, inner = ("block.columns", out_channels) if instance.channels_last else (out_channels, "block.columns")
    source = f"""
#include <torch/csrc/inductor/cpp_prefix.h>
{splice_header(DeformConv2dTemplate.header)}
extern "C" void run(const {scalar}* image, const {scalar}* offset, const {scalar}* mask,
    const {DTYPE_TO_CPP[weight.dtype]}* weight, {scalar}* out,
    int64_t pixels, int64_t depth, int64_t transposed_bytes) {{
    const inductor_vision::DeformBlocking blocking{{pixels, depth, transposed_bytes}};
    const auto store = [&](const inductor_vision::OutputBlock& block, const auto* sums, int64_t distance) {{
        {scalar}* to = out + ((block.image * {height} + block.row) * {width} + block.column) * {out_channels};
        inductor_vision::store_block(sums, distance, to, {inner}, {outer}, {inner});
    }};
    {instance.statement(tensors, "weight", size, (height, width))}
}}
"""
    library = CppCodeCache.load(source)

    def run_once(blocking: Blocking) -> None:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (image, offset, mask, weight, out)]
        library.run(*pointers, *map(ctypes.c_int64, dataclasses.astuple(blocking)))

    return run_once


_prepacked = define_internal_op(
    "deform_conv2d_prepacked(Tensor input, Tensor offset, Tensor packed, Tensor? bias, int[2] stride, int[2] padding, "
    "int[2] dilation, Tensor? mask, int[4] weight_shape, str kind) -> Tensor",
    fake=_fake_prepacked,
    lower=_lower,
)
template_for("deform_conv2d", Template(_refusal, prepack=_prepack))
