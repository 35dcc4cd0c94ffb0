"""upsample_bilinear2d as one C++ kernel: see cpp/upsample_bilinear2d.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .common.layout import layout_is_free, realize_image, writes_channels_last
from .common.registry import Template, serve_all, template_for
from .common.sizes import likely
from .common.template import BlocksTemplate, size_in_cpp, sizes, struct, view
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, V, ir

_FEW_CHANNELS = 16  # less than a vector


def _lower(
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
    return UpsampleBilinear2dTemplate(image, size, channels_last, output_size, align_corners, scales).output()


class UpsampleBilinear2dTemplate(BlocksTemplate):
    """See cpp/upsample_bilinear2d.h."""

    op = "upsample_bilinear2d"
    header = "upsample_bilinear2d.h"

    def __init__(
        self,
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
        self.resized = list(resized)
        self.align_corners = align_corners
        self.scales = scales

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        (image,) = inputs
        out_height, out_width = size_in_cpp(kernel, self.resized)
        *_, rows, columns = self.output_size(kernel)
        scale_height, scale_width = self.scales
        op = struct(
            "UpsampleBilinear2d",
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
        return f"inductor_vision::upsample_bilinear2d<{str(self.channels_last).lower()}>({op}, {store});"


def _leaves(input: Tensor, output_size: Sequence[Any], *_: Any) -> str | None:
    height, width, old_height, old_width = map(likely, (*output_size, *input.shape[2:]))
    if height is None or width is None or old_height is None or old_width is None:
        return "data decide about its size"
    if height < old_height or width < old_width:
        return "only images that become larger were measured to be resized faster"
    if not input.is_floating_point():
        return "integers are interpolated in fixed point"
    if input.dtype not in (torch.float32, torch.bfloat16):
        return f"images in {input.dtype} were not measured to be resized faster"
    if input.dtype == torch.float32 and suggest_memory_format(input) == torch.channels_last:
        return f"channels_last images in {input.dtype} were measured not to become faster"
    return None


template_for("upsample_bilinear2d", Template(serve_all, _lower, leaves=_leaves))
