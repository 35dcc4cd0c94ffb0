"""winograd_conv2d as one C++ kernel, and the gradient of its input as another call of it: see cpp/winograd_conv2d.h.

The transformed weight is four times as large as the weight. It is made once, when a graph is compiled, if the weight is
a constant and the map is small. For a large map it is made in each call, which costs little there, and a package does
not grow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..ops.registry import GRADIENTS, accumulate_dtype
from ..ops.winograd_conv2d import (
    KERNEL,
    Arguments,
    check_arguments,
    convolve,
    gradient_padding,
    rotated,
    sums,
    transform_weight,
)
from .common.constants import fold_constant, may_grow
from .common.geometry import by_axis, constant_geometry
from .common.internal_op import define_internal_op
from .common.layout import image_and_format
from .common.machine import cache_bytes
from .common.panels import MAX_DEPTH, PANEL_BYTES, pack_panels, unpack_panels
from .common.registry import Template, template_for
from .common.template import BlocksTemplate, KernelTemplate, in_cpp, pointer, sizes, struct, view
from .common.winograd import count_tiles, worth_their_memory
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, V, ir, optimization_hint

_TILES = 48  # in a block: the transformed weight is read once for each, and costs little then


@dataclasses.dataclass(frozen=True)
class Winograd:
    """What is known of a convolution when it is compiled: all but batch and image size.

    Attributes:
        rotated: whether it is the gradient of the input of another one, whose weight it has.
    """

    out_channels: int
    groups: int
    padding: Sequence[int]
    tile: int
    rotated: bool

    SCHEMA = "int out_channels, int groups, int[2] padding, int tile, bool rotated"

    @property
    def arguments(self) -> list[Any]:
        """The arguments that tell internal operators all of this."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    @property
    def points(self) -> int:
        """Products for each pair of channels and tile."""
        return (self.tile + KERNEL - 1) ** 2

    def transforms_in_the_call(self, batch: Any, size: Sequence[Any]) -> bool:
        """Whether the weight is transformed in each call for a map of this size, and not before."""
        tiles = count_tiles(optimization_hint(batch, 1), [optimization_hint(n, 0) for n in size], self.tile)
        return not (may_grow() and worth_their_memory(tiles))

    def blocking(self) -> dict[str, int]:
        """WinogradBlocking: products of a slice of output channels take half of the second-level cache."""
        panels = cache_bytes() // 2 // (self.points * _TILES * PANEL_BYTES)
        return {"tiles": _TILES, "panels": max(2, panels)}


def _refusal(*args: Any) -> str | None:
    return constant_geometry(Arguments(*args).padding)


def _refusal_backward(grad: Tensor, *args: Any) -> str | None:
    return _refusal(*args[:-1])


def _convolved(
    input: Tensor, weight: Tensor, bias: Tensor | None, winograd: Winograd, size: Sequence[Any], like: Tensor
) -> Tensor:
    """The convolution by internal operators, with the memory format of ``like``."""
    if winograd.transforms_in_the_call(input.shape[0], size):
        weight = weight.contiguous()
    else:
        weight = _transformed(weight, winograd.groups, winograd.tile, winograd.rotated)
    channels_last = suggest_memory_format(like) == torch.channels_last
    return _prepacked(input, weight, bias, *winograd.arguments, size, channels_last)


def _prepack(*args: Any) -> Tensor:
    call = Arguments(*args)
    winograd = Winograd(int(call.weight.shape[0]), call.groups, call.padding, call.tile, False)
    return _convolved(call.input, call.weight, call.bias, winograd, check_arguments(call), call.input)


def _gradients(grad: Tensor, *args: Any, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    call = Arguments(*args)
    grad_input = None
    if wanted[0]:
        padding, channels = gradient_padding(call.padding), int(call.input.shape[1])
        winograd = Winograd(channels, call.groups, padding, call.tile, True)
        grad_input = _convolved(grad, call.weight, None, winograd, call.input.shape[2:], call.input)
    grad_weight, grad_bias = sums(grad, call, wanted[1:]) if any(wanted[1:]) else (None, None)
    return grad_input, grad_weight, grad_bias


def _transform(weight: Tensor, groups: int, tile: int, turned: bool) -> Tensor:
    """U of a weight ``[O, Cg, 3, 3]``, in the order of the kernel: ``[G, panels, points, Cg, lanes]``."""
    weight = weight.to(accumulate_dtype(weight.dtype))
    transformed = transform_weight(rotated(weight, groups) if turned else weight, tile)
    return pack_panels(transformed.flatten(0, 1).permute(1, 2, 0).unflatten(0, (groups, -1)))


def _fake_transformed(weight: Tensor, groups: int, tile: int, turned: bool) -> Tensor:
    outputs, inputs = int(weight.shape[0]) // groups, int(weight.shape[1])
    if turned:
        outputs, inputs = inputs, outputs
    dtype = accumulate_dtype(weight.dtype)
    lanes, points = PANEL_BYTES // dtype.itemsize, (tile + KERNEL - 1) ** 2
    return weight.new_empty([groups, -(-outputs // lanes), points, inputs, lanes], dtype=dtype)


def _lower_transformed(weight: ir.TensorBox, groups: int, tile: int, turned: bool) -> ir.TensorBox:
    node, require_contiguous = V.graph.current_node, ir.ExternKernel.require_contiguous
    folded = fold_constant(node, weight)
    if folded is not weight:
        return folded
    source = ir.ExternKernel.realize_input(require_contiguous(weight))
    return WinogradWeightTemplate(source, groups, tile, turned).transformed()


def _weight(kernel: CppTemplateKernel, node: ir.IRNode, groups: int, turned: bool) -> str:
    """A weight ``[O, Cg, 3, 3]`` as a WinogradWeight."""
    out_channels, inputs, *_ = map(int, node.get_size())
    outputs, taps = out_channels // groups, KERNEL * KERNEL
    sizes, distances = [outputs, inputs], [inputs * taps, taps]
    if turned:
        sizes.reverse()
        distances.reverse()
    return struct(
        "WinogradWeight",
        DTYPE_TO_CPP[node.get_dtype()],
        data=pointer(kernel, node),
        groups=groups,
        **dict(zip(("outputs", "inputs"), sizes)),
        group=outputs * inputs * taps,
        **dict(zip(("output", "input"), distances)),
        rotated=turned,
    )


class WinogradWeightTemplate(KernelTemplate):
    """The transform of a weight that is no constant, see cpp/winograd_conv2d.h."""

    op = "winograd_conv2d"
    header = "winograd_conv2d.h"

    def __init__(self, weight: ir.IRNode, groups: int, tile: int, turned: bool) -> None:
        super().__init__([weight])
        self.groups, self.tile, self.turned = groups, tile, turned

    @property
    def path(self) -> str:
        return "transform of the weight"

    def transformed(self) -> ir.TensorBox:
        """Add the kernel to the graph; its result."""
        fake = V.graph.current_node.meta["val"]
        (result,) = self.add_unfused(ir.FixedLayout(torch.device("cpu"), fake.dtype, list(fake.shape)))
        return result

    def render(
        self, kernel: CppTemplateKernel, buffer: ir.CppTemplateBuffer, epilogue: list[ir.ComputedBuffer], keep: bool
    ) -> str:
        def body() -> list[str]:
            (weight,) = buffer.inputs
            return [
                self.prepare(kernel, buffer),
                f"const auto weight = {_weight(kernel, weight, self.groups, self.turned)};",
                f"inductor_vision::winograd_weight<{self.tile}>(weight, {pointer(kernel, buffer)});",
            ]

        return self.source(kernel, buffer, {"out": buffer}, body)


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _prepacked_body(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    winograd, (size, channels_last) = Winograd(*args[:-2]), args[-2:]
    if weight.dim() == 4:
        weight = _transform(weight, winograd.groups, winograd.tile, winograd.rotated)
    points = winograd.tile + KERNEL - 1
    by_group = unpack_panels(weight, winograd.out_channels // winograd.groups)  # [G, Og, Cg, points]
    transformed = by_group.flatten(0, 1).permute(2, 0, 1).unflatten(0, (points, points))
    out = convolve(input.to(weight.dtype), transformed, winograd.padding, size, winograd.tile)
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None, None]
    return out.to(input.dtype).contiguous(memory_format=_format(channels_last))


def _fake_prepacked(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    out_channels, size, channels_last = args[0], args[-2], args[-1]
    return input.new_empty((input.shape[0], out_channels, *size)).contiguous(memory_format=_format(channels_last))


def _lower(input: ir.TensorBox, weight: ir.TensorBox, bias: ir.TensorBox | None, *args: Any) -> ir.TensorBox:
    node, realize = V.graph.current_node, ir.ExternKernel.realize_input
    image, channels_last = image_and_format(input, node)
    if len(weight.get_size()) == 4:  # it may have been made contiguous; a transformed one was folded before
        weight = fold_constant(node.args[1], weight)
    if bias is not None:  # one with a norm in it is computed from the weight
        bias = fold_constant(node.args[2], bias)
    return WinogradConv2dTemplate(
        Winograd(*args[:-2]),
        image,
        realize(ir.ExternKernel.require_contiguous(weight)),
        None if bias is None else ir.ExternKernel.require_contiguous(realize(bias)),
        ir.convert_shape_to_inductor(node.meta["val"].shape),
        channels_last,
    ).output()


class WinogradConv2dTemplate(BlocksTemplate):
    """See cpp/winograd_conv2d.h."""

    op = "winograd_conv2d"
    header = "winograd_conv2d.h"

    def __init__(
        self,
        winograd: Winograd,
        image: ir.IRNode,
        weight: ir.IRNode,
        bias: ir.IRNode | None,
        size: Sequence[Any],
        channels_last: bool,
    ) -> None:
        """
        Args:
            weight: transformed, or as the operator has it.
        """
        inputs = [image, weight, *([] if bias is None else [bias])]
        super().__init__(inputs, image.get_dtype(), size, channels_last)
        if winograd.rotated:
            self.op = "winograd_conv2d_backward"
        self.winograd = winograd
        self.transforms = len(weight.get_size()) == 4

    @property
    def path(self) -> str:
        kind, tile = "gradient of the input, " if self.winograd.rotated else "", self.winograd.tile
        weight = "weight transformed in the call, " if self.transforms else ""
        return f"{kind}F({tile} x {tile}, {KERNEL} x {KERNEL}), {weight}fused"

    def _group_channels(self) -> int:
        return int(self.inputs[0].get_size()[1]) // self.winograd.groups

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        image, weight, *bias = inputs
        lanes = PANEL_BYTES // accumulate_dtype(self.dtype).itemsize
        depth = min(MAX_DEPTH, -(-self._group_channels() // lanes) * lanes)
        op = struct(
            "WinogradConv2d",
            DTYPE_TO_CPP[self.dtype],
            input=view(kernel, image),
            weight=pointer(kernel, None if self.transforms else weight),
            bias=pointer(kernel, bias[0] if bias else None),
            **sizes(kernel, image, "batch", "channels", "height", "width"),
            out_channels=self.winograd.out_channels,
            **by_axis(out=self.output_size(kernel)[2:], padding=self.winograd.padding),
            groups=self.winograd.groups,
        )
        given = "op"
        if self.transforms:
            given += f", {_weight(kernel, weight, self.winograd.groups, self.winograd.rotated)}"
        arguments = ", ".join(map(in_cpp, (self.channels_last, self.winograd.tile, depth)))
        return f"""
    const auto op = {op};
    const auto blocking = {struct("WinogradBlocking", **self.winograd.blocking())};
    const auto store = {store};
    inductor_vision::winograd_conv2d<{arguments}>({given}, blocking, store);"""


_transformed = define_internal_op(
    "winograd_conv2d_weight(Tensor weight, int groups, int tile, bool rotated) -> Tensor",
    body=_transform,
    fake=_fake_transformed,
    lower=_lower_transformed,
)
_prepacked = define_internal_op(
    f"winograd_conv2d_prepacked(Tensor input, Tensor weight, Tensor? bias, {Winograd.SCHEMA}, SymInt[2] out_size, "
    "bool channels_last) -> Tensor",
    body=_prepacked_body,
    fake=_fake_prepacked,
    lower=_lower,
)
template_for("winograd_conv2d", Template(_refusal, prepack=_prepack))
_prepack_backward = GRADIENTS["winograd_conv2d"].completed(_gradients)
template_for("winograd_conv2d_backward", Template(_refusal_backward, prepack=_prepack_backward))
