"""Position-sensitive RoIPool, an average over bins with channels of their own: https://arxiv.org/abs/1605.06409."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from .gradients import Gradient
from .regions import (
    MapSize,
    Pixels,
    PooledAxis,
    bins_of,
    channel_mapping,
    check_grad,
    check_position_sensitive,
    empty_regions,
    images_of,
    on_all_images,
    pooled_bins,
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
def ps_roi_pool(
    input: Tensor, boxes: Tensor | Sequence[Tensor], output_size: int | Sequence[int], spatial_scale: float = 1.0
) -> Tensor:
    r"""Average the pixels in the bins of each box, where each bin has its own channels; a drop-in for
    :func:`torchvision.ops.ps_roi_pool`.

    .. math::
        \text{out}[k, c, p, q] = \frac{1}{|Y_p| |X_q|} \sum_{y \in Y_p} \sum_{x \in X_q}
            \text{input}[b_k, (c \cdot PH + p) \cdot PW + q, y, x]

        Y_p = \Big\{ y : y_1 + \Big\lfloor p\,\frac{h}{PH} \Big\rfloor \le y <
            y_1 + \Big\lceil (p + 1)\,\frac{h}{PH} \Big\rceil,\; 0 \le y < H - 1 \Big\}

    and :math:`X_q` likewise, where :math:`y_1` and :math:`y_2` are the box's coordinates times ``spatial_scale``,
    rounded to integers (halves away from zero), and :math:`h = \max(y_2 - y_1, 1)`. As in torchvision, the last row and
    column of the input are never read, but the gradient is that of bins which include them. A bin without pixels is
    zero, and so are all bins of a box with a coordinate that is NaN or infinite.

    Args:
        input: ``[B, C * PH * PW, H, W]``, float32, float64, bfloat16 or float16; the low precisions are computed in
            float32.
        boxes: ``[K, 5]``, rows of (image, x1, y1, x2, y2), or a list of ``[L, 4]`` with the boxes of each image;
            float32 or the dtype of ``input``.
        output_size: ``(PH, PW)``, or one number for both.
        spatial_scale: factor that the coordinates of boxes are multiplied by.

    Returns:
        ``[K, C, PH, PW]``, in the dtype and memory format of ``input``.

    Raises:
        RuntimeError: shapes, dtypes or devices are not compatible, or a box names an image that does not exist.
        AssertionError: ``boxes`` is neither a ``[K, 5]`` tensor nor a list of ``[L, 4]`` tensors.
        ValueError: ``boxes`` is an empty list, or ``output_size`` is neither a number nor a pair.
    """
    if is_proxy(input, boxes):
        return record_call(ps_roi_pool, **locals())
    return _op(input, regions_of("ps_roi_pool", boxes), spatial_scale, *bins_of("ps_roi_pool", output_size))


@not_scriptable
class PSRoIPool(nn.Module):
    """Module that calls :func:`ps_roi_pool`; a drop-in for :class:`torchvision.ops.PSRoIPool`."""

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """Call :func:`ps_roi_pool`, which describes the arguments."""
        return ps_roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"


def _axes(
    rois: Tensor, spatial_scale: float, bins: Sequence[int], height: Any, width: Any
) -> tuple[PooledAxis, PooledAxis, Tensor]:
    """The rows and columns of bins that are cut off at height and width, and how many pixels each bin has, at least 1,
    in the dtype of the boxes, ``[K, PH, PW]``."""
    x1, y1, x2, y2 = (rois[:, 1:] * spatial_scale).unbind(1)
    y = PooledAxis(y1, y2, bins[0], inclusive=False, limit=height)
    x = PooledAxis(x1, x2, bins[1], inclusive=False, limit=width)
    return y, x, (y.size[:, :, None] * x.size[:, None, :]).clamp(min=1).to(rois.dtype)


def _fake(input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int) -> Tensor:
    return empty_regions(input, check_position_sensitive("ps_roi_pool", input, rois, (pooled_height, pooled_width)))


def forward(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    *,
    pixels: type[Pixels] = Pixels,
) -> Tensor:
    """The operator, with its loop over pixels as it is in ``pixels``."""
    _, _, *bins = check_position_sensitive("ps_roi_pool", input, rois, (pooled_height, pooled_width))
    dtype, memory_format = input.dtype, suggest_memory_format(input)
    rois = rois.to(accumulate_dtype(dtype))
    size = MapSize(*input.shape)
    y, x, area = _axes(rois, spatial_scale, bins, size.height - 1, size.width - 1)
    image = images_of("ps_roi_pool", rois, size.batch)
    out = pixels(image, size, bins, position_sensitive=True).mean_of_pixels(input, y, x, area)
    return out.to(dtype).contiguous(memory_format=memory_format)


def backward(
    grad: Tensor, rois: Tensor, spatial_scale: float, size: Sequence[Any], *, pixels: type[Pixels] = Pixels
) -> Tensor:
    """The gradient of the input."""
    size = MapSize(*size)
    bins = grad.shape[2:]
    rois = rois.to(accumulate_dtype(grad.dtype))
    y, x, area = _axes(rois, spatial_scale, bins, size.height, size.width)
    image = images_of("ps_roi_pool", rois, size.batch)
    return pixels(image, size, bins, position_sensitive=True).spread_to_pixels(grad, y, x, area)


_op = define_op(
    "ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) -> Tensor",
    family="regions",
    decomposition=forward,
    fake=_fake,
    gradient=Gradient(
        backward,
        of="input",
        takes="rois, spatial_scale, input.shape",
        check=check_grad,
        untraceable=pooled_bins,
    ),
    autocast=False,  # the low precisions are computed in float32 as it is, and the boxes are never converted
    untraceable=pooled_bins,
    fold=on_all_images,
)


@serves_torchvision("ps_roi_pool")
def _torchvision(*args: Any) -> tuple[Tensor, Tensor]:
    out = _op(*args)
    return out, channel_mapping(out)


@serves_torchvision("_ps_roi_pool_backward")
def _torchvision_backward(
    grad: Tensor, rois: Tensor, channel_mapping: Tensor, spatial_scale: float, *bins_and_size: Any
) -> Tensor:
    _, _, *size = bins_and_size
    return _op.backward(grad, rois, spatial_scale, size)
