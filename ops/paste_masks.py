"""Masks of detected objects, each in an image of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gradients import Gradient
from .registry import accumulate_dtype, check, define_op
from .transforms import as_one_batch


def paste_masks(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Resize masks bilinearly, each to the size of its box in an image of zeros.

    A mask is resized as :func:`torch.nn.functional.interpolate` does it without ``align_corners``, to as many pixels as
    the box has, of which there is one at least. What is outside of the image is left out.

    Args:
        masks: ``[N, 1, h, w]`` of a floating dtype; low precisions are computed in float32.
        boxes: ``[N, 4]`` of int64, rows of (x1, y1, x2, y2), which are pixels that belong to the box. One that is
            further than 2^40 pixels away counts as that far.
        size: height and width of the images.

    Returns:
        ``[N, 1, *size]``.

    Raises:
        RuntimeError: shapes, dtypes or devices are not compatible.
    """
    return _op(masks, boxes, *size)


def _check(masks: Tensor, boxes: Tensor, height: int, width: int) -> None:
    name = "paste_masks"
    shape = tuple(masks.shape)
    check(name, masks.dim() == 4 and shape[1] == 1, f"masks must be [N, 1, h, w], got {shape}")
    check(name, shape[2] > 0 and shape[3] > 0, f"masks must have a positive height and width, got {shape}")
    check(name, masks.is_floating_point(), f"masks must be of a floating dtype, got {masks.dtype}")
    check(name, boxes.dim() == 2 and boxes.shape[1] == 4, f"boxes must be [N, 4], got {tuple(boxes.shape)}")
    count = boxes.shape[0]
    check(name, count == shape[0], f"boxes must be one for each of masks; there are {count} and {shape[0]} masks")
    check(name, boxes.dtype == torch.int64, f"boxes must be of int64, got {boxes.dtype}")
    check(name, boxes.device == masks.device, f"boxes must be on {masks.device}, got {boxes.device}")
    check(name, height >= 0 and width >= 0, f"size must not be negative, got {height} x {width}")


def _fake(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    _check(masks, boxes, height, width)
    return masks.new_empty((masks.shape[0], 1, height, width))


def _taps(boxes: Tensor, axis: int, size: int, source: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """How ``source`` pixels of masks are stretched over their boxes along an axis.

    Returns:
        ``[N, 1, size]`` each: for each of ``size`` pixels of an image the one of the mask at or before it, what the
        next one has of it (0 to 1, and 0 where there is none), and whether it is in the box.
    """
    at = torch.arange(size, device=boxes.device)
    begin, last = (boxes[:, side, None, None].clamp(-(2**40), 2**40) for side in (axis, axis + 2))
    scale = source / (last - begin + 1).clamp(min=1).to(dtype)
    position = (((at - begin).to(dtype) + 0.5) * scale - 0.5).clamp(0, source - 1)
    low = position.floor()
    return low.long(), position - low, (at >= begin) & (at <= last)


def _decomposition(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    _check(masks, boxes, height, width)
    rows, columns = masks.shape[2:]
    dtype = accumulate_dtype(masks.dtype)
    left, right_part, in_columns = _taps(boxes, 0, width, columns, dtype)  # [N, 1, W]
    above, below_part, in_rows = (taps.mT for taps in _taps(boxes, 1, height, rows, dtype))  # [N, H, 1]

    def between(values: Tensor, dim: int, low: Tensor, part: Tensor) -> Tensor:
        size = list(values.shape)
        size[dim] = low.shape[dim]
        high = (low + 1).clamp(max=values.shape[dim] - 1)
        return torch.lerp(values.gather(dim, low.expand(size)), values.gather(dim, high.expand(size)), part)

    lines = between(masks[:, 0].to(dtype), 2, left, right_part)  # [N, h, W]
    pasted = between(lines, 1, above, below_part)  # [N, H, W]
    return pasted.to(masks.dtype).where(in_rows & in_columns, 0)[:, None]


def _backward(grad: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """``[N, 1, h, w]``."""
    dtype = accumulate_dtype(grad.dtype)
    left, right_part, in_columns = _taps(boxes, 0, grad.shape[3], size[3], dtype)
    above, below_part, in_rows = _taps(boxes, 1, grad.shape[2], size[2], dtype)
    inside = grad[:, 0].to(dtype).where(in_rows.mT & in_columns, 0)  # [N, H, W]
    rows, columns = _weights(above, below_part, size[2]), _weights(left, right_part, size[3])  # [N, h, H], [N, w, W]
    with torch.autocast(grad.device.type, enabled=False):  # as the forward, in float32 at least
        return (rows @ inside @ columns.mT)[:, None]


def _weights(low: Tensor, part: Tensor, source: int) -> Tensor:
    """What each of ``source`` pixels counts in each of an image, of what `_taps` returns."""
    pixel = torch.arange(source, device=low.device)[:, None]
    return (1 - part).where(pixel == low, 0) + part.where(pixel == low + 1, 0)


_op = define_op(
    "paste_masks(Tensor masks, Tensor boxes, SymInt height, SymInt width) -> Tensor",
    decomposition=_decomposition,
    fake=_fake,
    gradient=Gradient(_backward, of="masks", takes="boxes, masks.shape"),
    autocast=False,  # it computes in float32 at least
    fold=as_one_batch("masks", "boxes"),
)
