"""Models of several libraries in one form: one image in, a dictionary of what is detected in it out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OneImage(nn.Module):
    """Wrap a detector with torchvision's interface so that it takes one image and returns its detections, instead of
    lists of them.

    Attributes:
        smallest: the fewest pixels that an image may be high and wide, where any size is allowed.
        divisor: what the height and width must be multiples of.
    """

    smallest: int = 2
    divisor: int = 1

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.training = detector.training  # its own alone

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.detector([image])[0]


class OneImageOfTransformers(nn.Module):
    """Wrap a model of transformers that detects or segments objects likewise.

    The image is what the model's image processor would make of one: resized and normalized. What transformers leaves
    to that processor afterwards is done here: a model with ``pred_boxes`` gives "scores", "labels" and "boxes",
    corners in pixels of this image; one with ``masks_queries_logits`` instances: "scores", "labels", "masks",
    ``[N, 1, H, W]`` with 1 inside, and "boxes" around these. Best first.

    Scores are probabilities of a query and class, all of them independent of each other or, in models with a class for
    nothing, not. Those of masks are multiplied by the mean probability inside the mask. A model that takes text
    (Grounding DINO) has the tokens of its prompt for classes, and the best one of each query counts.

    Args:
        threshold: scores above it are detections.
        inputs: what the model is called with besides ``pixel_values``.
    """

    smallest: int = 128  # where the coarsest map has two rows
    divisor: int

    def __init__(self, model: nn.Module, threshold: float = 0.5, inputs: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.threshold = threshold
        self.names = tuple(inputs or {})
        for name, tensor in (inputs or {}).items():
            self.register_buffer(f"input_{name}", tensor)
        self.config: Any = model.config
        self.divisor = _divisor(self.config)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        inputs = {name: getattr(self, f"input_{name}") for name in self.names}
        height, width = image.shape[1:]
        outputs = self.model(pixel_values=image[None], **inputs)
        if hasattr(outputs, "pred_boxes"):
            found = self._boxes(outputs.logits[0], outputs.pred_boxes[0], height, width, "input_ids" in inputs)
        elif hasattr(outputs, "masks_queries_logits"):
            found = self._masks(outputs.class_queries_logits[0], outputs.masks_queries_logits[0], (height, width))
        else:
            raise ValueError(
                f"{type(self.model).__name__} gives neither pred_boxes nor masks_queries_logits; it gives "
                f"{', '.join(outputs)}"
            )
        kept = found["scores"] > self.threshold
        return {name: value[kept] for name, value in found.items()}

    def _boxes(self, logits: Tensor, boxes: Tensor, height: int, width: int, text: bool) -> dict[str, Tensor]:
        """Of logits ``[Q, C]`` and boxes ``[Q, 4]``, rows of (centre x, y, width, height) as parts of the image."""
        nothing = logits.shape[1] == self.config.num_labels + 1 and not text
        scores = logits.softmax(1)[:, :-1] if nothing else logits.sigmoid()
        if nothing or text:
            best, label = scores.max(1)
            scores, query = best.sort(descending=True)
            labels = label[query]
        else:
            scores, query, labels = _best(scores)
        centre, size = boxes.float()[query].split(2, dim=1)
        corners = torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=1)
        sides = [torch.full((1,), side, dtype=corners.dtype, device=corners.device) for side in (width, height)]
        return {"scores": scores, "labels": labels, "boxes": corners * torch.cat(sides * 2)}

    def _masks(self, logits: Tensor, masks: Tensor, size: Any) -> dict[str, Tensor]:
        """Of logits ``[Q, C + 1]``, the last for nothing, and masks ``[Q, h, w]``."""
        scores, query, labels = _best(logits.softmax(1)[:, :-1])
        masks = F.interpolate(masks[None], size=size, mode="bilinear")[0, query]
        inside = masks > 0
        area = inside.sum((1, 2))
        scores = scores * (masks.sigmoid() * inside).sum((1, 2)) / (area + 1e-6)
        scores, order = scores.sort(descending=True)
        inside = inside[order]
        scores = scores.where(area[order] > 0, -1)  # transformers gives none for an empty mask
        found = {"scores": scores, "labels": labels[order], "boxes": _around(inside)}
        return {**found, "masks": inside[:, None].to(masks.dtype)}


def _best(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of scores ``[Q, C]`` the best Q, and their queries and classes."""
    queries, classes = scores.shape
    best, place = scores.flatten().topk(queries)
    return best, place // classes, place % classes


def _around(inside: Tensor) -> Tensor:
    """The smallest boxes with all pixels that are set of masks ``[N, H, W]``."""
    sides = []
    for axis in (1, 2):  # columns, which lie along x, first
        hit = inside.any(axis)  # [N, side]
        at = torch.arange(hit.shape[1], device=inside.device)
        sides.append((at.where(hit, hit.shape[1]).amin(1), at.where(hit, -1).amax(1) + 1))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], dim=1).float()


def _divisor(config: Any) -> int:
    """What the sides of an image must be multiples of: maps are upsampled and joined with finer ones, or a map is cut
    into windows of patches."""
    backbone = getattr(config, "backbone_config", None)
    windows = getattr(backbone, "num_windows_side", getattr(backbone, "num_windows", 0))
    return windows * getattr(backbone, "patch_size", 1) or max(getattr(config, "feat_strides", [1]))


def one_image(
    model: nn.Module, threshold: float | None = None, inputs: Mapping[str, Tensor] | None = None
) -> OneImage | OneImageOfTransformers:
    """A model, of transformers or with torchvision's interface, that takes one image.

    Raises:
        ValueError: the model is not of transformers, and ``threshold`` or ``inputs`` is given.
    """
    modeling = sys.modules.get("transformers.modeling_utils")  # which no model of theirs is without
    if modeling is not None and isinstance(model, modeling.PreTrainedModel):
        return OneImageOfTransformers(model, 0.5 if threshold is None else threshold, inputs)
    for name, value in {"threshold": threshold, "inputs": inputs}.items():
        if value is not None:
            raise ValueError(f"export_detector: {name} is for models of transformers, got {type(model).__name__}")
    return OneImage(model)
