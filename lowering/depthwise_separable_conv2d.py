"""depthwise_separable_conv2d as one C++ kernel: see cpp/depthwise_separable_conv2d.h."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.convolution import empty_output
from ..ops.depthwise_separable_conv2d import IDENTITY, Arguments, check_arguments
from ..ops.registry import accumulate_dtype
from .constants import fold_constant
from .inductor import DTYPE_TO_CPP, CppTemplateKernel, V, ir
from .layout import image_and_format
from .panels import MAX_DEPTH, pack_panels
from .registry import Template, define_internal_op, template_for
from .template import BlocksTemplate, pointer, view
from .tuning import cache_bytes

# Of an activation's name, the C++ type in cpp/activations.h.
_ACTIVATIONS = {
    IDENTITY: "Identity",
    "relu": "Relu",
    "relu6": "Relu6",
    "leaky_relu": "LeakyRelu",
    "hardsigmoid": "Hardsigmoid",
    "hardswish": "Hardswish",
    "silu": "Silu",
    "gelu": "Gelu",
}


@dataclasses.dataclass(frozen=True)
class Separable:
    """What is known of a call when it is compiled: all but batch and image size."""

    multiplier: int
    out_channels: int
    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    activation: str

    SCHEMA = (
        "int multiplier, int out_channels, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
        "str activation"
    )

    @property
    def arguments(self) -> list[Any]:
        """As the internal operator takes it."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def blocking(self, dtype: torch.dtype) -> int:
        """SeparableBlocking: pixels of a tile whose hidden channels and sums take half of the second-level cache."""
        itemsize = accumulate_dtype(dtype).itemsize
        return max(12, min(96, cache_bytes() // 2 // ((MAX_DEPTH + self.out_channels) * itemsize)))


def _refusal(*args: Any) -> str | None:
    call = Arguments(*args)
    if not all(isinstance(number, int) for number in (*call.stride, *call.padding, *call.dilation)):
        return "stride, padding and dilation must be constants"
    return None


def _prepack(*args: Any) -> Tensor:
    call = Arguments(*args)
    separable = Separable(
        call.multiplier, call.out_channels, call.kernel, call.stride, call.padding, call.dilation, call.activation
    )
    dtype = accumulate_dtype(call.input.dtype)

    def by_multiplier(values: Tensor) -> Tensor:
        """[C * M, n] as [M * C, n]."""
        return values.reshape(call.channels, call.multiplier, -1).transpose(0, 1).reshape(call.hidden_channels, -1)

    depthwise = by_multiplier(call.depthwise_weight.to(dtype)).t().contiguous()  # [K, M * C]
    bias = None
    if call.depthwise_bias is not None:
        bias = by_multiplier(call.depthwise_bias.to(dtype)).reshape(-1).clone()
    pointwise = by_multiplier(call.pointwise_weight.reshape(call.out_channels, -1).t()).t()  # [O, M * C]
    packed = pack_panels(pointwise[None, :, :, None])
    return _prepacked(
        call.input, depthwise, packed, bias, call.pointwise_bias, *separable.arguments, check_arguments(call)
    )


def _fake_prepacked(input: Tensor, *args: Any) -> Tensor:
    return empty_output(input, args[5], args[-1])


def _lower(
    input: ir.TensorBox,
    depthwise: ir.TensorBox,
    pointwise: ir.TensorBox,
    depthwise_bias: ir.TensorBox | None,
    pointwise_bias: ir.TensorBox | None,
    *args: Any,
) -> ir.TensorBox:
    node = V.graph.current_node
    image, channels_last = image_and_format(input, node)

    def constant(position: int, value: ir.TensorBox | None) -> ir.IRNode | None:
        if value is None:
            return None
        argument = node.args[position]
        assert isinstance(argument, torch.fx.Node)
        return ir.ExternKernel.realize_input(ir.ExternKernel.require_contiguous(fold_constant(argument, value)))

    tensors = (depthwise, pointwise, depthwise_bias, pointwise_bias)
    return DepthwiseSeparableConv2dTemplate(
        Separable(*args[:-1]),
        image,
        [constant(i, tensor) for i, tensor in enumerate(tensors, 1)],
        ir.convert_shape_to_inductor(node.meta["val"].shape),
        channels_last,
    ).output()


class DepthwiseSeparableConv2dTemplate(BlocksTemplate):
    """See cpp/depthwise_separable_conv2d.h."""

    op = "depthwise_separable_conv2d"
    header = "depthwise_separable_conv2d.h"

    def __init__(
        self,
        separable: Separable,
        image: ir.IRNode,
        tensors: Sequence[ir.IRNode | None],
        size: Sequence[Any],
        channels_last: bool,
    ) -> None:
        """
        Args:
            tensors: depthwise and pointwise weight, depthwise and pointwise bias.
        """
        super().__init__([image, *(t for t in tensors if t is not None)], image.get_dtype(), size, channels_last)
        self.separable = separable
        self.present = [tensor is not None for tensor in tensors]

    @property
    def path(self) -> str:
        return f"one pass, tiles of {self.separable.blocking(self.dtype)} pixels"

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        image, *tensors = inputs
        pointers = [pointer(kernel, tensors.pop(0)) if present else "nullptr" for present in self.present]
        depthwise, pointwise, depthwise_bias, pointwise_bias = pointers
        c, out_size = self.separable, self.output_size(kernel)
        pairs = [*c.kernel, *c.stride, *c.padding, *c.dilation]
        size = [kernel.size(image, d) for d in range(4)]
        weights = [depthwise, depthwise_bias, pointwise, pointwise_bias]
        fields = [view(kernel, image), *weights, *size, c.multiplier, c.out_channels, *out_size[2:], *pairs]
        template = f"{str(self.channels_last).lower()}, inductor_vision::{_ACTIVATIONS[c.activation]}"
        scalar = DTYPE_TO_CPP[self.dtype]
        return f"""
    const inductor_vision::DepthwiseSeparableConv2d<{scalar}> op{{{", ".join(map(str, fields))}}};
    const inductor_vision::SeparableBlocking blocking{{{c.blocking(self.dtype)}}};
    const auto store = {store};
    inductor_vision::depthwise_separable_conv2d<{template}>(op, blocking, store);"""


_prepacked = define_internal_op(
    "depthwise_separable_conv2d_prepacked(Tensor input, Tensor depthwise, Tensor packed, Tensor? depthwise_bias, "
    f"Tensor? pointwise_bias, {Separable.SCHEMA}, SymInt[2] out_size) -> Tensor",
    fake=_fake_prepacked,
    lower=_lower,
)
template_for("depthwise_separable_conv2d", Template(_refusal, prepack=_prepack))
