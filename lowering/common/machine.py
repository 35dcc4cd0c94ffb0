"""What of the machine that code is generated for decides that code: the machine at hand, or what Inductor is told."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Level:
    """A level of x86-64: many processors, and what compilers may count on in all of them.

    Attributes:
        vector_bits: of the vectors that at::vec has for it; 0 where it has none.
        cache_bytes: the second-level cache that is usual for a core.
    """

    vector_bits: int
    cache_bytes: int


# By the names that compilers have for them.
LEVELS = {
    "x86-64-v2": Level(0, 256 << 10),
    "x86-64-v3": Level(256, 512 << 10),
    "x86-64-v4": Level(512, 1 << 20),
}


def level() -> Level | None:
    """The level that Inductor is told to compile for (``cpp.march``); None: something else, or the machine at hand."""
    from ..inductor.tables import config

    return LEVELS.get(config.cpp.march)


def cache_bytes() -> int:
    """Size of the second-level cache of one core, which determines how kernels cut their work into blocks."""
    other = level()
    return cache_bytes_here() if other is None else other.cache_bytes


def cache_bytes_here() -> int:
    """That of the machine at hand."""
    return torch.cpu.get_capabilities().get("l2_cache_size", 0) or 512 << 10


def instructions_here() -> str:
    """The vector instructions of the machine at hand, on which it depends how weights are packed."""
    bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.backends.cpu.get_cpu_capability() + (" bf16" if bf16 else "")


# Where a processor has one of these, it multiplies the dtype by itself, and oneDNN makes use of that.
_LOW_PRECISION_PRODUCTS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16"),
}


def multiplied_dtypes() -> list[torch.dtype]:
    """The low precisions that processors multiply that code is generated for."""
    if level() is not None:
        return []  # no level has such instructions
    capabilities = torch.cpu.get_capabilities()
    return [dtype for dtype, names in _LOW_PRECISION_PRODUCTS.items() if any(map(capabilities.get, names))]


def vector_bits() -> int:
    """Of the processors that code is generated for."""
    other = level()
    if other is not None:
        return other.vector_bits
    return {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability(), 128)
