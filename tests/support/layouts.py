"""Memory layouts of batches of feature maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LAYOUTS = (
    "contiguous",
    "channels_last",
    "sliced",
    "stepped",
    "transposed",
    "images_in_rows",
    "sliced_channels_last",
    "expanded",
)


def strides_of(values: Tensor) -> list[int]:
    """Where elements are: the strides of the dimensions that have more than one; those of the others say nothing."""
    return [stride for size, stride in zip(values.shape, values.stride()) if size > 1] if values.numel() else []


def has_both_formats(values: Tensor) -> bool:
    """Whether a batch is contiguous and channels_last at once, as one of a single channel is."""
    return values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last)


def arrange(values: Tensor, layout: str) -> Tensor:
    """A tensor of these [B, C, H, W] values in the given memory layout ("expanded": of the first image's values)."""
    batch, channels, height, width = values.shape
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return values[:1].contiguous().expand(values.shape)
    if layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "images_in_rows":
        return values.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    if layout == "stepped":
        room = values.new_full((batch, channels, height, 2 * width), math.nan)
        view = room[..., ::2]
    elif layout in ("sliced", "sliced_channels_last"):
        room = values.new_full((batch, channels + 5, height + 2, width + 3), math.nan)
        if layout == "sliced_channels_last":
            room = room.contiguous(memory_format=torch.channels_last)
        view = room[:, 3:-2, 1:-1, 2:-1]
    else:
        raise ValueError(f"no layout {layout!r}; there are: {', '.join(LAYOUTS)}")
    return view.copy_(values)
