"""Assertions about values, where Inductor generates Triton code for the CPU.

It makes ``tl.device_assert`` of them, which in Triton-CPU ends the process. An operator's wrong input is to be an error
there as elsewhere: such assertions run as they do eagerly.
"""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Wrap Inductor's lowerings of assertions."""
    from torch._inductor.lowering import lowerings

    aten = torch.ops.aten
    for overload in (aten._assert_async.msg, aten._functional_assert_async.msg):
        lowerings[overload] = _eager_on_cpu(overload, lowerings[overload])


def _eager_on_cpu(overload: torch._ops.OpOverload, original: Any) -> Any:
    from torch._inductor import config
    from torch._inductor.lowering import fallback_handler

    def lower(condition: Any, message: str, *rest: Any) -> Any:
        if condition.get_device().type != "cpu" or config.cpu_backend != "triton":
            return original(condition, message, *rest)
        return fallback_handler(overload, add_to_fallback_set=False)(condition, message, *rest)

    return lower
