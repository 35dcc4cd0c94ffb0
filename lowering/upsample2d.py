"""upsample_bilinear2d and upsample_bicubic2d as one C++ kernel: see cpp/upsample2d.h."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .common.layout import layout_is_free, realize_image, writes_channels_last
from .common.registry import Template, serve_all, template_for
from .common.sizes import likely
from .common.template import BlocksTemplate, in_cpp, size_in_cpp, sizes, struct, view
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, V, ir

_FEW_CHANNELS = 16  # less than a vector
_TAPS = {"upsample_bilinear2d": "LinearTaps", "upsample_bicubic2d": "CubicTaps"}


def _lower(
    op: str,
    input: ir.TensorBox,
    output_size: Sequence[Any],
    align_corners: bool,
    scales_h: float | None,
    scales_w: float | None,
    padding: Sequence[Any],
) -> ir.TensorBox:
    channels_last = writes_channels_last(V.graph.current_node)
    realize = ir.ExternKernel.realize_input
    few = V.graph.sizevars.statically_known_leq(input.get_size()[1], _FEW_CHANNELS)
    if few:  # read in any order; written in a row, vectors are longer
        image = realize(ir.ExternKernel.require_contiguous(input) if layout_is_free(input) else input)
    elif channels_last:
        image = realize(ir.ExternKernel.require_channels_last(input))
    else:
        image = realize_image(input)
    size = [*image.get_size()[:2], *(length + zeros for length, zeros in zip(output_size, padding))]
    scales = [0.0 if align_corners or scale is None else scale for scale in (scales_h, scales_w)]
    return Upsample2dTemplate(op, image, size, channels_last, output_size, align_corners, scales).output()


class Upsample2dTemplate(BlocksTemplate):
    """See cpp/upsample2d.h."""

    header = "upsample2d.h"

    def __init__(
        self,
        op: str,
        image: ir.IRNode,
        size: Sequence[Any],
        channels_last: bool,
        resized: Sequence[Any],
        align_corners: bool,
        scales: Sequence[float],
    ) -> None:
        """
        Args:
            size: of the output, [B, C, H, W], zeros included.
            resized: height and width without these.
            scales: of height and width; 0, where sizes count.
        """
        super().__init__([image], image.get_dtype(), size, channels_last)
        self.op = op
        self.resized = list(resized)
        self.align_corners = align_corners
        self.scales = scales

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        (image,) = inputs
        out_height, out_width = size_in_cpp(kernel, self.resized)
        *_, rows, columns = self.output_size(kernel)
        scale_height, scale_width = self.scales
        op = struct(
            "Upsample2d",
            DTYPE_TO_CPP[self.dtype],
            input=view(kernel, image),
            **sizes(kernel, image, "batch", "channels", "height", "width"),
            out_height=out_height,
            out_width=out_width,
            rows=rows,
            columns=columns,
            align_corners=self.align_corners,
            scale_height=scale_height,
            scale_width=scale_width,
        )
        arguments = f"inductor_vision::{_TAPS[self.op]}, {in_cpp(self.channels_last)}"
        return f"inductor_vision::upsample2d<{arguments}>({op}, {store});"


def _leaves(op: str, input: Tensor, output_size: Sequence[Any], *_: Any) -> str | None:
    if not input.is_floating_point():
        return "integers are interpolated in fixed point"
    if op == "upsample_bicubic2d":
        return None
    height, width, old_height, old_width = map(likely, (*output_size, *input.shape[2:]))
    if height is None or width is None or old_height is None or old_width is None:
        return "data decide about its size"
    if height < old_height or width < old_width:
        return "only images that become larger were measured to be resized faster"
    return None


for _op in _TAPS:
    lower, leaves = (functools.partial(function, _op) for function in (_lower, _leaves))
    template_for(_op, Template(serve_all, lower, leaves=leaves))
