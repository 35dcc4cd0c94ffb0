"""deform_conv2d as one C++ kernel, and its gradients as another: see cpp/deform_conv2d.h, deform_conv2d_backward.h."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.convolution import empty_output
from ..ops.deform_conv2d import Arguments
from ..ops.registry import GRADIENTS, OPS, accumulate_dtype
from .common.constants import fold_constant
from .common.geometry import by_axis, constant_geometry
from .common.internal_op import define_internal_op
from .common.layout import image_and_format, realize_image
from .common.machine import cache_bytes, level
from .common.panels import MAX_DEPTH, PANEL_BYTES, bf16_dot_products, pack_panels, unpack_panels
from .common.registry import Template, template_for
from .common.template import BlocksTemplate, ResultsTemplate, members, pointer, splice_header, struct, view
from .common.tuning import fastest
from .inductor.codegen import (
    DTYPE_TO_CPP,
    CppCodeCache,
    CppTemplateKernel,
    V,
    config,
    ir,
)


@dataclasses.dataclass(frozen=True)
class DeformableConvolution:
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

    def declare(self, size: Sequence[Any], out_size: Sequence[Any], **tensors: str) -> str:
        """C++ that defines `op`.

        Args:
            size: of the image, [B, C, H, W].
            out_size: height and width.
            tensors: input, offset and mask as View4d, bias as a pointer.
        """
        op = struct(
            "DeformConv2d",
            DTYPE_TO_CPP[self.dtype],
            **tensors,
            **dict(zip(("batch", "channels", "height", "width"), size)),
            out_channels=self.out_channels,
            **by_axis(
                out=out_size, kernel=self.kernel, stride=self.stride, padding=self.padding, dilation=self.dilation
            ),
            groups=self.groups,
            offset_groups=self.offset_groups,
        )
        return f"const auto op = {op};"


@dataclasses.dataclass(frozen=True)
class Blocking:
    """DeformBlocking in cpp/deform_conv2d.h."""

    pixels: int
    depth: int
    transposed_bytes: int


@dataclasses.dataclass(frozen=True)
class BackwardBlocking:
    """DeformBackwardBlocking in cpp/deform_conv2d_backward.h."""

    pixels: int
    phase_bytes: int
    image_bytes: int


def default_blocking(convolution: DeformableConvolution) -> Blocking:
    """A tile whose samples and sums take half of the second-level cache, and so do images that are transposed."""
    half = cache_bytes() // 2
    itemsize = accumulate_dtype(convolution.dtype).itemsize
    sums = 2 * convolution.out_channels * itemsize  # and their transposition
    if convolution.depthwise:
        samples, most = convolution.taps * (4 * 8 + 5 * itemsize), 32  # DeformSamples, of one pixel
    else:
        samples, most = MAX_DEPTH * itemsize, 96
    return Blocking(max(12, min(most, half // (samples + sums))), MAX_DEPTH, transposed_bytes=half)


def default_backward_blocking(convolution: DeformableConvolution, kind: str) -> BackwardBlocking:
    """A tile whose samples and gradients take half of the second-level cache; the rest is for weights and images."""
    outputs = convolution.out_channels // convolution.groups
    if kind == "gemm":  # bytes of a pixel: its samples, their gradients, that of the output
        pixel = 2 * convolution.taps * PANEL_BYTES + outputs * accumulate_dtype(convolution.dtype).itemsize
    else:  # the gradient of the output, for each lane
        pixel = outputs * PANEL_BYTES
    pixels = cache_bytes() // 2 // pixel
    return BackwardBlocking(max(12, min(MAX_DEPTH, pixels)), phase_bytes=4 << 20, image_bytes=8 << 20)


def _convolution(call: Arguments, weight_shape: Sequence[int]) -> DeformableConvolution:
    out_channels, group_channels, *kernel = weight_shape
    channels = int(call.input.shape[1])
    return DeformableConvolution(
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
    return constant_geometry(call.stride, call.padding, call.dilation)


def _refusal_backward(grad: Tensor, *args: Any) -> str | None:
    return _refusal(*args[:-1])


def _prepack(*args: Any) -> Tensor:
    call = Arguments(*args)
    shape = [int(n) for n in call.weight.shape]
    kind, packed = pack(_convolution(call, shape), call.weight)
    return _prepacked(*call._replace(weight=packed), shape, kind)


def pack(convolution: DeformableConvolution, weight: Tensor) -> tuple[str, Tensor]:
    """The DeformKernel (cpp/deform_conv2d.h) for the weight [O, Cg, kH, kW], and the weight in the order it wants."""
    groups, taps = convolution.groups, convolution.taps
    inputs, outputs = convolution.channels // groups, convolution.out_channels // groups
    dtype = accumulate_dtype(convolution.dtype)
    if convolution.depthwise and groups > 1 and weight.stride(0) == 0:
        return "shared", weight[0].to(dtype).reshape(taps).clone()
    if convolution.depthwise:
        return "depthwise", weight.to(dtype).reshape(groups, taps).t().contiguous()  # [K, C]

    weight = weight.reshape(groups, outputs, inputs, taps)
    pairs = convolution.dtype == torch.bfloat16 and inputs % 2 == 0 and bf16_dot_products()
    return "gemm", pack_panels(weight, pairs)


def unpack(kind: str, packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight of this shape that :func:`pack` packed."""
    out_channels, _, *kernel = shape
    if kind == "shared":
        return packed.reshape(1, 1, *kernel).expand(shape)
    if kind == "depthwise":
        return packed.t().reshape(shape)
    return unpack_panels(packed, out_channels // int(packed.shape[0])).reshape(shape)


def _prepacked_body(*args: Any) -> Tensor:
    call, (shape, kind) = Arguments(*args[:-2]), args[-2:]
    weight = unpack(kind, call.weight, shape).to(call.input.dtype)
    return OPS["deform_conv2d"].decomposition(*call._replace(weight=weight))


def _fake_prepacked(*args: Any) -> Tensor:
    call, (out_channels, *_) = Arguments(*args[:-2]), args[-2]
    return empty_output(call.input, out_channels, call.offset.shape[2:])


def _lower(*args: Any) -> ir.TensorBox:
    call, (weight_shape, kind) = Arguments(*args[:-2]), args[-2:]  # of Inductor IR; `weight` is packed
    node = V.graph.current_node
    fake = Arguments(*torch.fx.map_arg(node.args[:-2], lambda argument: argument.meta["val"]))
    convolution = _convolution(fake, weight_shape)
    image, channels_last = image_and_format(call.input, node)
    instance = Instance(convolution, kind, channels_last)
    weight = ir.ExternKernel.require_contiguous(fold_constant(node.args[2], call.weight))
    size = ir.convert_shape_to_inductor(node.meta["val"].shape)
    blocking = default_blocking(convolution)
    if config.max_autotune and level() is None:  # what is measured here says nothing of other machines
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


def _lower_backward(grad: ir.TensorBox, *args: Any) -> list[ir.TensorBox]:
    call = Arguments(*args[:-1])
    fake = Arguments(*torch.fx.map_arg(V.graph.current_node.args[1:-1], lambda argument: argument.meta["val"]))
    realize = ir.ExternKernel.realize_input
    return DeformConv2dBackwardTemplate(
        _convolution(fake, fake.weight.shape),
        realize(grad),
        realize_image(call.input),
        realize(call.offset),
        realize(call.weight),
        None if call.mask is None else realize(call.mask),
        GRADIENTS["deform_conv2d"].wanted(grad, *args),
    ).results()


@dataclasses.dataclass(frozen=True)
class Instance:
    """An instance of the C++ function template."""

    convolution: DeformableConvolution
    kind: str  # a DeformKernel
    channels_last: bool  # the memory format of the result

    def statement(self, weight: str) -> str:
        """C++ that runs it, where `op`, `blocking` and `store` are defined; ``weight`` is a pointer."""
        channels_last = str(self.channels_last).lower()
        kind = f"inductor_vision::DeformKernel::{self.kind}"
        return f"inductor_vision::deform_conv2d<{channels_last}, {kind}>(op, {weight}, blocking, store);"


def _view(kernel: CppTemplateKernel, node: ir.IRNode | None) -> str:
    return members(data="nullptr") if node is None else view(kernel, node)


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

        return f"""
    {_operation(kernel, self.instance.convolution, image, offset, mask, bias)}
    const auto blocking = {struct("DeformBlocking", **dataclasses.asdict(self.blocking))};
    const auto store = {store};
    {self.instance.statement(pointer(kernel, weight))}"""


class DeformConv2dBackwardTemplate(ResultsTemplate):
    """See cpp/deform_conv2d_backward.h."""

    op = "deform_conv2d_backward"
    header = "deform_conv2d_backward.h"
    names = ("grad_input", "grad_offset", "grad_weight", "grad_bias", "grad_mask")  # DeformGradient

    def __init__(
        self,
        convolution: DeformableConvolution,
        grad: ir.IRNode,
        image: ir.IRNode,
        offset: ir.IRNode,
        weight: ir.IRNode,
        mask: ir.IRNode | None,
        wanted: Sequence[bool],
    ) -> None:
        super().__init__([grad, image, offset, weight, *([] if mask is None else [mask])], wanted)
        self.convolution = convolution
        # Where a group has fewer channels than a panel of the matrix product, and there are several.
        panel = PANEL_BYTES // accumulate_dtype(convolution.dtype).itemsize
        vectors = convolution.groups > 1 and convolution.channels // convolution.groups < panel
        self.kind = "depthwise" if vectors else "gemm"
        self.blocking = default_backward_blocking(convolution, self.kind)

    @property
    def path(self) -> str:
        kind = "GEMM" if self.kind == "gemm" else "vector"
        return f"{kind} kernel, {super().path}, {self.blocking}"

    def call(
        self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], results: dict[str, ir.Buffer]
    ) -> Sequence[str]:
        grad, image, offset, weight, *masks = inputs
        gradients = struct(
            "DeformGradients",
            DTYPE_TO_CPP[self.convolution.dtype],
            output=view(kernel, grad),
            weight=view(kernel, weight),
            input=_view(kernel, results.get("grad_input")),
            offset=_view(kernel, results.get("grad_offset")),
            grad_weight=_view(kernel, results.get("grad_weight")),
            bias=pointer(kernel, results.get("grad_bias")),
            mask=_view(kernel, results.get("grad_mask")),
        )
        wanted = " | ".join(f"inductor_vision::k{name.title().replace('_', '')}" for name in results)
        return [
            _operation(kernel, self.convolution, image, offset, masks[0] if masks else None, None),
            f"const auto gradients = {gradients};",
            f"const auto blocking = {struct('DeformBackwardBlocking', **dataclasses.asdict(self.blocking))};",
            f"inductor_vision::deform_conv2d_backward<inductor_vision::DeformKernel::{self.kind}, {wanted}>(",
            "    op, gradients, blocking);",
        ]


def _operation(
    kernel: CppTemplateKernel,
    convolution: DeformableConvolution,
    image: ir.IRNode,
    offset: ir.IRNode,
    mask: ir.IRNode | None,
    bias: ir.IRNode | None,
) -> str:
    size, out_size = ([kernel.size(node, d) for d in range(4)] for node in (image, offset))
    return convolution.declare(
        size,
        out_size[2:],
        input=view(kernel, image),
        offset=view(kernel, offset),
        mask=_view(kernel, mask),
        bias=pointer(kernel, bias),
    )


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
        return members(data=name, **dict(zip(("image", "channel", "row", "column"), tensor.stride())))

    tensors = {name: view(name, tensor) for name, tensor in (("input", image), ("offset", offset), ("mask", mask))}
    blocking = struct("DeformBlocking", **{field.name: field.name for field in dataclasses.fields(Blocking)})
    outer, inner = ("block.columns", out_channels) if instance.channels_last else (out_channels, "block.columns")
    source = f"""
#include <torch/csrc/inductor/cpp_prefix.h>
{splice_header(DeformConv2dTemplate.header)}
extern "C" void run(const {scalar}* input, const {scalar}* offset, const {scalar}* mask,
    const {DTYPE_TO_CPP[weight.dtype]}* weight, {scalar}* out,
    int64_t pixels, int64_t depth, int64_t transposed_bytes) {{
    const auto blocking = {blocking};
    const auto store = [&](const inductor_vision::OutputBlock& block, const auto* sums, int64_t distance) {{
        {scalar}* to = out + ((block.image * {height} + block.row) * {width} + block.column) * {out_channels};
        inductor_vision::store_block(sums, distance, to, {inner}, {outer}, {inner});
    }};
    {instance.convolution.declare(size, (height, width), **tensors, bias="nullptr")}
    {instance.statement("weight")}
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
    body=_prepacked_body,
    fake=_fake_prepacked,
    lower=_lower,
)
template_for("deform_conv2d", Template(_refusal, prepack=_prepack))
template_for("deform_conv2d_backward", Template(_refusal_backward, _lower_backward))
