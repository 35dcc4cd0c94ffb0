"""RoIAlign, on one feature map or on several at once: https://arxiv.org/abs/1703.06870."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from .gradients import Gradient
from .regions import (
    MapSize,
    Pixels,
    SampledAxis,
    adaptive_grid,
    bins_of,
    check_grad,
    check_regions,
    empty_regions,
    images_of,
    on_all_images,
    regions_of,
)
from .registry import (
    accumulate_dtype,
    check,
    define_op,
    is_proxy,
    not_scriptable,
    record_call,
    serves_torchvision,
)


@not_scriptable
def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    r"""Average the input over the bins of each box; a drop-in for :func:`torchvision.ops.roi_align`.

    A box is divided into :math:`PH \times PW` bins, each bin is sampled at the centres of :math:`n_y \times n_x` equal
    cells, and the samples are averaged:

    .. math::
        \text{out}[k, c, p, q] = \frac{1}{\max(n_y n_x, 1)} \sum_{i < n_y} \sum_{j < n_x} \text{input}[b_k, c](y, x)

        y = y_1 + p\,\frac{h}{PH} + \left(i + \tfrac12\right) \frac{h}{PH\,n_y}

    and :math:`x` likewise, where :math:`y_1, x_1` are the box's coordinates times ``spatial_scale``, minus one half if
    ``aligned``, and :math:`h, w` its size, at least 1 unless ``aligned``. Coordinates are in pixels of the input, pixel
    centres are at integers, and values between them are interpolated bilinearly. A sample outside
    :math:`[-1, H] \times [-1, W]`, or at NaN, is zero; one within, but beyond the outermost pixel centres, has the
    value of the nearest point between them.

    Args:
        input: ``[B, C, H, W]``, float32, float64, bfloat16 or float16; the low precisions are computed in float32.
        boxes: ``[K, 5]``, rows of (image, x1, y1, x2, y2), or a list of ``[L, 4]`` with the boxes of each image;
            float32 or the dtype of ``input``.
        output_size: ``(PH, PW)``, or one number for both.
        spatial_scale: factor that the coordinates of boxes are multiplied by.
        sampling_ratio: :math:`n_y` and :math:`n_x`; if it is not positive, :math:`n_y = \lceil h / PH \rceil` and
            :math:`n_x` likewise, for each box.
        aligned: whether box coordinates are measured from the corner of the first pixel, rather than from its centre.

    Returns:
        ``[K, C, PH, PW]``, in the dtype and memory format of ``input``.

    Raises:
        RuntimeError: shapes, dtypes or devices are not compatible, or a box names an image that does not exist.
        AssertionError: ``boxes`` is neither a ``[K, 5]`` tensor nor a list of ``[L, 4]`` tensors.
        ValueError: ``boxes`` is an empty list, or ``output_size`` is neither a number nor a pair.
    """
    if is_proxy(input, boxes):
        return record_call(roi_align, **locals())
    rois = regions_of("roi_align", boxes)
    return align_on_levels(
        [input], rois, None, [spatial_scale], bins_of("roi_align", output_size), sampling_ratio, aligned
    )


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


@not_scriptable
class RoIAlign(nn.Module):
    """Module that calls :func:`roi_align`; a drop-in for :class:`torchvision.ops.RoIAlign`."""

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """Call :func:`roi_align`, which describes the arguments."""
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


class Arguments(NamedTuple):
    """What the operator takes, in its order."""

    inputs: Sequence[Tensor]
    rois: Tensor
    levels: Tensor | None
    spatial_scales: Sequence[float]
    pooled_height: int
    pooled_width: int
    sampling_ratio: int
    aligned: bool

    @property
    def bins(self) -> tuple[int, int]:
        return self.pooled_height, self.pooled_width


class BackwardArguments(NamedTuple):
    """What the backward operator takes, in its order: it makes the gradient of one of the maps."""

    grad: Tensor
    rois: Tensor
    levels: Tensor | None
    spatial_scales: Sequence[float]
    size: Sequence[Any]
    sampling_ratio: int
    aligned: bool
    item: int


def _axes(
    call: Arguments | BackwardArguments, rois: Tensor, spatial_scale: float, bins: Sequence[int], size: MapSize
) -> tuple[SampledAxis, SampledAxis, Tensor]:
    """Where bins sample rows and columns, and by what the sum of the samples is divided, ``[K]``."""
    x1, y1, x2, y2 = (rois[:, 1:] * spatial_scale - (0.5 if call.aligned else 0)).unbind(1)
    height, width = y2 - y1, x2 - x1
    if not call.aligned:
        height, width = height.clamp(min=1), width.clamp(min=1)
    y = SampledAxis(y1, height, bins[0], call.sampling_ratio, size.height)
    x = SampledAxis(x1, width, bins[1], call.sampling_ratio, size.width)
    count = y.count * x.count
    return y, x, count.where(count > 1, 1)


def _check(call: Arguments) -> tuple[Any, ...]:
    """Raise RuntimeError unless the arguments are compatible; return the shape of the result."""
    maps, rois, levels = len(call.inputs), call.rois, call.levels
    check("roi_align", maps > 0, "there must be at least one feature map")
    size = check_regions("roi_align", call.inputs, rois, call.bins)
    check(
        "roi_align",
        len(call.spatial_scales) == maps,
        f"there must be a spatial scale for each of the {maps} feature maps, got {len(call.spatial_scales)}",
    )
    check(
        "roi_align",
        levels is not None or maps == 1,
        f"levels must say which of the {maps} feature maps each region is on",
    )
    if levels is not None:
        check(
            "roi_align",
            levels.dtype == torch.int64 and levels.dim() == 1 and levels.shape[0] == rois.shape[0],
            f"levels must be int64 [{rois.shape[0]}], got {levels.dtype} {tuple(levels.shape)}",
        )
        check("roi_align", levels.device == rois.device, f"levels must be on {rois.device}, got {levels.device}")
    return rois.shape[0], size.channels, *call.bins


def _fake(*args: Any) -> Tensor:
    call = Arguments(*args)
    return empty_regions(call.inputs[0], _check(call))


def forward(*args: Any, pixels: type[Pixels] = Pixels) -> Tensor:
    """The operator, with its loops over samples as they are in ``pixels``."""
    call = Arguments(*args)
    shape = _check(call)
    dtype, memory_format = call.inputs[0].dtype, suggest_memory_format(call.inputs[0])
    rois = call.rois.to(accumulate_dtype(dtype))
    image = images_of("roi_align", rois, call.inputs[0].shape[0])
    out = None if call.levels is None else rois.new_zeros(shape)  # a region on none of the maps stays zero
    for level, (input, spatial_scale) in enumerate(zip(call.inputs, call.spatial_scales)):
        size = MapSize(*input.shape)
        y, x, count = _axes(call, rois, spatial_scale, call.bins, size)
        here = None if call.levels is None else call.levels == level
        out = pixels(image, size, call.bins).mean_of_samples(input, y, x, count, here, out)
    assert out is not None
    return out.to(dtype).contiguous(memory_format=memory_format)


def backward(*args: Any, pixels: type[Pixels] = Pixels) -> Tensor:
    """The gradient of one of the feature maps, by the regions that are on it; ``levels=None``: by all."""
    call = BackwardArguments(*args)
    size = MapSize(*call.size)
    bins = call.grad.shape[2:]
    rois = call.rois.to(accumulate_dtype(call.grad.dtype))
    y, x, count = _axes(call, rois, call.spatial_scales[call.item], bins, size)
    here = None if call.levels is None else call.levels == call.item
    image = images_of("roi_align", rois, size.batch)
    return pixels(image, size, bins).spread_to_samples(call.grad, y, x, count, here)


_op = define_op(
    "roi_align(Tensor[] inputs, Tensor rois, Tensor? levels, float[] spatial_scales, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    family="regions",
    decomposition=forward,
    fake=_fake,
    gradient=Gradient(
        backward,
        of="inputs",
        takes="rois, levels, spatial_scales, inputs.shape, sampling_ratio, aligned",
        check=check_grad,
        untraceable=adaptive_grid,
    ),
    autocast=False,  # the low precisions are computed in float32 as it is, and the boxes are never converted
    untraceable=adaptive_grid,
    fold=on_all_images,
)


@serves_torchvision("roi_align")
def _torchvision(input: Tensor, rois: Tensor, spatial_scale: float, *options: Any) -> Tensor:
    return _op([input], rois, None, [spatial_scale], *options)


@serves_torchvision("_roi_align_backward")
def _torchvision_backward(grad: Tensor, rois: Tensor, spatial_scale: float, *sizes_and_options: Any) -> Tensor:
    _, _, *size, sampling_ratio, aligned = sizes_and_options
    return _op.backward(grad, rois, None, [spatial_scale], size, sampling_ratio, aligned, 0)
