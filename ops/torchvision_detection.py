"""Pieces of torchvision's detectors that break a graph, written so that they do not; each gives what the original does.

:func:`inductor_vision.accelerate_torchvision` puts them in the originals' place in compiled code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registry import accumulate_dtype, replaces_torchvision


@replaces_torchvision("models.detection._utils.BoxCoder.decode")
def decode(coder: Any, rel_codes: Tensor, boxes: list[Tensor]) -> Tensor:
    """The original asks whether there are boxes, of which the number depends on data.

    Args:
        rel_codes: ``[N, 4 C]``, what to change of each box for each class.
        boxes: ``[L, 4]`` of each image, N in all.

    Returns:
        ``[N, C, 4]``; the original, where N is 0, ``[0, 4 C]``.
    """
    return coder.decode_single(rel_codes.flatten(0, -2), torch.cat(boxes)).unflatten(1, (-1, 4))


@replaces_torchvision("models.detection.roi_heads.paste_masks_in_image")
def paste_masks_in_image(masks: Tensor, boxes: Tensor, img_shape: tuple[int, int], padding: int = 1) -> Tensor:
    """The original resizes mask by mask, each to the size of its box.

    Bilinear weights are a product of those of rows and of columns, which are matrices here. A NaN in a mask is then
    everywhere in its box.

    Args:
        masks: ``[N, 1, M, M]``.
        boxes: ``[N, 4]``.
        img_shape: height and width of the image.

    Returns:
        ``[N, 1, H, W]``.
    """
    from torchvision.models.detection.roi_heads import expand_boxes, expand_masks

    masks, scale = expand_masks(masks, padding)
    x1, y1, x2, y2 = expand_boxes(boxes, scale).long().unbind(1)
    height, width = img_shape
    dtype = accumulate_dtype(masks.dtype)
    with torch.autocast(masks.device.type, enabled=False):
        rows, in_rows = _resizing(y1, y2, height, masks.shape[-2], dtype)
        columns, in_columns = _resizing(x1, x2, width, masks.shape[-1], dtype)
        pasted = rows @ masks[:, 0].to(dtype) @ columns.mT
    inside = in_rows[:, :, None] & in_columns[:, None, :]
    return pasted.to(masks.dtype).where(inside, 0)[:, None]


def _resizing(begin: Tensor, end: Tensor, size: int, source: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How ``source`` pixels are stretched over those from ``begin`` to ``end``, as
    :func:`torch.nn.functional.interpolate` does it without ``align_corners``.

    Returns:
        ``[N, size, source]``, what each counts for each of ``size`` pixels, and ``[N, size]``, whether these are among
        the ones from ``begin`` to ``end``.
    """
    at = torch.arange(size, device=begin.device)
    begin, end = begin[:, None], end[:, None]
    scale = source / (end - begin + 1).clamp(min=1).to(dtype)
    position = (((at - begin).to(dtype) + 0.5) * scale - 0.5).clamp(0, source - 1)
    low = position.floor()
    fraction = (position - low)[..., None]
    pixel = torch.arange(source, device=begin.device)
    weights = (1 - fraction).where(pixel == low[..., None], 0) + fraction.where(pixel == low[..., None] + 1, 0)
    return weights, (at >= begin) & (at <= end)
