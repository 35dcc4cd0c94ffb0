"""RoIPool, the maximum over the bins of regions: https://arxiv.org/abs/1504.08083."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from .gradients import Gradient
from .regions import (
    Pixels,
    PooledAxis,
    bins_of,
    check_grad,
    check_regions,
    empty_regions,
    images_of,
    on_all_images,
    pooled_bins,
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
def roi_pool(
    input: Tensor, boxes: Tensor | Sequence[Tensor], output_size: int | Sequence[int], spatial_scale: float = 1.0
) -> Tensor:
    r"""Take the maximum of the input over the bins of each box; a drop-in for :func:`torchvision.ops.roi_pool`.

    .. math::
        \text{out}[k, c, p, q] = \max_{y \in Y_p, x \in X_q} \text{input}[b_k, c, y, x]

        Y_p = \Big\{ y : y_1 + \Big\lfloor p\,\frac{h}{PH} \Big\rfloor \le y <
            y_1 + \Big\lceil (p + 1)\,\frac{h}{PH} \Big\rceil,\; 0 \le y < H \Big\}

    and :math:`X_q` likewise, where :math:`y_1` and :math:`y_2` are the box's coordinates times ``spatial_scale``,
    rounded to integers (halves away from zero), and :math:`h = \max(y_2 - y_1 + 1, 1)`. If maxima are equal, the first
    of them, row by row, gets the gradient. NaN is never the maximum. A bin without pixels is zero, and so are all bins
    of a box with a coordinate that is NaN or infinite.

    Args:
        input: ``[B, C, H, W]``, float32, float64, bfloat16 or float16.
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
        return record_call(roi_pool, **locals())
    out, _ = _op(input, regions_of("roi_pool", boxes), spatial_scale, *bins_of("roi_pool", output_size))
    return out


@not_scriptable
class RoIPool(nn.Module):
    """Module that calls :func:`roi_pool`; a drop-in for :class:`torchvision.ops.RoIPool`."""

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """Call :func:`roi_pool`, which describes the arguments."""
        return roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"


# Where a bin's search begins, in every dtype: what is not greater than this is not found.
_LOWEST = -torch.finfo(torch.float32).max


def _fake(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Tensor, Tensor]:
    size = check_regions("roi_pool", [input], rois, (pooled_height, pooled_width))
    out = empty_regions(input, (rois.shape[0], size.channels, pooled_height, pooled_width))
    return out, torch.empty_like(out, dtype=torch.int32)


def forward(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    *,
    pixels: type[Pixels] = Pixels,
) -> tuple[Tensor, Tensor]:
    """The maxima, and where in its plane of the input each is: int32, row by row, -1 where there is none. The loop over
    pixels is as it is in ``pixels``."""
    bins = pooled_height, pooled_width
    size = check_regions("roi_pool", [input], rois, bins)
    dtype, memory_format = input.dtype, suggest_memory_format(input)
    rois = rois.to(accumulate_dtype(dtype))
    x1, y1, x2, y2 = (rois[:, 1:] * spatial_scale).unbind(1)
    y = PooledAxis(y1, y2, bins[0], inclusive=True, limit=size.height)
    x = PooledAxis(x1, x2, bins[1], inclusive=True, limit=size.width)
    image = images_of("roi_pool", rois, size.batch)
    best, argmax = pixels(image, size, bins).maximum_of_pixels(input, y, x, _LOWEST, rois.dtype)
    return best.contiguous(memory_format=memory_format), argmax.contiguous(memory_format=memory_format)


def _check_backward(op: str, grad: Tensor, rois: Tensor, argmax: Tensor, size: Sequence[Any]) -> None:
    check_grad(op, grad, rois, size)
    check(
        op,
        argmax.dtype == torch.int32 and argmax.shape == grad.shape,
        f"argmax must be int32 of grad's shape {tuple(grad.shape)}, got {argmax.dtype} {tuple(argmax.shape)}",
    )
    check(op, argmax.device == grad.device, f"argmax must be on {grad.device}, got {argmax.device}")


def _backward(grad: Tensor, rois: Tensor, argmax: Tensor, size: Sequence[Any]) -> Tensor:
    """The gradient of the input; an ``argmax`` outside the plane has none."""
    batch, channels, height, width = size
    image = images_of("roi_pool", rois, batch)
    found = (argmax >= 0) & (argmax < height * width)
    plane = image[:, None, None, None] * channels + torch.arange(channels, device=grad.device)[:, None, None]
    index = (plane * (height * width) + argmax).where(found, 0)  # [K, C, PH, PW]
    total = grad.new_zeros(batch * channels * height * width, dtype=accumulate_dtype(grad.dtype))
    total = total.scatter_add(0, index.flatten(), grad.to(total.dtype).where(found, 0).flatten())
    return total.reshape(batch, channels, height, width)


_op = define_op(
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor out, Tensor argmax)",
    family="regions",
    decomposition=forward,
    fake=_fake,
    gradient=Gradient(_backward, of="input", takes="rois, argmax, input.shape", check=_check_backward),
    autocast=False,  # a maximum is the same in every precision
    untraceable=pooled_bins,
    fold=on_all_images,
)


@serves_torchvision("roi_pool")
def _torchvision(*args: Any) -> tuple[Tensor, Tensor]:
    return _op(*args)


@serves_torchvision("_roi_pool_backward")
def _torchvision_backward(grad: Tensor, rois: Tensor, argmax: Tensor, *scale_and_sizes: Any) -> Tensor:
    _, _, _, *size = scale_and_sizes
    return _op.backward(grad, rois, argmax, size)
