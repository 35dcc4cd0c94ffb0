"""torchvision's segmentation models, which are a classifier's layers at a higher resolution, and a head.

They are measured as classifiers are.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from . import classifiers
from .classifiers import case


class OneMap(nn.Module):
    """A model's map of classes alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)["out"]


@dataclasses.dataclass(frozen=True)
class Problem(classifiers.Problem):
    """A segmentation model of torchvision, and the images that it gets."""

    def make(self) -> nn.Module:
        from torchvision.models import segmentation

        return OneMap(getattr(segmentation, self.name)(weights=None, weights_backbone=None))


_MODELS = ("deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")

SUITE = dataclasses.replace(
    classifiers.SUITE,
    name="segmentation",
    description="torchvision's segmentation models with random weights, with accelerate() and without",
    remark=classifiers.REMARK,
    cases=tuple(case(Problem(name, 1, 520)) for name in _MODELS),
)
