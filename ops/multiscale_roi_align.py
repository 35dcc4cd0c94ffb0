"""RoIAlign on a pyramid of maps, each region on the one that suits its size: https://arxiv.org/abs/1612.03144."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .regions import bins_of, regions_of
from .registry import is_proxy, not_scriptable, pair, record_call, replaces_torchvision
from .roi_align import align_on_levels


@not_scriptable
def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = -1,
    *,
    canonical_scale: float = 224,
    canonical_level: int = 4,
    aligned: bool = False,
) -> Tensor:
    r"""RoIAlign on a pyramid of feature maps: one operator, whose shapes do not depend on where the boxes are.

    A box of area :math:`a` is pooled from the map of level

    .. math:: \Big\lfloor l_0 + \log_2 \frac{\sqrt a}{s_0} + 10^{-6} \Big\rfloor

    or of the nearest level that there is. A map of level :math:`l` has the scale :math:`2^{-l}`; :math:`s_0` is
    ``canonical_scale`` and :math:`l_0` is ``canonical_level``. A box of negative area, or with NaN, is on no level, and
    its result is zero. If there is a single map, all boxes are pooled from it. Values are those of
    :class:`torchvision.ops.MultiScaleRoIAlign`.

    Args:
        features: the maps, in order of decreasing resolution, each ``[B, C, H_l, W_l]`` with the same B, C and dtype.
        boxes: ``[K, 5]``, rows of (image, x1, y1, x2, y2), or a list of ``[L, 4]`` with the boxes of each image; in
            pixels of the image.
        output_size: ``(PH, PW)``, or one number for both.
        spatial_scales: :math:`2^{-l}` for each map; each is half of the one before.
        sampling_ratio, aligned: as for :func:`inductor_vision.roi_align`.

    Returns:
        ``[K, C, PH, PW]``, in the dtype and memory format of the first map.

    Raises:
        RuntimeError: shapes, dtypes or devices are not compatible, or a box names an image that does not exist.
        AssertionError, ValueError: ``boxes``, ``output_size`` or ``spatial_scales`` are not as described.
    """
    if is_proxy(features, boxes):
        return record_call(multiscale_roi_align, **locals())
    rois = regions_of("multiscale_roi_align", boxes)
    if len(spatial_scales) != len(features) or not features:
        raise ValueError(
            "multiscale_roi_align: there must be a spatial scale for each feature map, and at least one, "
            f"got {len(features)} maps and {len(spatial_scales)} scales"
        )
    levels = None
    if len(features) > 1:
        finest, coarsest = _finest_and_coarsest(spatial_scales)
        if coarsest - finest != len(features) - 1:
            raise ValueError(
                "multiscale_roi_align: spatial_scales must be powers of two, each the half of the one before, "
                f"got {list(spatial_scales)}"
            )
        levels = assign_levels(rois, finest, coarsest, canonical_scale, canonical_level)
    return align_on_levels(
        features, rois, levels, spatial_scales, bins_of("multiscale_roi_align", output_size), sampling_ratio, aligned
    )


def _finest_and_coarsest(spatial_scales: Sequence[float]) -> tuple[int, int]:
    """The levels of the first and the last map."""
    return int(-math.log2(spatial_scales[0])), int(-math.log2(spatial_scales[-1]))


def assign_levels(
    rois: Tensor, finest: int, coarsest: int, canonical_scale: float, canonical_level: int, eps: float = 1e-6
) -> Tensor:
    """The level of each region less ``finest``, int64 ``[K]``; -1 for a region of negative area, or with NaN."""
    _, x1, y1, x2, y2 = rois.unbind(1)
    scale = ((x2 - x1) * (y2 - y1)).sqrt()
    level = (canonical_level + torch.log2(scale / canonical_scale) + eps).floor().clamp(finest, coarsest) - finest
    return level.nan_to_num(-1).long()


def _of_one_dtype(features: Sequence[Tensor]) -> list[Tensor]:
    """Maps in the dtype of the first; under autocast they may differ."""
    return [feature.to(features[0].dtype) for feature in features]


def _infer_scales(features: Sequence[Tensor], image_shapes: Sequence[Sequence[int]]) -> list[float]:
    """The scale of each map, a power of two, where the largest of the images determines it."""
    if not image_shapes:
        raise ValueError("MultiScaleRoIAlign: image_shapes must not be empty")
    height = max(shape[0] for shape in image_shapes)
    return [2.0 ** round(math.log2(feature.shape[2] / height)) for feature in features]


@torch.fx.wrap  # it looks at what torch.fx does not know
def _features_and_scales(
    x: Mapping[str, Tensor], names: Sequence[str], image_shapes: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[float]]:
    """The maps that are pooled from, and the scale of each."""
    features = _of_one_dtype([feature for name, feature in x.items() if name in names])
    if not features:
        raise ValueError(f"MultiScaleRoIAlign: none of {list(names)} is among the maps {list(x)}")
    return features, _infer_scales(features, image_shapes)


@not_scriptable
class MultiScaleRoIAlign(nn.Module):
    """Module that calls :func:`multiscale_roi_align`; a drop-in for :class:`torchvision.ops.MultiScaleRoIAlign`.

    Args:
        featmap_names: names of the maps that are pooled from.
        output_size, sampling_ratio, canonical_scale, canonical_level: as for :func:`multiscale_roi_align`.
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: float = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        self.featmap_names = featmap_names
        self.output_size = pair("output_size", output_size)
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(
        self, x: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[Sequence[int]]
    ) -> Tensor:
        """Pool the boxes of each image from the maps.

        Args:
            x: maps by name, from fine to coarse.
            boxes: ``[L, 4]`` for each image.
            image_shapes: (height, width) of each image that the maps were made of. The largest determines the scales of
                the maps, which are rounded to powers of two.
        """
        features, scales = _features_and_scales(x, self.featmap_names, image_shapes)
        return multiscale_roi_align(
            features,
            boxes,
            self.output_size,
            scales,
            self.sampling_ratio,
            canonical_scale=self.canonical_scale,
            canonical_level=self.canonical_level,
        )

    def extra_repr(self) -> str:
        return (
            f"featmap_names={self.featmap_names}, output_size={self.output_size}, sampling_ratio={self.sampling_ratio}"
        )


# torchvision's own module runs Python that depends on data, and keeps what it finds out in its first call, for which a
# compiled model would be compiled again.


@replaces_torchvision("ops.poolers.MultiScaleRoIAlign.forward")
def _torchvision_forward(
    module: Any, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
) -> Tensor:
    features = [feature for name, feature in x.items() if name in module.featmap_names]
    scales = module.scales or _infer_scales(features, image_shapes)
    rois = regions_of("multiscale_roi_align", boxes)
    levels = None
    if len(features) > 1:
        finest_and_coarsest = _finest_and_coarsest(scales)
        levels = assign_levels(rois, *finest_and_coarsest, module.canonical_scale, module.canonical_level)
    size, ratio = module.output_size, module.sampling_ratio
    return align_on_levels(_of_one_dtype(features), rois, levels, scales, size, ratio, aligned=False)
