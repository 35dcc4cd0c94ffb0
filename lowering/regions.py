"""The operators on regions of interest, each as one C++ kernel: see cpp/<operator>.h, cpp/regions.h, cpp/region_*.h."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ops.registry import OPS
from .common.layout import first_result, realize_image, writes_channels_last
from .common.machine import cache_bytes
from .common.registry import Template, serve_all, template_for
from .common.template import BlocksTemplate, double, in_cpp, pointer, sizes, strides, struct, view
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, V, ir


@dataclasses.dataclass(frozen=True)
class Operator:
    """What kernels of an operator take beside maps (or gradients), boxes and bins.

    Attributes:
        position_sensitive: each bin has channels of its own.
        sampled: bins are sampled at points that depend on a sampling ratio.
        indices: where in its plane each result is from, which is a second result, and its gradient takes.
    """

    position_sensitive: bool = False
    sampled: bool = False
    indices: bool = False


OPERATORS = {
    "roi_align": Operator(sampled=True),
    "roi_pool": Operator(indices=True),
    "ps_roi_align": Operator(position_sensitive=True, sampled=True),
    "ps_roi_pool": Operator(position_sensitive=True),
}


class RegionsTemplate(BlocksTemplate):
    """A kernel over regions of interest.

    Its inputs are images (maps, or gradients by region), the boxes, and perhaps their levels. Its result has the size
    and memory format of that of the node being lowered.
    """

    def __init__(self, name: str, images: Sequence[ir.TensorBox], call: Mapping[str, Any]) -> None:
        """
        Args:
            name: of the operator of which this is the kernel, or the gradient's.
            call: the arguments of the node, by name.
        """
        realize = ir.ExternKernel.realize_input
        inputs = [*map(realize_image, images), realize(call["rois"])]
        if call.get("levels") is not None:
            inputs.append(ir.ExternKernel.require_contiguous(realize(call["levels"])))
        node = V.graph.current_node
        size = ir.convert_shape_to_inductor(first_result(node).shape)
        super().__init__(inputs, inputs[0].get_dtype(), size, writes_channels_last(node))
        self.op = name
        self.header = f"{name}.h"
        self.operator = OPERATORS[name]
        self.images = len(images)
        self.arguments = call
        # roi_align has one for each map; the gradient of roi_pool needs none.
        self.spatial_scales = call.get("spatial_scales") or [call.get("spatial_scale", 1.0)]

    @property
    def path(self) -> str:
        return f"fused, {'channels_last' if self.channels_last else 'contiguous'} result"

    def statement(self, kernel: CppTemplateKernel, images: Sequence[str], bins: Sequence[str], *rest: str) -> str:
        """C++ that runs the kernel; ``bins`` is none, or one."""
        has_indices = self.operator.indices and self.op in OPERATORS
        flags = [self.channels_last, *([bool(self.store_functions)] if has_indices else [])]
        arguments = [*images, self.boxes(kernel), *bins, *self.sampling(), *rest]
        return f"""
    inductor_vision::{self.op}<{", ".join(map(in_cpp, flags))}>(
        {", ".join(arguments)});"""

    def boxes(self, kernel: CppTemplateKernel) -> str:
        """The boxes in C++."""
        rois, *levels = self.inputs[self.images :]
        return struct(
            "Boxes",
            DTYPE_TO_CPP[rois.get_dtype()],
            data=pointer(kernel, rois),
            **strides(kernel, rois, "row", "column"),
            count=kernel.size(rois, 0),
            levels=pointer(kernel, levels[0] if levels else None),
        )

    def sampling(self) -> list[str]:
        """GridSampling in C++, of operators that sample."""
        if not self.operator.sampled:
            return []
        return [
            struct(
                "GridSampling",
                sampling_ratio=self.arguments["sampling_ratio"],
                aligned=self.arguments.get("aligned", True),  # ps_roi_align always is
                position_sensitive=self.operator.position_sensitive,
            )
        ]

    def view(self, kernel: CppTemplateKernel, image: int) -> str:
        """One of the images, as a View4d in C++."""
        node = self.inputs[image]
        return f"inductor_vision::View4d<{DTYPE_TO_CPP[node.get_dtype()]}>{view(kernel, node)}"


class ForwardTemplate(RegionsTemplate):
    """The kernel of an operator."""

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        # Where the indices are not used nothing stores them.
        stores = [store, *(["nullptr"] if self.operator.indices and not self.store_functions else [])]
        out_channels, *bins = self.output_size(kernel)[1:]
        in_bins = struct("Bins", height=bins[0], width=bins[1])
        scalar, first = DTYPE_TO_CPP[self.dtype], self.inputs[0]
        levels = [self.feature_maps(kernel, i, scale) for i, scale in enumerate(self.spatial_scales)]
        if self.operator.position_sensitive:
            batch = kernel.size(first, 0)
            maps = struct(
                "PositionSensitiveMaps", scalar, maps=levels[0], batch=batch, channels=out_channels, bins=in_bins
            )
            return self.statement(kernel, [maps], [], *stores)
        pyramid = struct(
            "Pyramid",
            scalar,
            levels="levels",
            count=len(levels),
            **sizes(kernel, first, "batch", "channels"),
            bytes=4 * cache_bytes(),
        )
        return f"""
    const inductor_vision::FeatureMaps<{scalar}> levels[] = {{{", ".join(levels)}}};
    const auto pyramid = {pyramid};{self.statement(kernel, ["pyramid"], [in_bins], *stores)}"""

    def feature_maps(self, kernel: CppTemplateKernel, image: int, spatial_scale: float) -> str:
        """The maps of a level, one of the images, in C++."""
        node = self.inputs[image]
        return struct(
            "FeatureMaps",
            DTYPE_TO_CPP[self.dtype],
            view=view(kernel, node),
            height=kernel.size(node, 2),
            width=kernel.size(node, 3),
            spatial_scale=double(spatial_scale),
        )


class BackwardTemplate(RegionsTemplate):
    """The kernel of an operator's gradient, which is that of one map."""

    def __init__(self, name: str, images: Sequence[ir.TensorBox], call: Mapping[str, Any]) -> None:
        super().__init__(name, images, call)
        self.op = f"{name}_backward"

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        batch, channels, height, width = self.output_size(kernel)
        level = self.arguments.get("item", 0)
        maps = struct(
            "GradMaps",
            batch=batch,
            channels=channels,
            height=height,
            width=width,
            spatial_scale=double(self.spatial_scales[level]),
            level=level,
            bytes=cache_bytes(),
        )
        bins = struct("Bins", height=kernel.size(self.inputs[0], 2), width=kernel.size(self.inputs[0], 3))
        images = [self.view(kernel, i) for i in range(self.images)]
        return self.statement(kernel, images, [bins], maps, store)


def _lower(name: str, *args: Any) -> ir.TensorBox | tuple[ir.TensorBox, ir.TensorBox | None]:
    call = dict(zip(OPS[name].arguments, args))
    template = ForwardTemplate(name, call["inputs"] if "inputs" in call else [call["input"]], call)
    if not OPERATORS[name].indices:
        return template.output()
    if any(user.target is operator.getitem and user.args[1] == 1 for user in V.graph.current_node.users):
        out, indices = template.outputs([(torch.int32, "store_indices")])
        return out, indices
    return template.output(), None


def _lower_backward(name: str, *args: Any) -> ir.TensorBox:
    call = dict(zip(OPS[name].backward.arguments, args))
    images = [call["grad"], *([call["argmax"]] if OPERATORS[name].indices else [])]
    return BackwardTemplate(name, images, call).output()


for _name in OPERATORS:
    template_for(_name, Template(serve_all, functools.partial(_lower, _name)))
    template_for(f"{_name}_backward", Template(serve_all, functools.partial(_lower_backward, _name)))
