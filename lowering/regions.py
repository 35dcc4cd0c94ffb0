"""What the templates of all operators on regions of interest share: see cpp/regions.h and cpp/region_*.h."""

from __future__ import annotations

from collections.abc import Sequence

from .common.layout import first_result, realize_image, writes_channels_last
from .common.machine import cache_bytes
from .common.template import BlocksTemplate, double, pointer, view
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, V, ir


class RegionsTemplate(BlocksTemplate):
    """A kernel over regions of interest.

    Its inputs are images (maps, or gradients by region), the boxes, and perhaps their levels. Its result has the size
    and memory format of that of the node being lowered.
    """

    def __init__(self, images: Sequence[ir.TensorBox], rois: ir.TensorBox, levels: ir.TensorBox | None = None) -> None:
        realize = ir.ExternKernel.realize_input
        inputs = [*map(realize_image, images), realize(rois)]
        if levels is not None:
            inputs.append(ir.ExternKernel.require_contiguous(realize(levels)))
        node = V.graph.current_node
        size = ir.convert_shape_to_inductor(first_result(node).shape)
        super().__init__(inputs, inputs[0].get_dtype(), size, writes_channels_last(node))
        self.images = len(images)

    @property
    def path(self) -> str:
        return f"fused, {'channels_last' if self.channels_last else 'contiguous'} result"

    def function(self, *arguments: str) -> str:
        """The kernel's name, with its template arguments."""
        return f"inductor_vision::{self.op}<{', '.join([_bool(self.channels_last), *arguments])}>"

    def boxes(self, kernel: CppTemplateKernel) -> str:
        """The boxes in C++."""
        rois, *levels = self.inputs[self.images :]
        fields = [pointer(kernel, rois), *(kernel.stride(rois, d) for d in (0, 1)), kernel.size(rois, 0)]
        fields.append(pointer(kernel, *levels) if levels else "nullptr")
        return f"inductor_vision::Boxes<{DTYPE_TO_CPP[rois.get_dtype()]}>{{{', '.join(fields)}}}"

    def bins(self, kernel: CppTemplateKernel) -> str:
        """PH and PW of a forward kernel."""
        return f"inductor_vision::Bins{{{', '.join(self.output_size(kernel)[2:])}}}"

    def grad_bins(self, kernel: CppTemplateKernel) -> str:
        """PH and PW of a backward kernel."""
        return f"inductor_vision::Bins{{{', '.join(kernel.size(self.inputs[0], d) for d in (2, 3))}}}"

    def feature_maps(self, kernel: CppTemplateKernel, image: int, spatial_scale: float) -> str:
        """The maps of a level, one of the images, in C++."""
        node = self.inputs[image]
        fields = [self.view(kernel, image), kernel.size(node, 2), kernel.size(node, 3), double(spatial_scale)]
        return f"inductor_vision::FeatureMaps<{DTYPE_TO_CPP[self.dtype]}>{{{', '.join(fields)}}}"

    def pyramid(self, kernel: CppTemplateKernel, spatial_scales: Sequence[float]) -> str:
        """Statements that define `pyramid`, of all images."""
        levels = [self.feature_maps(kernel, i, scale) for i, scale in enumerate(spatial_scales)]
        scalar, (batch, channels) = DTYPE_TO_CPP[self.dtype], (kernel.size(self.inputs[0], d) for d in (0, 1))
        return f"""
    const inductor_vision::FeatureMaps<{scalar}> levels[] = {{{", ".join(levels)}}};
    const inductor_vision::Pyramid<{scalar}> pyramid{{
        levels, {len(levels)}, {batch}, {channels}, {4 * cache_bytes()}}};"""

    def position_sensitive_maps(self, kernel: CppTemplateKernel, spatial_scale: float) -> str:
        """The maps of a position-sensitive operator in C++."""
        channels = self.output_size(kernel)[1]
        fields = [self.feature_maps(kernel, 0, spatial_scale), kernel.size(self.inputs[0], 0), channels]
        fields.append(self.bins(kernel))
        return f"inductor_vision::PositionSensitiveMaps<{DTYPE_TO_CPP[self.dtype]}>{{{', '.join(fields)}}}"

    def grad_maps(self, kernel: CppTemplateKernel, spatial_scale: float = 1.0, level: int = 0) -> str:
        """The maps that a backward kernel makes the gradient of, in C++."""
        fields = [*self.output_size(kernel), double(spatial_scale), str(level), str(cache_bytes())]
        return f"inductor_vision::GradMaps{{{', '.join(fields)}}}"

    def view(self, kernel: CppTemplateKernel, image: int) -> str:
        """One of the images, as a View4d in C++."""
        node = self.inputs[image]
        return f"inductor_vision::View4d<{DTYPE_TO_CPP[node.get_dtype()]}>{view(kernel, node)}"


def grid_sampling(sampling_ratio: int, aligned: bool, position_sensitive: bool) -> str:
    """GridSampling in C++."""
    return f"inductor_vision::GridSampling{{{sampling_ratio}, {_bool(aligned)}, {_bool(position_sensitive)}}}"


def _bool(value: bool) -> str:
    return str(value).lower()
