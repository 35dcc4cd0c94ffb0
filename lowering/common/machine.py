"""What of the machine at hand decides the code that is generated."""

from __future__ import annotations

import torch


def cache_bytes() -> int:
    """Size of the second-level cache of one core, which determines how kernels cut their work into blocks."""
    return torch.cpu.get_capabilities().get("l2_cache_size", 0) or 512 << 10


def instructions() -> str:
    """The vector instructions, on which it depends how weights are packed."""
    bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.backends.cpu.get_cpu_capability() + (" bf16" if bf16 else "")
