"""Assertions about values end the process, where Inductor generates Triton code for the CPU.

The fault, seen in torch 2.13 with Triton-CPU 3.6: Inductor makes ``tl.device_assert`` of them, which there aborts.

The way around: such assertions run as they do eagerly, so that an operator's wrong input is an error as elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Wrap Inductor's lowerings of assertions."""
    from ..inductor.tables import lowerings

    aten = torch.ops.aten
    for overload in (aten._assert_async.msg, aten._functional_assert_async.msg):
        lowerings[overload] = _eager_where_it_would_abort(overload, lowerings[overload])


def _would_abort(device: torch.device) -> bool:
    from ..inductor.tables import config

    return device.type == "cpu" and config.cpu_backend == "triton"


def _eager_where_it_would_abort(overload: torch._ops.OpOverload, original: Any) -> Any:
    from ..inductor.tables import fallback_handler

    def lower(condition: Any, message: str, *rest: Any) -> Any:
        if not _would_abort(condition.get_device()):
            return original(condition, message, *rest)
        return fallback_handler(overload, add_to_fallback_set=False)(condition, message, *rest)

    return lower
