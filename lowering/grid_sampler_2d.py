"""grid_sampler_2d as one C++ kernel, and its gradients as another: see cpp/grid_sampler_2d.h and
grid_sampler_2d_backward.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.registry import GRADIENTS
from .common.layout import image_and_format, realize_image
from .common.registry import Template, serve_all, template_for
from .common.template import BlocksTemplate, ResultsTemplate, in_cpp, members, pointer, sizes, strides, struct, view
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, V, ir

_INTERPOLATIONS = "bilinear", "nearest", "bicubic"
_PADDINGS = "zeros", "border", "reflection"
_FEW_CHANNELS = 8  # of float32: a vector, as pixels are read


def _lower(input: ir.TensorBox, grid: ir.TensorBox, *modes: Any) -> ir.TensorBox:
    image, channels_last = image_and_format(input, V.graph.current_node)
    places = ir.ExternKernel.realize_input(grid)
    return GridSampler2dTemplate(image, places, modes, channels_last).output()


def _lower_backward(grad: ir.TensorBox, input: ir.TensorBox, grid: ir.TensorBox, *rest: Any) -> list[ir.TensorBox]:
    *modes, _ = rest
    realize = ir.ExternKernel.realize_input
    wanted = GRADIENTS["grid_sampler_2d"].wanted(grad, input, grid, *rest)
    return GridSampler2dBackwardTemplate(realize(grad), realize_image(input), realize(grid), modes, wanted).results()


class GridSampler2dTemplate(BlocksTemplate):
    """See cpp/grid_sampler_2d.h."""

    op = "grid_sampler_2d"
    header = "grid_sampler_2d.h"

    def __init__(self, image: ir.IRNode, grid: ir.IRNode, modes: Sequence[Any], channels_last: bool) -> None:
        """
        Args:
            modes: of interpolation and padding, in aten's numbers, and whether corners are aligned.
        """
        size = [*image.get_size()[:2], *grid.get_size()[1:3]]
        super().__init__([image, grid], image.get_dtype(), size, channels_last)
        self.modes = modes

    @property
    def path(self) -> str:
        return f"{_describe(self.modes)}, fused"

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        op = _operation(kernel, inputs[0], inputs[1], self.modes)
        arguments = f"{_interpolation(self.modes)}, {in_cpp(self.channels_last)}"
        return f"inductor_vision::grid_sampler_2d<{arguments}>({op}, {store});"


class GridSampler2dBackwardTemplate(ResultsTemplate):
    """See cpp/grid_sampler_2d_backward.h."""

    op = "grid_sampler_2d_backward"
    header = "grid_sampler_2d_backward.h"
    names = ("grad_input", "grad_grid")

    def __init__(
        self, grad: ir.IRNode, image: ir.IRNode, grid: ir.IRNode, modes: Sequence[Any], wanted: Sequence[bool]
    ) -> None:
        super().__init__([grad, image, grid], wanted)
        self.modes = modes

    @property
    def path(self) -> str:
        return f"{_describe(self.modes)}, {super().path}"

    def call(
        self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], results: dict[str, ir.Buffer]
    ) -> Sequence[str]:
        grad, image, grid = inputs
        input_result, grid_result = (results.get(name) for name in self.names)
        gradients = struct(
            "GridSampler2dGradients",
            DTYPE_TO_CPP[image.get_dtype()],
            output=view(kernel, grad),
            input=members(data="nullptr") if input_result is None else view(kernel, input_result),
            grid=members(data="nullptr") if grid_result is None else _grid_view(kernel, grid_result),
        )
        return [
            f"const auto op = {_operation(kernel, image, grid, self.modes)};",
            f"const auto gradients = {gradients};",
            f"inductor_vision::grid_sampler_2d_backward<{_interpolation(self.modes)}>(op, gradients);",
        ]


def _describe(modes: Sequence[Any]) -> str:
    interpolation, padding, _ = modes
    return f"{_INTERPOLATIONS[interpolation]}, {_PADDINGS[padding]}"


def _interpolation(modes: Sequence[Any]) -> str:
    return f"inductor_vision::GridInterpolation::{_INTERPOLATIONS[modes[0]]}"


def _operation(kernel: CppTemplateKernel, image: ir.IRNode, grid: ir.IRNode, modes: Sequence[Any]) -> str:
    _, padding, align_corners = modes
    return struct(
        "GridSampler2d",
        DTYPE_TO_CPP[image.get_dtype()],
        input=view(kernel, image),
        grid=_grid_view(kernel, grid),
        **sizes(kernel, image, "batch", "channels", "height", "width"),
        out_height=kernel.size(grid, 1),
        out_width=kernel.size(grid, 2),
        padding=f"inductor_vision::GridPadding::{_PADDINGS[padding]}",
        align_corners=align_corners,
    )


def _grid_view(kernel: CppTemplateKernel, grid: ir.IRNode) -> str:
    """A grid, [B, Ho, Wo, 2], as a View4d or an Output4d of [B, 2, Ho, Wo]."""
    by_name = strides(kernel, grid, "image", "row", "column", "channel")
    in_order = {name: by_name[name] for name in ("image", "channel", "row", "column")}
    return members(data=pointer(kernel, grid), **in_order)


def _leaves_backward(
    grad: Tensor, input: Tensor, grid: Tensor, interpolation: int, padding: int, *_: Any
) -> str | None:
    channels = input.shape[1]
    few = isinstance(channels, int) and channels < _FEW_CHANNELS
    if few and input.dtype in (torch.float32, torch.float64) and _INTERPOLATIONS[interpolation] == "bilinear":
        return f"bilinear gradients of images of {channels} channels in {input.dtype} were measured to be slower"
    return None


template_for("grid_sampler_2d", Template(serve_all, _lower))
template_for("grid_sampler_2d_backward", Template(serve_all, _lower_backward, leaves=_leaves_backward))
