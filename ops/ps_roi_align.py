"""Position-sensitive RoIAlign: https://arxiv.org/abs/1711.07264."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from .gradients import Gradient
from .regions import (
    MapSize,
    Pixels,
    SampledAxis,
    adaptive_grid,
    bins_of,
    channel_mapping,
    check_grad,
    check_position_sensitive,
    empty_regions,
    images_of,
    on_all_images,
    regions_of,
)
from .registry import (
    accumulate_dtype,
    define_op,
    is_proxy,
    not_scriptable,
    record_call,
    serves_torchvision,
)


@not_scriptable
def ps_roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:
    r"""Average the input over the bins of each box, where each bin has its own channels; a drop-in for
    :func:`torchvision.ops.ps_roi_align`.

    .. math::
        \text{out}[k, c, p, q] = \frac{1}{n_y n_x} \sum_{i < n_y} \sum_{j < n_x}
            \text{input}[b_k, (c \cdot PH + p) \cdot PW + q](y, x)

    with samples placed and interpolated as in :func:`inductor_vision.roi_align` with ``aligned=True``. Where an
    adaptive grid has no samples, because the box's height or width is zero, the result is NaN.

    Args:
        input: ``[B, C * PH * PW, H, W]``, float32, float64, bfloat16 or float16; the low precisions are computed in
            float32.
        boxes: ``[K, 5]``, rows of (image, x1, y1, x2, y2), or a list of ``[L, 4]`` with the boxes of each image;
            float32 or the dtype of ``input``.
        output_size: ``(PH, PW)``, or one number for both.
        spatial_scale: factor that the coordinates of boxes are multiplied by.
        sampling_ratio: :math:`n_y` and :math:`n_x`; if it is not positive, :math:`n_y = \lceil h / PH \rceil` and
            :math:`n_x` likewise, for each box of :math:`h \times w` pixels of the input.

    Returns:
        ``[K, C, PH, PW]``, in the dtype and memory format of ``input``.

    Raises:
        RuntimeError: shapes, dtypes or devices are not compatible, or a box names an image that does not exist.
        AssertionError: ``boxes`` is neither a ``[K, 5]`` tensor nor a list of ``[L, 4]`` tensors.
        ValueError: ``boxes`` is an empty list, or ``output_size`` is neither a number nor a pair.
    """
    if is_proxy(input, boxes):
        return record_call(ps_roi_align, **locals())
    return _op(
        input, regions_of("ps_roi_align", boxes), spatial_scale, *bins_of("ps_roi_align", output_size), sampling_ratio
    )


@not_scriptable
class PSRoIAlign(nn.Module):
    """Module that calls :func:`ps_roi_align`; a drop-in for :class:`torchvision.ops.PSRoIAlign`."""

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """Call :func:`ps_roi_align`, which describes the arguments."""
        return ps_roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, sampling_ratio={self.sampling_ratio}"
        )


def _axes(
    rois: Tensor, spatial_scale: float, bins: Sequence[int], sampling_ratio: int, size: MapSize
) -> tuple[SampledAxis, SampledAxis, Tensor]:
    """Where bins sample rows and columns, and by what the sum of the samples is divided, ``[K]``."""
    x1, y1, x2, y2 = (rois[:, 1:] * spatial_scale - 0.5).unbind(1)
    y = SampledAxis(y1, y2 - y1, bins[0], sampling_ratio, size.height)
    x = SampledAxis(x1, x2 - x1, bins[1], sampling_ratio, size.width)
    return y, x, y.count * x.count


def _fake(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, sampling_ratio: int
) -> Tensor:
    shape = check_position_sensitive("ps_roi_align", input, rois, (pooled_height, pooled_width))
    return empty_regions(input, shape)


def forward(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    *,
    pixels: type[Pixels] = Pixels,
) -> Tensor:
    """The operator, with its loops over samples as they are in ``pixels``."""
    _, _, *bins = check_position_sensitive("ps_roi_align", input, rois, (pooled_height, pooled_width))
    dtype, memory_format = input.dtype, suggest_memory_format(input)
    rois = rois.to(accumulate_dtype(dtype))
    size = MapSize(*input.shape)
    y, x, count = _axes(rois, spatial_scale, bins, sampling_ratio, size)
    image = images_of("ps_roi_align", rois, size.batch)
    out = pixels(image, size, bins, position_sensitive=True).mean_of_samples(input, y, x, count)
    return out.to(dtype).contiguous(memory_format=memory_format)


def backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    size: Sequence[Any],
    sampling_ratio: int,
    *,
    pixels: type[Pixels] = Pixels,
) -> Tensor:
    """The gradient of the input."""
    size = MapSize(*size)
    bins = grad.shape[2:]
    rois = rois.to(accumulate_dtype(grad.dtype))
    y, x, count = _axes(rois, spatial_scale, bins, sampling_ratio, size)
    image = images_of("ps_roi_align", rois, size.batch)
    return pixels(image, size, bins, position_sensitive=True).spread_to_samples(grad, y, x, count)


_op = define_op(
    "ps_roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio) -> Tensor",
    family="regions",
    decomposition=forward,
    fake=_fake,
    gradient=Gradient(
        backward,
        of="input",
        takes="rois, spatial_scale, input.shape, sampling_ratio",
        check=check_grad,
        untraceable=adaptive_grid,
    ),
    autocast=False,  # the low precisions are computed in float32 as it is, and the boxes are never converted
    untraceable=adaptive_grid,
    fold=on_all_images,
)


@serves_torchvision("ps_roi_align")
def _torchvision(*args: Any) -> tuple[Tensor, Tensor]:
    out = _op(*args)
    return out, channel_mapping(out)


@serves_torchvision("_ps_roi_align_backward")
def _torchvision_backward(
    grad: Tensor, rois: Tensor, channel_mapping: Tensor, spatial_scale: float, *bins_and_size: Any
) -> Tensor:
    _, _, sampling_ratio, *size = bins_and_size
    return _op.backward(grad, rois, spatial_scale, size, sampling_ratio)
