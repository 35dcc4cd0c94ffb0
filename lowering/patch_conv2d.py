"""patch_conv2d as one C++ kernel, and its gradients as two: see cpp/patch_conv2d.h, patch_conv2d_backward.h."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.patch_conv2d import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    PATCHES_FIRST,
    Arguments,
    arranged,
    check_arguments,
    empty_patches,
    memory_order,
)
from ..ops.registry import OPS
from .common.constants import fold_constant
from .common.geometry import by_axis, constant_geometry
from .common.internal_op import define_internal_op
from .common.machine import cache_bytes
from .common.panels import pack_panels, unpack_panels
from .common.registry import Template, template_for
from .common.template import (
    BlocksTemplate,
    ResultsTemplate,
    in_cpp,
    members,
    pointer,
    size_in_cpp,
    sizes,
    strides,
    struct,
)
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, V, ir, lowerings

_ORDERS: dict[tuple[int, ...], str] = {
    PATCHES_FIRST: "patches_first",
    CHANNELS_FIRST: "channels_first",
    CHANNELS_LAST: "channels_last",
}


@dataclasses.dataclass(frozen=True)
class PatchConvolution:
    """What is known of a convolution when it is compiled: all but the number and size of patches."""

    out_channels: int
    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    SCHEMA = "int out_channels, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, int groups"

    @property
    def geometry(self) -> tuple[Sequence[int], ...]:
        """Stride, padding and dilation, as the operator takes them."""
        return self.stride, self.padding, self.dilation

    @property
    def arguments(self) -> list[Any]:
        """The arguments that tell internal operators all of this."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def declare(
        self, kernel: CppTemplateKernel, input: ir.IRNode, bias: ir.IRNode | None, out_size: Sequence[str]
    ) -> str:
        """C++ that defines `op` and `blocking`; ``out_size`` is height and width."""
        op = struct(
            "PatchConv2d",
            DTYPE_TO_CPP[input.get_dtype()],
            input=_view(kernel, input),
            bias=pointer(kernel, bias),
            **sizes(kernel, input, "batch", "patches", "channels", "height", "width"),
            out_channels=self.out_channels,
            **by_axis(
                out=out_size, kernel=self.kernel, stride=self.stride, padding=self.padding, dilation=self.dilation
            ),
            groups=self.groups,
        )
        return f"""
    const auto op = {op};
    const auto blocking = {struct("PatchBlocking", group_bytes=cache_bytes() // 2)};"""


def _view(kernel: CppTemplateKernel, node: ir.IRNode) -> str:
    """A tensor of five dimensions as a PatchView."""
    return members(data=pointer(kernel, node), **strides(kernel, node, "image", "patch", "channel", "row", "column"))


def _convolution(call: Arguments) -> PatchConvolution:
    out_channels, _, *kernel = map(int, call.weight.shape)
    return PatchConvolution(out_channels, kernel, call.stride, call.padding, call.dilation, call.groups)


def _refusal(*args: Any) -> str | None:
    call = Arguments(*args)
    if refused := constant_geometry(call.stride, call.padding, call.dilation):
        return refused
    depthwise = call.groups == int(call.input.shape[2]) == int(call.weight.shape[0]) > 1
    if depthwise and call.input.dtype == torch.float32:
        return (
            "a depthwise convolution has one output for each input channel, but the kernel computes 16 together; "
            "aten's convolution of the batch is faster"
        )
    return None


def _refusal_backward(grad: Tensor, *args: Any) -> str | None:
    return _refusal(*args[:-1])


def _by_groups(call: Arguments) -> Tensor:
    """The weight as ``[G, Og, Cg, K]``."""
    return call.weight.reshape(call.groups, -1, call.weight.shape[1], call.weight.shape[2] * call.weight.shape[3])


def _prepack(*args: Any) -> Tensor:
    call = Arguments(*args)
    convolution, out_size, order = _convolution(call), check_arguments(call), memory_order(call.input)
    packed = pack_panels(_by_groups(call))
    return _prepacked(call.input, packed, call.bias, *convolution.arguments, out_size, order, False)


def _prepack_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call, wanted = Arguments(*args[:-1]), args[-1]
    convolution, empty = _convolution(call), call.input.new_empty(0)
    grad_input, grad_weight, grad_bias = empty, empty.clone(), empty.clone()
    if wanted[0]:
        packed = pack_panels(_by_groups(call).transpose(1, 2))
        of_input = dataclasses.replace(convolution, out_channels=int(call.input.shape[2]))
        size, order = call.input.shape[3:], memory_order(call.input)
        grad_input = _prepacked(grad, packed, None, *of_input.arguments, size, order, True)
    wanted_bias = wanted[2] and call.bias is not None
    if wanted[1] or wanted_bias:
        grad_weight, grad_bias = _sums(grad, call.input, *convolution.arguments, wanted[1], wanted_bias)
    return grad_input, grad_weight, grad_bias


def _prepacked_body(input: Tensor, packed: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    convolution, (out_size, order, transposed) = PatchConvolution(*args[:-3]), args[-3:]
    weight = unpack_panels(packed, convolution.out_channels // convolution.groups)  # [G, Og, Cg, K]
    if transposed:
        weight = weight.transpose(1, 2)
    weight = weight.flatten(0, 1).unflatten(2, tuple(convolution.kernel)).to(input.dtype)
    if transposed:
        of_input = empty_patches(input, convolution.out_channels, out_size)  # its values do not matter
        gradient_of = Arguments(of_input, weight, None, *convolution.geometry)
        out, *_ = OPS["patch_conv2d_backward"].decomposition(input, *gradient_of, [True, False, False])
    else:
        out = OPS["patch_conv2d"].decomposition(input, weight, bias, *convolution.geometry)
    return arranged(out, order)


def _fake_prepacked(input: Tensor, packed: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    out_channels, out_size, order = args[0], args[-3], args[-2]
    return empty_patches(input, out_channels, out_size, order)


def _lower(input: ir.TensorBox, packed: ir.TensorBox, bias: ir.TensorBox | None, *args: Any) -> ir.TensorBox:
    *geometry, _, order, transposed = args
    node, realize = V.graph.current_node, ir.ExternKernel.realize_input
    size = ir.convert_shape_to_inductor(node.meta["val"].shape)
    return PatchConv2dTemplate(
        PatchConvolution(*geometry),
        tuple(order),
        transposed,
        realize(input),
        realize(ir.ExternKernel.require_contiguous(fold_constant(node.args[1], packed))),
        None if bias is None else ir.ExternKernel.require_contiguous(realize(bias)),
        size,
    ).patches()


class PatchConv2dTemplate(BlocksTemplate):
    """See cpp/patch_conv2d.h."""

    op = "patch_conv2d"
    header = "patch_conv2d.h"

    def __init__(
        self,
        convolution: PatchConvolution,
        order: tuple[int, ...],
        transposed: bool,
        input: ir.IRNode,
        weight: ir.IRNode,
        bias: ir.IRNode | None,
        size: Sequence[Any],
    ) -> None:
        """
        Args:
            order: of the result's dimensions in memory.
            transposed: whether it is the gradient of the input of a convolution that is computed.
            size: of the result, [B, N, O, Ho, Wo].
        """
        batch, patches, channels, height, width = size
        # All pixels of a patch, or of the patches of an image, are one row: rows of 4 are short for vectors.
        if order == CHANNELS_FIRST:
            rows = [batch, channels, 1, patches * height * width]
        else:
            rows = [batch * patches, channels, 1, height * width]
        inputs = [input, weight, *([] if bias is None else [bias])]
        super().__init__(inputs, input.get_dtype(), rows, channels_last=order == CHANNELS_LAST)
        if transposed:
            self.op = "patch_conv2d_backward"
        self.convolution = convolution
        self.order = order
        self.transposed = transposed
        self.patch_size = list(size)

    @property
    def path(self) -> str:
        kind = "gradient of the input, " if self.transposed else ""
        return f"{kind}{_ORDERS[self.order]}, fused"

    def patches(self) -> ir.TensorBox:
        """Add the kernel to the graph; its result, ``[B, N, O, Ho, Wo]``."""
        view, permute = (lowerings[op] for op in (torch.ops.aten.view.default, torch.ops.aten.permute.default))
        rows = self.output()
        if self.channels_last:
            rows = permute(rows, [0, 2, 3, 1])
        return permute(view(rows, [self.patch_size[d] for d in self.order]), [self.order.index(d) for d in range(5)])

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        input, weight, *bias = inputs
        out_size = size_in_cpp(kernel, self.patch_size[3:])
        arguments = f"inductor_vision::PatchOrder::{_ORDERS[self.order]}, {in_cpp(self.transposed)}"
        return f"""
    {self.convolution.declare(kernel, input, bias[0] if bias else None, out_size)}
    const auto store = {store};
    inductor_vision::patch_conv2d<{arguments}>(op, {pointer(kernel, weight)}, blocking, store);"""


def _sums_body(grad: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    convolution, wanted = PatchConvolution(*args[:-2]), args[-2:]
    group_channels = int(input.shape[2]) // convolution.groups
    weight = input.new_empty(convolution.out_channels, group_channels, *convolution.kernel)  # values do not matter
    gradients_of = Arguments(input, weight, weight[:, 0, 0, 0], *convolution.geometry)
    _, *gradients = OPS["patch_conv2d_backward"].decomposition(grad, *gradients_of, [False, *wanted])
    return tuple(gradients)


def _fake_sums(grad: Tensor, input: Tensor, out_channels: int, kernel: Sequence[int], *args: Any) -> tuple[Tensor, ...]:
    groups, weight, bias = args[-3:]
    size = [out_channels, int(input.shape[2]) // groups, *kernel]
    return input.new_empty(size if weight else [0]), input.new_empty([out_channels] if bias else [0])


def _lower_sums(grad: ir.TensorBox, input: ir.TensorBox, *args: Any) -> list[ir.TensorBox]:
    *geometry, weight, bias = args
    realize = ir.ExternKernel.realize_input
    return PatchSumsTemplate(PatchConvolution(*geometry), realize(grad), realize(input), [weight, bias]).results()


class PatchSumsTemplate(ResultsTemplate):
    """The gradients of weight and bias, see cpp/patch_conv2d_backward.h."""

    op = "patch_conv2d_backward"
    header = "patch_conv2d_backward.h"
    names = ("grad_weight", "grad_bias")

    def __init__(
        self, convolution: PatchConvolution, grad: ir.IRNode, input: ir.IRNode, wanted: Sequence[bool]
    ) -> None:
        super().__init__([grad, input], wanted)
        self.convolution = convolution

    def call(
        self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], results: dict[str, ir.Buffer]
    ) -> Sequence[str]:
        grad, input = inputs
        gradients = struct(
            "PatchGradients",
            DTYPE_TO_CPP[input.get_dtype()],
            output=_view(kernel, grad),
            weight=pointer(kernel, results.get("grad_weight")),
            bias=pointer(kernel, results.get("grad_bias")),
        )
        return [
            self.convolution.declare(kernel, input, None, [kernel.size(grad, d) for d in (3, 4)]),
            f"const auto gradients = {gradients};",
            "inductor_vision::patch_conv2d_backward(op, gradients, blocking);",
        ]


_prepacked = define_internal_op(
    f"patch_conv2d_prepacked(Tensor input, Tensor packed, Tensor? bias, {PatchConvolution.SCHEMA}, SymInt[2] out_size, "
    "int[5] order, bool transposed) -> Tensor",
    body=_prepacked_body,
    fake=_fake_prepacked,
    lower=_lower,
)
_sums = define_internal_op(
    f"patch_conv2d_sums(Tensor grad, Tensor input, {PatchConvolution.SCHEMA}, bool weight, bool bias) "
    "-> (Tensor, Tensor)",
    body=_sums_body,
    fake=_fake_sums,
    lower=_lower_sums,
)
template_for("patch_conv2d", Template(_refusal, prepack=_prepack))
template_for("patch_conv2d_backward", Template(_refusal_backward, prepack=_prepack_backward))
