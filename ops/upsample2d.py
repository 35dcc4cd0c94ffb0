"""Resizing of images: aten's ``upsample_bilinear2d`` and ``upsample_bicubic2d``, for where the result is part of a
larger image, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .gradients import Gradient
from .registry import VisionOp, check, define_op, serves_aten
from .transforms import as_one_batch


def upsample_bilinear2d(
    input: Tensor,
    output_size: Sequence[int],
    align_corners: bool = False,
    scales_h: float | None = None,
    scales_w: float | None = None,
    padding: Sequence[int] = (0, 0),
) -> Tensor:
    r"""Resize images bilinearly, and add zeros below and at the right.

    .. math:: \text{out}[b, c, y, x] = \sum_{i, j} \max(0, 1 - |i - v|) \max(0, 1 - |j - u|)\,\text{input}[b, c, i, j]

    Here :math:`v = (y + 1/2)\,H / H_\text{out} - 1/2`, or :math:`y\,(H - 1) / (H_\text{out} - 1)` with
    ``align_corners``, not less than 0 nor more than :math:`H - 1`; u likewise. Source: aten's operator of this name,
    which :func:`torch.nn.functional.interpolate` calls.

    Args:
        input: ``[B, C, H, W]`` of a floating dtype; low precisions are computed in float32.
        output_size: height and width that it is resized to.
        scales_h, scales_w: where they are given, 1 / scale stands for the ratio of the sizes, without
            ``align_corners``.
        padding: rows of zeros below, and columns of zeros at the right.

    Returns:
        ``[B, C, output_size[0] + padding[0], output_size[1] + padding[1]]``, in the memory format of ``input``.

    Raises:
        RuntimeError: ``input`` has other dimensions, no channels or no pixels, or no floating dtype; ``output_size`` is
            not positive, or ``padding`` is negative.
    """
    return _MODES["bilinear"](input, output_size, align_corners, scales_h, scales_w, padding)


def _check(name: str, input: Tensor, output_size: Sequence[int], padding: Sequence[int]) -> None:
    shape = tuple(input.shape)
    check(name, len(shape) == 4, f"input must be [B, C, H, W], got {shape}")
    check(
        name,
        shape[1] > 0 and shape[2] > 0 and shape[3] > 0,
        f"input must have channels, and a positive height and width, got {shape}",
    )
    check(name, input.is_floating_point(), f"input must be of a floating dtype, got {input.dtype}")
    height, width = output_size
    check(name, height > 0 and width > 0, f"output_size must be positive, got {height} x {width}")
    below, right = padding
    check(name, below >= 0 and right >= 0, f"padding must not be negative, got {below} and {right}")


def _unknown_sizes(output_size: Sequence[int], size: Sequence[int], **arguments: Any) -> str | None:
    """aten's operator has no fake kernel for such."""
    symbolic = any(isinstance(length, torch.SymInt) for length in (*output_size, *size))
    return "sizes change from call to call" if symbolic else None


def _define(mode: str) -> VisionOp:
    name = f"upsample_{mode}2d"
    forward = getattr(torch.ops.aten, name).default
    gradient = getattr(torch.ops.aten, f"{name}_backward").default

    def fake(
        input: Tensor,
        output_size: Sequence[int],
        align_corners: bool,
        scales_h: float | None,
        scales_w: float | None,
        padding: Sequence[int],
    ) -> Tensor:
        _check(name, input, output_size, padding)
        size = [length + zeros for length, zeros in zip(output_size, padding)]
        return input.new_empty([*input.shape[:2], *size]).contiguous(memory_format=suggest_memory_format(input))

    def decomposition(
        input: Tensor,
        output_size: Sequence[int],
        align_corners: bool,
        scales_h: float | None,
        scales_w: float | None,
        padding: Sequence[int],
    ) -> Tensor:
        _check(name, input, output_size, padding)
        resized = forward(input, output_size, align_corners, scales_h, scales_w)
        below, right = padding
        return F.pad(resized, (0, right, 0, below)).contiguous(memory_format=suggest_memory_format(input))

    def backward(
        grad: Tensor,
        output_size: Sequence[int],
        align_corners: bool,
        scales_h: float | None,
        scales_w: float | None,
        size: Sequence[int],
    ) -> Tensor:
        height, width = output_size
        return gradient(grad[..., :height, :width], output_size, size, align_corners, scales_h, scales_w)

    return define_op(
        f"{name}(Tensor input, SymInt[2] output_size, bool align_corners, float? scales_h, float? scales_w, "
        "SymInt[2] padding) -> Tensor",
        family="upsample2d",
        decomposition=decomposition,
        fake=fake,
        gradient=Gradient(
            backward,
            of="input",
            takes="output_size, align_corners, scales_h, scales_w, input.shape",
            untraceable=_unknown_sizes,
        ),
        autocast=False,  # nor does it cast aten's on a CPU
        fold=as_one_batch("input"),
    )


def _unpadded(
    input: Tensor,
    output_size: Sequence[int],
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> tuple[Any, ...]:
    return input, output_size, align_corners, scales_h, scales_w, (0, 0)


def _of_either_size(
    input: Tensor, output_size: Sequence[int] | None, align_corners: bool, scale_factors: Sequence[float] | None
) -> tuple[Any, ...]:
    """``output_size`` is None where ``scale_factors`` are given."""
    if output_size is None:
        assert scale_factors is not None  # or interpolate would have raised
        output_size = [torch.sym_int(length * scale) for length, scale in zip(input.shape[2:], scale_factors)]
    return _unpadded(input, output_size, align_corners, *(scale_factors or ()))


_MODES = {mode: _define(mode) for mode in ("bilinear", "bicubic")}

for _mode, _op in _MODES.items():
    _aten = getattr(torch.ops.aten, f"upsample_{_mode}2d")
    serves_aten(_op, _aten.default)(_unpadded)
    serves_aten(_op, _aten.vec)(_of_either_size)
