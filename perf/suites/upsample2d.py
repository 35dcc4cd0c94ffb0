"""Resizing of images: those that detectors read, and maps of features that are enlarged.

The limit is a copy of as many bytes as image and result have.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import upsample2d as _defines_the_operators  # noqa: F401
from ...ops.registry import OPS
from .. import backends
from ..spec import Case, Contender, Job, Prepared, Suite


@dataclasses.dataclass(frozen=True)
class Resize:
    """``padding``: rows and columns of zeros, below and at the right."""

    channels: int
    size: tuple[int, int]
    to: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    mode: str = "bilinear"

    def __str__(self) -> str:
        sizes = f"{self.channels} ch, {'x'.join(map(str, self.size))} to {'x'.join(map(str, self.to))}"
        layout = ["channels_last"] if self.channels_last else []
        padding = [f"padded by {'x'.join(map(str, self.padding))}"] if any(self.padding) else []
        return ", ".join([self.mode, sizes, *padding, *layout, str(self.dtype).removeprefix("torch.")])

    @functools.cached_property
    def image(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, self.channels, *self.size, generator=generator).to(self.dtype)
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image


class _Ours(nn.Module):
    def __init__(self, problem: Resize) -> None:
        super().__init__()
        self.to_size, self.padding, self.mode = problem.to, problem.padding, problem.mode

    def forward(self, image: Tensor) -> Tensor:
        return OPS[f"upsample_{self.mode}2d"](image, self.to_size, False, None, None, self.padding)


class _Interpolate(_Ours):
    def forward(self, image: Tensor) -> Tensor:
        below, right = self.padding
        resized = F.interpolate(image, size=self.to_size, mode=self.mode)
        return F.pad(resized, (0, right, 0, below)) if below or right else resized


def _contender(kind: type[_Ours], prepare: str, **options: Any) -> Callable[[Job], Prepared]:
    def prepared(job: Job) -> Prepared:
        return getattr(backends, prepare)(kind(job.inputs), [job.inputs.image], **options)

    return prepared


def _copy(job: Job) -> Prepared:
    image = job.inputs.image
    return backends.copy(image.nbytes + _Interpolate(job.inputs)(image).nbytes)


def _reference(problem: Resize) -> Tensor:
    return _Interpolate(problem)(problem.image.double())


SUITE = Suite(
    name="upsample2d",
    description="resizing",
    reference=_reference,
    contenders=(
        Contender("ours-compiled", "ours", _contender(_Ours, "compiled", dynamic=False), compiled=True),
        Contender("ours-aoti", "ours", _contender(_Ours, "packaged"), compiled=True),
        Contender("eager", "peer", _contender(_Interpolate, "eager")),
        Contender("stock-compiled", "peer", _contender(_Interpolate, "compiled", dynamic=False), compiled=True),
        Contender("copy", "limit", _copy),
    ),
    cases=tuple(
        # Places that are rounded to float32 are off by 1e-4 in a row of a thousand pixels.
        Case(name, str(problem), lambda problem=problem: problem, 1e-2 if problem.dtype == torch.bfloat16 else 5e-4)
        for name, problem in (
            ("detector", Resize(3, (480, 640), (800, 1066), (0, 22))),
            ("detector-bf16", Resize(3, (480, 640), (800, 1066), (0, 22), torch.bfloat16)),
            ("ssd", Resize(3, (480, 640), (300, 300))),
            ("map", Resize(256, (50, 68), (100, 136), channels_last=True)),
            ("map-contiguous", Resize(256, (50, 68), (100, 136))),
            ("map-bicubic", Resize(64, (64, 64), (128, 128), mode="bicubic")),
            ("map-bicubic-channels-last", Resize(64, (64, 64), (128, 128), channels_last=True, mode="bicubic")),
            ("image-bicubic", Resize(3, (480, 640), (224, 224), mode="bicubic")),
        )
    ),
)
