"""Weights in the order in which the register-blocked matrix product reads them: see cpp/gemm.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.registry import accumulate_dtype
from ..inductor.codegen import pick_vec_isa, valid_vec_isa_list
from .machine import level

MAX_DEPTH = 256  # kMaxDepth in cpp/gemm.h
PANEL_BYTES = 64  # kPanel in cpp/gemm.h


def bf16_dot_products() -> bool:
    """Whether the kernel is compiled with INDUCTOR_VISION_BF16_DOT (cpp/gemm.h)."""
    if level() is not None:
        return False  # no level has them
    isa = pick_vec_isa()
    # The flags of the set that is picked may leave them out beside others, but g++ compiles for all that the CPU has
    # (-march=native); a valid set that has them says that CPU and compiler do.
    known = any("avx512bf16" in valid.build_arch_flags() for valid in valid_vec_isa_list())
    return bool(isa) and isa.bit_width() == 512 and known


def pack_panels(weight: Tensor, pairs: bool = False) -> Tensor:
    """A weight ``[G, Og, Cg, K]`` as ``[G, panels, K, Cg, lanes]``, in the dtype that sums are kept in.

    Outputs that are missing to whole panels are zeros. ``pairs``: as ``[G, panels, K, Cg / 2, lanes, 2]`` in its own
    dtype, for dot products of bfloat16.
    """
    groups, outputs, inputs, taps = weight.shape
    dtype = accumulate_dtype(weight.dtype)
    lanes = PANEL_BYTES // dtype.itemsize
    panels = -(-outputs // lanes)
    weight = torch.constant_pad_nd(weight, [0, 0, 0, 0, 0, panels * lanes - outputs])
    if pairs:
        return weight.reshape(groups, panels, lanes, inputs // 2, 2, taps).permute(0, 1, 5, 3, 2, 4).contiguous()
    return weight.to(dtype).reshape(groups, panels, lanes, inputs, taps).permute(0, 1, 4, 3, 2).contiguous()


def unpack_panels(packed: Tensor, outputs: int) -> Tensor:
    """The weight ``[G, Og, Cg, K]``, with so many outputs Og, that :func:`pack_panels` packed."""
    if packed.dim() == 6:  # pairs: they become one dimension
        packed = packed.permute(0, 1, 2, 3, 5, 4).flatten(3, 4)
    return packed.permute(0, 1, 4, 3, 2).flatten(1, 2)[:, :outputs]
