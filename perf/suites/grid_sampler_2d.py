"""Images sampled at the places that a grid gives, and the gradients of that.

The grid is a smooth one, as warps are, or a random one, which reads the image in no order. The limit is a copy of as
many bytes as image, grid and result have.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import grid_sampler_2d as _defines_the_operator  # noqa: F401
from .. import backends
from ..spec import Case, Contender, Job, Prepared, Suite

_MODES = "bilinear", "nearest", "bicubic"
_PADDINGS = "zeros", "border", "reflection"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """``modes``: of interpolation and padding, in aten's numbers, and whether corners are aligned; ``backward``: what
    is computed are the gradients of image and grid."""

    channels: int
    size: tuple[int, int]
    batch: int = 1
    to: tuple[int, int] | None = None
    modes: tuple[int, int, bool] = (0, 0, False)
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    smooth: bool = True
    backward: bool = False

    def __str__(self) -> str:
        interpolation, padding, align_corners = self.modes
        size = "x".join(map(str, self.size))
        to = f" at {'x'.join(map(str, self.to))}" if self.to else ""
        parts = [
            f"batch {self.batch}, {self.channels} ch, {size}{to}",
            f"{_MODES[interpolation]}, {_PADDINGS[padding]}",
            *(["align_corners"] if align_corners else []),
            *([] if self.smooth else ["random grid"]),
            *(["channels_last"] if self.channels_last else []),
            *(["gradients"] if self.backward else []),
            str(self.dtype).removeprefix("torch."),
        ]
        return ", ".join(parts)

    @functools.cached_property
    def tensors(self) -> list[Tensor]:
        """What is called: image and grid; the gradient of the result before them, where gradients are."""
        generator = torch.Generator().manual_seed(0)
        height, width = self.to or self.size
        image = torch.randn(self.batch, self.channels, *self.size, generator=generator)
        grad = torch.randn(self.batch, self.channels, height, width, generator=generator)
        if self.smooth:
            y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
            grid = torch.stack([x + 0.05 * torch.sin(5 * y), y + 0.05 * torch.cos(4 * x)], dim=-1)
            grid = grid.repeat(self.batch, 1, 1, 1)
        else:
            grid = torch.rand(self.batch, height, width, 2, generator=generator) * 2.2 - 1.1
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        maps = [tensor.to(self.dtype).contiguous(memory_format=layout) for tensor in (grad, image)]
        return [*(maps if self.backward else maps[1:]), grid.to(self.dtype)]

    def call(self, ops: Any, *tensors: Tensor) -> Any:
        """The call of the operator, this package's or aten's."""
        if self.backward:
            return ops.grid_sampler_2d_backward(*tensors, *self.modes, [True, True])
        return ops.grid_sampler_2d(*tensors, *self.modes)


def _contender(namespace: str, prepare: str, **options: Any) -> Callable[[Job], Prepared]:
    def prepared(job: Job) -> Prepared:
        function = backends.Function(functools.partial(job.inputs.call, getattr(torch.ops, namespace)))
        return getattr(backends, prepare)(function, job.inputs.tensors, **options)

    return prepared


def _copy(job: Job) -> Prepared:
    tensors: Sequence[Tensor] = job.inputs.tensors
    results = job.inputs.call(torch.ops.aten, *tensors)
    results = results if isinstance(results, tuple) else (results,)
    return backends.copy(sum(tensor.nbytes for tensor in (*tensors, *results)))


def _reference(problem: Sampling) -> Any:
    return problem.call(torch.ops.aten, *(tensor.double() for tensor in problem.tensors))


def _same(problem: Sampling) -> Sampling:
    return problem


# Places that are rounded to float32 are off by 1e-5 of a pixel in a row of some hundreds, to bfloat16 by a pixel.
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-12, torch.bfloat16: 0.5, torch.float16: 0.1}

SUITE = Suite(
    name="grid_sampler_2d",
    description="grid_sample",
    reference=_reference,
    contenders=(
        Contender("ours-compiled", "ours", _contender("inductor_vision", "compiled", dynamic=False), compiled=True),
        Contender("eager", "peer", _contender("aten", "eager")),
        Contender("stock-compiled", "peer", _contender("aten", "compiled", dynamic=False), compiled=True),
        Contender("copy", "limit", _copy),
    ),
    cases=tuple(
        Case(name, str(problem), functools.partial(_same, problem), _TOLERANCES[problem.dtype])
        for name, problem in (
            ("map", Sampling(64, (128, 128))),
            ("map-channels-last", Sampling(64, (128, 128), channels_last=True)),
            ("map-bf16", Sampling(64, (128, 128), dtype=torch.bfloat16)),
            ("map-bicubic", Sampling(64, (128, 128), modes=(2, 0, False))),
            ("map-nearest", Sampling(64, (128, 128), modes=(1, 0, False))),
            ("map-random", Sampling(64, (128, 128), smooth=False)),
            ("image", Sampling(3, (512, 512))),
            ("image-border", Sampling(3, (512, 512), modes=(0, 1, True))),
            ("image-bf16", Sampling(3, (512, 512), dtype=torch.bfloat16)),
            ("images", Sampling(3, (256, 256), batch=8)),
            ("look-up", Sampling(1, (46, 62), batch=2000, to=(7, 7), modes=(0, 0, True), smooth=False)),
            ("map-gradients", Sampling(64, (128, 128), backward=True)),
            ("map-gradients-channels-last", Sampling(64, (128, 128), backward=True, channels_last=True)),
            ("map-gradients-bf16", Sampling(64, (128, 128), backward=True, dtype=torch.bfloat16)),
            ("image-gradients", Sampling(3, (256, 256), backward=True)),
            ("images-gradients", Sampling(3, (128, 128), batch=8, backward=True)),
        )
    ),
)
