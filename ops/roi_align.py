"""RoIAlign, on one feature map or on several at once: https://arxiv.org/abs/1703.06870."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.nn.modules.utils import _pair

from .regions import (
    MapSize,
    Pixels,
    SampledAxis,
    bilinear_samples,
    by_bin,
    check,
    check_grad,
    check_regions,
    empty_regions,
    images_of,
    regions_of,
)
from .registry import accumulate_dtype, define_op, forbid_double_backward, serves_torchvision


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    r"""Averages the input over the bins of each box; a drop-in for :func:`torchvision.ops.roi_align`.

    A box is divided into :math:`PH \times PW` bins, each bin is sampled at the centres of :math:`n_y \times n_x` equal
    cells, and the samples are averaged:

    .. math::
        \text{out}[k, c, p, q] = \frac{1}{\max(n_y n_x, 1)} \sum_{i < n_y} \sum_{j < n_x} \text{input}[b_k, c](y, x)

        y = y_1 + p\,\frac{h}{PH} + \left(i + \tfrac12\right) \frac{h}{PH\,n_y}

    and :math:`x` likewise, where :math:`y_1, x_1` are the box's coordinates times ``spatial_scale``, minus one half if
    ``aligned``, and :math:`h, w` its size, at least 1 unless ``aligned``. Coordinates are in pixels of the input, pixel
    centres at integers, and :math:`(y, x)` is interpolated bilinearly. A sample outside :math:`[-1, H] \times [-1, W]`,
    or at NaN, is zero; one between the range and the outermost pixel centres takes the nearest pixels there.

    Args:
        input: ``[B, C, H, W]``, float32, float64, bfloat16 or float16; the low precisions are computed in float32.
        boxes: ``[K, 5]``, rows of (image, x1, y1, x2, y2), or a list of ``[L, 4]`` with the boxes of each image;
            float32 or the dtype of ``input``.
        output_size: ``(PH, PW)``, or one number for both.
        spatial_scale: what the coordinates of boxes are multiplied by.
        sampling_ratio: :math:`n_y` and :math:`n_x`; if it is not positive, :math:`n_y = \lceil h / PH \rceil` and
            :math:`n_x` likewise, for each box.
        aligned: whether coordinates count from the corner of the first pixel and not from its centre.

    Returns:
        ``[K, C, PH, PW]``, in the dtype and memory format of ``input``.

    Raises:
        RuntimeError: shapes, dtypes or devices do not go together, or a box names an image that does not exist.
        ValueError, TypeError: ``boxes`` is neither of the two.
    """
    rois = regions_of("roi_align", boxes)
    return align_on_levels([input], rois, None, [spatial_scale], _pair(output_size), sampling_ratio, aligned)


def align_on_levels(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    spatial_scales: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """:func:`roi_align` of region k on ``features[levels[k]]``; zero where there is no such map.

    ``levels`` is int64 ``[K]``; None, with a single map, puts all regions on that.
    """
    return _op(features, rois, levels, spatial_scales, *output_size, sampling_ratio, aligned)


class RoIAlign(nn.Module):
    """See :func:`roi_align`; a drop-in for :class:`torchvision.ops.RoIAlign`."""

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """See :func:`roi_align`."""
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


def _axes(
    rois: Tensor, spatial_scale: float, bins: Sequence[int], sampling_ratio: int, aligned: bool, size: MapSize
) -> tuple[SampledAxis, SampledAxis, Tensor]:
    """Where bins sample rows and columns, and by what the sum of the samples is divided, ``[K, 1, 1, 1]``."""
    x1, y1, x2, y2 = (rois[:, 1:] * spatial_scale - (0.5 if aligned else 0)).unbind(1)
    height, width = y2 - y1, x2 - x1
    if not aligned:
        height, width = height.clamp(min=1), width.clamp(min=1)
    y = SampledAxis(y1, height, bins[0], sampling_ratio, size.height)
    x = SampledAxis(x1, width, bins[1], sampling_ratio, size.width)
    count = y.count * x.count
    return y, x, count.where(count > 1, 1)[:, None, None, None]


def _check(
    inputs: Sequence[Tensor], rois: Tensor, levels: Tensor | None, spatial_scales: Sequence[float], bins: Sequence[int]
) -> tuple[Any, ...]:
    """Raise RuntimeError unless the arguments go together; the shape of the result."""
    check("roi_align", len(inputs) > 0, "there must be at least one feature map")
    size = check_regions("roi_align", inputs, rois, bins)
    check(
        "roi_align",
        len(spatial_scales) == len(inputs),
        f"there must be a spatial scale for each of the {len(inputs)} feature maps, got {len(spatial_scales)}",
    )
    check(
        "roi_align",
        levels is not None or len(inputs) == 1,
        f"levels must say which of the {len(inputs)} feature maps each region is on",
    )
    if levels is not None:
        check(
            "roi_align",
            levels.dtype == torch.int64 and levels.dim() == 1 and levels.shape[0] == rois.shape[0],
            f"levels must be int64 [{rois.shape[0]}], got {levels.dtype} {tuple(levels.shape)}",
        )
        check("roi_align", levels.device == rois.device, f"levels must be on {rois.device}, got {levels.device}")
    return rois.shape[0], size.channels, *map(int, bins)


def _fake(
    inputs: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    spatial_scales: Sequence[float],
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    shape = _check(inputs, rois, levels, spatial_scales, (pooled_height, pooled_width))
    return empty_regions(inputs[0], shape)


def _decomposition(
    inputs: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    spatial_scales: Sequence[float],
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    regions, channels, *bins = _check(inputs, rois, levels, spatial_scales, (pooled_height, pooled_width))
    dtype, memory_format = inputs[0].dtype, suggest_memory_format(inputs[0])
    rois = rois.to(accumulate_dtype(dtype))
    image = images_of("roi_align", rois, inputs[0].shape[0])
    out = rois.new_zeros(regions, *bins, channels)  # a region on none of the maps stays zero
    for level, (input, spatial_scale) in enumerate(zip(inputs, spatial_scales)):
        size = MapSize(*input.shape)
        pixels = Pixels(image, size, bins)
        table = pixels.table(input.to(rois.dtype))
        y, x, count = _axes(rois, spatial_scale, bins, sampling_ratio, aligned, size)
        total = torch.zeros_like(out)  # [K, PH, PW, C]
        for row, column, weight, inside in bilinear_samples(y, x):
            total = total + (weight * pixels.read(table, row, column)).where(inside, 0)
        out = total / count if levels is None else (total / count).where((levels == level)[:, None, None, None], out)
    return by_bin(out).to(dtype).contiguous(memory_format=memory_format)


def _loops_over_data(*args: Any) -> str | None:
    *_, sampling_ratio, _ = args
    return None if sampling_ratio > 0 else "how many samples an adaptive grid has depends on the values of the boxes"


_op = define_op(
    "roi_align(Tensor[] inputs, Tensor rois, Tensor? levels, float[] spatial_scales, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    family="roi_align",
    decomposition=_decomposition,
    fake=_fake,
    autocast=False,  # the low precisions are computed in float32 as it is, and the boxes are never converted
    untraceable=_loops_over_data,
)


def _fake_backward(
    grad: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    level: int,
    spatial_scale: float,
    size: Sequence[Any],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    check_grad("roi_align", grad, rois, size)
    return empty_regions(grad, size)


def _decomposition_backward(
    grad: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    level: int,
    spatial_scale: float,
    size: Sequence[Any],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """The gradient of one of the feature maps, by the regions that are on it; ``levels=None``: by all."""
    check_grad("roi_align", grad, rois, size)
    size = MapSize(*size)
    bins = grad.shape[2:]
    dtype, memory_format = grad.dtype, suggest_memory_format(grad)
    rois = rois.to(accumulate_dtype(dtype))
    pixels = Pixels(images_of("roi_align", rois, size.batch), size, bins)
    y, x, count = _axes(rois, spatial_scale, bins, sampling_ratio, aligned, size)
    share = grad.to(rois.dtype).permute(0, 2, 3, 1) / count  # [K, PH, PW, C]
    here = True if levels is None else (levels == level)[:, None, None, None]
    table = rois.new_zeros(size.batch * size.height * size.width, size.channels)
    for row, column, weight, inside in bilinear_samples(y, x):
        table = pixels.add(table, row, column, (weight * share).where(inside & here, 0))
    return pixels.untable(table).to(dtype).contiguous(memory_format=memory_format)


def _loops_over_data_backward(*args: Any) -> str | None:
    return _loops_over_data(*args)  # the same arguments come last


_op_backward = define_op(
    "roi_align_backward(Tensor grad, Tensor rois, Tensor? levels, int level, float spatial_scale, SymInt[] size, "
    "int sampling_ratio, bool aligned) -> Tensor",
    family="roi_align",
    decomposition=_decomposition_backward,
    fake=_fake_backward,
    autocast=False,
    untraceable=_loops_over_data_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    maps, rois, levels, ctx.spatial_scales, _, _, ctx.sampling_ratio, ctx.aligned = inputs
    ctx.sizes = [map.shape for map in maps]
    ctx.save_for_backward(rois, levels)


def _autograd(ctx, grad):
    rois, levels = ctx.saved_tensors
    grads = [
        _op_backward(grad, rois, levels, level, spatial_scale, size, ctx.sampling_ratio, ctx.aligned)
        if needed
        else None
        for level, (size, spatial_scale, needed) in enumerate(
            zip(ctx.sizes, ctx.spatial_scales, ctx.needs_input_grad[0])
        )
    ]
    return grads, None, None, None, None, None, None, None


torch.library.register_autograd(_op.overload, _autograd, setup_context=_setup_context)
forbid_double_backward(_op_backward, "roi_align")


@serves_torchvision("roi_align")
def _torchvision(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return _op([input], rois, None, [spatial_scale], pooled_height, pooled_width, sampling_ratio, aligned)


@serves_torchvision("_roi_align_backward")
def _torchvision_backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    size = (batch_size, channels, height, width)
    return _op_backward(grad, rois, None, 0, spatial_scale, size, sampling_ratio, aligned)
