"""Images sampled at the places that a grid gives: aten's ``grid_sampler_2d``, for compiled code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gradients import Gradient
from .registry import check, define_op, serves_aten

aten = torch.ops.aten


def _check(op: str, input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, **_: Any) -> None:
    shape, places = tuple(input.shape), tuple(grid.shape)
    check(op, len(shape) == 4, f"input must be [B, C, H, W], got {shape}")
    check(op, shape[2] > 0 and shape[3] > 0, f"input must have a positive height and width, got {shape}")
    check(op, len(places) == 4 and places[-1] == 2, f"grid must be [B, H_out, W_out, 2], got {places}")
    check(op, shape[0] == places[0], f"input and grid must have the same batch size, got {shape} and {places}")
    check(op, input.is_floating_point(), f"input must be of a floating dtype, got {input.dtype}")
    check(op, input.dtype == grid.dtype, f"grid must be of input's dtype, {input.dtype}, got {grid.dtype}")
    for name, mode in (("interpolation_mode", interpolation_mode), ("padding_mode", padding_mode)):
        check(op, mode in (0, 1, 2), f"{name} must be 0, 1 or 2, got {mode}")


def _fake(input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool) -> Tensor:
    _check("grid_sampler_2d", input, grid, interpolation_mode, padding_mode)
    return input.new_empty([*input.shape[:2], *grid.shape[1:3]])  # contiguous whatever the input is, as aten's


def _decomposition(
    input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Tensor:
    _check("grid_sampler_2d", input, grid, interpolation_mode, padding_mode)
    return aten.grid_sampler_2d.default(input, grid, interpolation_mode, padding_mode, align_corners).contiguous()


def _backward(
    grad: Tensor,
    input: Tensor,
    grid: Tensor,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
    *,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    return aten.grid_sampler_2d_backward.default(
        grad, input, grid, interpolation_mode, padding_mode, align_corners, wanted
    )


_op = define_op(
    "grid_sampler_2d(Tensor input, Tensor grid, int interpolation_mode, int padding_mode, bool align_corners) "
    "-> Tensor",
    decomposition=_decomposition,
    fake=_fake,
    gradient=Gradient(_backward, of="input, grid", check=_check),
    autocast=False,  # that is done where aten's operator is called
)


@serves_aten(_op, aten.grid_sampler_2d.default)
def _same(*args: Any) -> tuple[Any, ...]:
    return args


@serves_aten(_op.backward, aten.grid_sampler_2d_backward.default)
def _same_backward(*args: Any) -> tuple[Any, ...]:
    return args
