"""Keypoints of a detected object from its heatmaps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import accumulate_dtype, check, define_op, register_no_gradient, replaces_torchvision
from .transforms import as_one_batch


@replaces_torchvision("models.detection.roi_heads.heatmaps_to_keypoints")
def heatmaps_to_keypoints(maps: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
    """Find the maximum of each heatmap, resized to its box; torchvision's function of this name, of Keypoint R-CNN.

    Maps are resized to the box's size, rounded up to whole pixels, by bicubic interpolation as
    :func:`torch.nn.functional.interpolate` does it without ``align_corners``. If maxima are equal, the first counts,
    row by row; NaN is greater than any number. Boxes have a width and a height of at least one pixel.

    Args:
        maps: ``[K, N, H, W]``, N heatmaps for each box, of a floating dtype.
        rois: ``[K, 4]``, rows of (x1, y1, x2, y2); integers count as float32.

    Returns:
        Float32 ``[K, N, 3]``, rows of (x, y, 1), and ``[K, N]``, the values of the heatmaps there. They have no
        gradient.

    Raises:
        RuntimeError: shapes, dtypes or devices are not compatible, or a box is not finite or has 2^31 pixels or more.
    """
    if not (rois.is_floating_point() or rois.is_complex()):
        rois = rois.float()
    peaks = _op(maps, rois)
    return torch.cat([peaks[..., :2], torch.ones_like(peaks[..., 2:])], dim=2), peaks[..., 2]


def check_arguments(maps: Tensor, rois: Tensor) -> None:
    name = "heatmaps_to_keypoints"
    shape = tuple(maps.shape)
    check(name, maps.dim() == 4, f"maps must be [K, N, H, W], got {shape}")
    check(name, shape[2] > 0 and shape[3] > 0, f"maps must have a positive height and width, got {shape}")
    check(name, rois.dim() == 2 and rois.shape[1] == 4, f"rois must be [K, 4], got {tuple(rois.shape)}")
    boxes = rois.shape[0]
    check(name, boxes == shape[0], f"rois must be one for each of maps; there are {boxes} and {shape[0]} maps")
    for what, tensor in (("maps", maps), ("rois", rois)):
        check(name, tensor.is_floating_point(), f"{what} must be of a floating dtype, got {tensor.dtype}")
    check(name, rois.device == maps.device, f"rois must be on {maps.device}, got {rois.device}")


def _fake(maps: Tensor, rois: Tensor) -> Tensor:
    check_arguments(maps, rois)
    return maps.new_empty((*maps.shape[:2], 3), dtype=torch.float32)


TOO_LARGE = "rois must be finite and of less than 2^31 pixels"


def sizes_of(rois: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where boxes begin, how long they are, and the pixels that maps are resized to, ``[K, (x, y)]`` each; and whether
    these are few enough, ``[K]``."""
    begin, end = rois.split(2, dim=1)
    lengths = (end - begin).clamp(min=1)
    pixels = lengths.ceil()
    return begin, lengths, pixels, rois.isfinite().all(1) & (pixels.double().prod(1) < 2**31)


def _decomposition(maps: Tensor, rois: Tensor) -> Tensor:
    """Float32 ``[K, N, 3]``, rows of (x, y, value)."""
    check_arguments(maps, rois)
    rois = rois.to(accumulate_dtype(rois.dtype))
    begin, lengths, pixels, fits = sizes_of(rois)
    for k in (~fits).nonzero().flatten().tolist():
        check("heatmaps_to_keypoints", False, f"{TOO_LARGE}, rois[{k}] is not")

    peaks = maps.new_empty((*maps.shape[:2], 3), dtype=torch.float32)
    for k, (width, height) in enumerate(pixels.long().tolist()):
        map = maps[k, :, None].to(accumulate_dtype(maps.dtype))
        resized = F.interpolate(map, size=(height, width), mode="bicubic").flatten(1)  # [N, height * width]
        position = resized.argmax(1, keepdim=True)
        place = torch.cat([position % width, position // width], dim=1)  # [N, (x, y)]
        peaks[k, :, :2] = (place.to(rois.dtype) + 0.5) * (lengths / pixels)[k] + begin[k]
        peaks[k, :, 2:] = resized.gather(1, position)
    return peaks


def _loop(**arguments: Any) -> str:
    return "each map is resized to a size of its own"


_op = define_op(
    "heatmaps_to_keypoints(Tensor maps, Tensor rois) -> Tensor",
    decomposition=_decomposition,
    fake=_fake,
    autocast=False,  # it computes in float32 at least
    untraceable=_loop,
    fold=as_one_batch("maps", "rois"),
)
register_no_gradient(_op)
