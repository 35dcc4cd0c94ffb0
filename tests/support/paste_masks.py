"""Masks with boxes, and an oracle, for the tests of what paste_masks means and compiles to."""

from __future__ import annotations

import dataclasses
import zlib

import torch
import torch.nn.functional as F
from inductor_vision.tests.support.layouts import arrange
from torch import Tensor

OP = torch.ops.inductor_vision.paste_masks.default
FAR = 2**62

# In an image of 40 x 50: inside, across each border, around it, of one pixel, of none, and nowhere near.
BOXES = (
    (5, 6, 30, 20),
    (-9, 4, 12, 30),
    (30, 20, 80, 60),
    (-20, -30, 70, 90),
    (7, 8, 7, 8),
    (9, 9, 3, 20),
    (-40, 0, -1, 39),
    (50, 5, 60, 9),
    (0, 0, 49, 39),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a call looks like.

    Attributes:
        size: of a mask, ``(h, w)``.
        image: height and width of the images.
        layout: memory layout of the masks, one of ``LAYOUTS``.
    """

    boxes: tuple[tuple[int, int, int, int], ...] = BOXES
    size: tuple[int, int] = (7, 10)
    image: tuple[int, int] = (40, 50)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Masks and boxes; they depend on the description alone."""
        generator = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        masks = torch.randn(len(self.boxes), 1, *self.size, generator=generator, dtype=torch.float64)
        return arrange(masks.to(self.dtype), self.layout), torch.tensor(self.boxes, dtype=torch.int64).reshape(-1, 4)

    @property
    def positional(self) -> tuple[Tensor, Tensor, int, int]:
        return *self.tensors(), *self.image

    @property
    def positional_backward(self) -> tuple[Tensor, Tensor, list[int]]:
        masks, boxes = self.tensors()
        return torch.randn(len(boxes), 1, *self.image, dtype=self.dtype), boxes, list(masks.shape)


CASES = {
    "any": Case(),
    "one pixel": Case(size=(1, 1)),
    "far away": Case(boxes=((-FAR, 3, FAR, 9), (FAR, FAR, -FAR, -FAR), (2, -FAR, 9, FAR))),
    "large masks": Case(size=(60, 33)),
    "bands of rows": Case(boxes=((3, 50, 20, 150), (0, 64, 32, 127)), image=(200, 33)),
    "wide": Case(boxes=((2, 1, 4500, 7), (4000, 0, 6000, 8)), image=(9, 5000)),
    "no masks": Case(boxes=()),
    "no pixels": Case(image=(0, 5)),
}


def oracle(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Mask by mask, resized by aten in float64, as torchvision has it."""
    images = torch.zeros(len(masks), 1, height, width, dtype=torch.float64)
    for mask, box, image in zip(masks.double(), boxes.tolist(), images):
        x1, y1, x2, y2 = (min(max(side, -(2**40)), 2**40) for side in box)
        if x2 < x1 or y2 < y1:
            continue
        columns, rows = x2 - x1 + 1, y2 - y1 + 1
        left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2 + 1, width), min(y2 + 1, height)
        if left >= right or top >= bottom:
            continue
        if columns > 2**40:  # the image is in the middle of one pixel of the mask, or of two
            mask, x1, columns = mask[..., (masks.shape[3] - 1) // 2 : masks.shape[3] // 2 + 1].mean(2, True), 0, width
        if rows > 2**40:
            mask, y1, rows = mask[:, (masks.shape[2] - 1) // 2 : masks.shape[2] // 2 + 1].mean(1, True), 0, height
        resized = F.interpolate(mask[None], size=(rows, columns), mode="bilinear")[0, 0]
        image[0, top:bottom, left:right] = resized[top - y1 : bottom - y1, left - x1 : right - x1]
    return images
