"""direct_conv2d as one C++ kernel: see cpp/direct_conv2d.h."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ops.convolution import empty_output
from ..ops.direct_conv2d import Arguments, check_arguments
from ..ops.registry import OPS, accumulate_dtype
from .common.constants import realize_constant
from .common.geometry import by_axis, constant_geometry
from .common.internal_op import define_internal_op
from .common.layout import image_and_format
from .common.panels import pack_panels, unpack_panels
from .common.registry import Template, template_for
from .common.template import BlocksTemplate, in_cpp, pointer, sizes, struct, view
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, V, ir

# DirectBlocking: sums of a tile and a slice take a third of the first-level cache. From so much work on, which takes
# about 5 microseconds, it is shared among threads.
_BLOCKING = {"pixels": 56, "channels": 64, "parallel": 400_000}


@dataclasses.dataclass(frozen=True)
class Direct:
    """What is known of a convolution when it is compiled: all but batch and image size."""

    out_channels: int
    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    depthwise: bool

    SCHEMA = "int out_channels, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, bool depthwise"

    @property
    def arguments(self) -> list[Any]:
        """The arguments that tell the internal operator all of this."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def _refusal(*args: Any) -> str | None:
    call = Arguments(*args)
    if call.groups > 1 and not call.depthwise:
        return "groups are served only where each is one channel, with one filter"
    width = int(call.weight.shape[3])
    if not call.depthwise and width > 1 and call.dilation[1] != 1:
        return "kernels of dense convolutions must not be dilated"
    return constant_geometry(call.stride, call.padding, call.dilation)


def _prepack(*args: Any) -> Tensor:
    call = Arguments(*args)
    out_channels, _, *kernel = map(int, call.weight.shape)
    weight = call.weight.to(accumulate_dtype(call.weight.dtype))
    if call.depthwise:
        packed = weight.flatten(1).t().contiguous()  # [K, C]
    else:
        packed = pack_panels(weight.permute(0, 2, 3, 1).reshape(1, out_channels, -1, 1))  # of [O, K * C]
    direct = Direct(out_channels, kernel, call.stride, call.padding, call.dilation, call.depthwise)
    return _prepacked(call.input, packed, call.bias, *direct.arguments, check_arguments(call))


def _prepacked_body(input: Tensor, packed: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    direct = Direct(*args[:-1])
    if direct.depthwise:
        weight = packed.t().reshape(-1, 1, *direct.kernel)
    else:
        rows = unpack_panels(packed, direct.out_channels)[0, :, :, 0]  # [O, K * C]
        weight = rows.reshape(direct.out_channels, *direct.kernel, -1).permute(0, 3, 1, 2)
    geometry = direct.stride, direct.padding, direct.dilation
    return OPS["direct_conv2d"].decomposition(input, weight.to(input.dtype), bias, *geometry)


def _fake_prepacked(input: Tensor, packed: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    return empty_output(input, args[0], args[-1])


def _lower(input: ir.TensorBox, weight: ir.TensorBox, bias: ir.TensorBox | None, *args: Any) -> ir.TensorBox:
    node = V.graph.current_node
    image, channels_last = image_and_format(input, node)
    packed, realized_bias = realize_constant(1, weight), realize_constant(2, bias)
    assert packed is not None
    size = ir.convert_shape_to_inductor(node.meta["val"].shape)
    return DirectConv2dTemplate(Direct(*args[:-1]), image, packed, realized_bias, size, channels_last).output()


class DirectConv2dTemplate(BlocksTemplate):
    """See cpp/direct_conv2d.h."""

    op = "direct_conv2d"
    header = "direct_conv2d.h"

    def __init__(
        self,
        direct: Direct,
        image: ir.IRNode,
        weight: ir.IRNode,
        bias: ir.IRNode | None,
        size: Sequence[Any],
        channels_last: bool,
    ) -> None:
        inputs = [image, weight, *([] if bias is None else [bias])]
        super().__init__(inputs, image.get_dtype(), size, channels_last)
        self.direct = direct

    @property
    def path(self) -> str:
        kernel = " x ".join(map(str, self.direct.kernel))
        return f"{'depthwise' if self.direct.depthwise else 'dense'} {kernel}, fused"

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        image, weight, *bias = inputs
        direct = self.direct
        op = struct(
            "DirectConv2d",
            DTYPE_TO_CPP[self.dtype],
            input=view(kernel, image),
            weight=pointer(kernel, weight),
            bias=pointer(kernel, bias[0] if bias else None),
            **sizes(kernel, image, "batch", "channels", "height", "width"),
            out_channels=direct.out_channels,
            **by_axis(
                out=self.output_size(kernel)[2:],
                kernel=direct.kernel,
                stride=direct.stride,
                padding=direct.padding,
                dilation=direct.dilation,
            ),
        )
        return f"""
    const auto op = {op};
    const auto blocking = {struct("DirectBlocking", **_BLOCKING)};
    const auto store = {store};
    inductor_vision::direct_conv2d<{in_cpp(self.channels_last)}, {in_cpp(direct.depthwise)}>(op, blocking, store);"""


_prepacked = define_internal_op(
    f"direct_conv2d_prepacked(Tensor input, Tensor weight, Tensor? bias, {Direct.SCHEMA}, SymInt[2] out_size) "
    "-> Tensor",
    body=_prepacked_body,
    fake=_fake_prepacked,
    lower=_lower,
)
template_for("direct_conv2d", Template(_refusal, prepack=_prepack))
