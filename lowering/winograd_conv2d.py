"""winograd_conv2d as one C++ kernel, and the gradient of its input as another call of it: see cpp/winograd_conv2d.h."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..ops.convolution import empty_output
from ..ops.gradients import gradient_format
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
from .common.constants import fold_constant
from .common.geometry import by_axis, constant_geometry
from .common.internal_op import define_internal_op
from .common.layout import image_and_format
from .common.panels import MAX_DEPTH, PANEL_BYTES, pack_panels, unpack_panels
from .common.registry import Template, template_for
from .common.template import BlocksTemplate, in_cpp, pointer, sizes, struct, view
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, V, ir


@dataclasses.dataclass(frozen=True)
class Winograd:
    """What is known of a convolution when it is compiled: all but batch and image size."""

    out_channels: int
    groups: int
    padding: Sequence[int]
    tile: int

    SCHEMA = "int out_channels, int groups, int[2] padding, int tile"

    @property
    def arguments(self) -> list[Any]:
        """The arguments that tell internal operators all of this."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def _refusal(*args: Any) -> str | None:
    return constant_geometry(Arguments(*args).padding)


def _refusal_backward(grad: Tensor, *args: Any) -> str | None:
    return _refusal(*args[:-1])


def _packed(weight: Tensor, groups: int, tile: int) -> Tensor:
    """``[O, Cg, 3, 3]``, transformed and packed: ``[G, panels, points, Cg, lanes]``."""
    transformed = transform_weight(weight.to(accumulate_dtype(weight.dtype)), tile)
    return pack_panels(transformed.flatten(0, 1).permute(1, 2, 0).unflatten(0, (groups, -1)))


def _unpacked(packed: Tensor, winograd: Winograd) -> Tensor:
    """The transformed weight, ``[m + 2, m + 2, O, Cg]``."""
    points = winograd.tile + KERNEL - 1
    by_group = unpack_panels(packed, winograd.out_channels // winograd.groups)  # [G, Og, Cg, points]
    return by_group.flatten(0, 1).permute(2, 0, 1).unflatten(0, (points, points))


def _prepack(*args: Any) -> Tensor:
    call = Arguments(*args)
    winograd = Winograd(int(call.weight.shape[0]), call.groups, call.padding, call.tile)
    channels_last = suggest_memory_format(call.input) == torch.channels_last
    packed = _packed(call.weight, call.groups, call.tile)
    return _prepacked(call.input, packed, call.bias, *winograd.arguments, check_arguments(call), channels_last)


def _gradients(grad: Tensor, *args: Any, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    call = Arguments(*args)
    grad_input = None
    if wanted[0]:
        padding, size = gradient_padding(call.padding), call.input.shape[2:]
        winograd = Winograd(int(call.input.shape[1]), call.groups, padding, call.tile)
        channels_last = gradient_format(call.input) == torch.channels_last
        packed = _packed(rotated(call.weight, call.groups), call.groups, call.tile)
        grad_input = _prepacked(grad, packed, None, *winograd.arguments, size, channels_last)
    grad_weight, grad_bias = sums(grad, call, wanted[1:]) if any(wanted[1:]) else (None, None)
    return grad_input, grad_weight, grad_bias


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _prepacked_body(input: Tensor, packed: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    winograd, (size, channels_last) = Winograd(*args[:-2]), args[-2:]
    out = convolve(input.to(packed.dtype), _unpacked(packed, winograd), winograd.padding, size, winograd.tile)
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None, None]
    return out.to(input.dtype).contiguous(memory_format=_format(channels_last))


def _fake_prepacked(input: Tensor, packed: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    out_channels, size, channels_last = args[0], args[-2], args[-1]
    out = empty_output(input, out_channels, size)
    return out.contiguous(memory_format=_format(channels_last))


def _lower(input: ir.TensorBox, packed: ir.TensorBox, bias: ir.TensorBox | None, *args: Any) -> ir.TensorBox:
    node, realize = V.graph.current_node, ir.ExternKernel.realize_input
    image, channels_last = image_and_format(input, node)
    return WinogradConv2dTemplate(
        Winograd(*args[:-2]),
        image,
        realize(ir.ExternKernel.require_contiguous(fold_constant(node.args[1], packed))),
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
        inputs = [image, weight, *([] if bias is None else [bias])]
        super().__init__(inputs, image.get_dtype(), size, channels_last)
        self.winograd = winograd

    @property
    def path(self) -> str:
        tile = self.winograd.tile
        return f"F({tile} x {tile}, {KERNEL} x {KERNEL}), blocks of {self._blocking()['tiles']} tiles, fused"

    def _group_channels(self) -> int:
        return int(self.inputs[0].get_size()[1]) // self.winograd.groups

    def _blocking(self) -> dict[str, int]:
        """WinogradBlocking: the products of a slice of output channels take half of the second-level cache."""
        return {"tiles": 48, "panels": 2}

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        image, weight, *bias = inputs
        lanes = PANEL_BYTES // accumulate_dtype(self.dtype).itemsize
        depth = min(MAX_DEPTH, -(-self._group_channels() // lanes) * lanes)
        op = struct(
            "WinogradConv2d",
            DTYPE_TO_CPP[self.dtype],
            input=view(kernel, image),
            weight=pointer(kernel, weight),
            bias=pointer(kernel, bias[0] if bias else None),
            **sizes(kernel, image, "batch", "channels", "height", "width"),
            out_channels=self.winograd.out_channels,
            **by_axis(out=self.output_size(kernel)[2:], padding=self.winograd.padding),
            groups=self.winograd.groups,
        )
        arguments = ", ".join(map(in_cpp, (self.channels_last, self.winograd.tile, depth)))
        return f"""
    const auto op = {op};
    const auto blocking = {struct("WinogradBlocking", **self._blocking())};
    const auto store = {store};
    inductor_vision::winograd_conv2d<{arguments}>(op, blocking, store);"""


_prepacked = define_internal_op(
    f"winograd_conv2d_prepacked(Tensor input, Tensor packed, Tensor? bias, {Winograd.SCHEMA}, SymInt[2] out_size, "
    "bool channels_last) -> Tensor",
    body=_prepacked_body,
    fake=_fake_prepacked,
    lower=_lower,
)
template_for("winograd_conv2d", Template(_refusal, prepack=_prepack))
_prepack_backward = GRADIENTS["winograd_conv2d"].completed(_gradients)
template_for("winograd_conv2d_backward", Template(_refusal_backward, prepack=_prepack_backward))
