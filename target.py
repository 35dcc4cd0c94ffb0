"""Packages for other machines than the one that makes them."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

from .lowering.common.machine import LEVELS
from .lowering.installation.installer import require_lowerings


@contextlib.contextmanager
def package_target(target: str | None = None) -> Iterator[None]:
    """Within this context, packages are compiled for machines of a kind, and refuse to be loaded on lesser ones.

    It is for :func:`torch._inductor.aoti_compile_and_package`. Instructions, vectors, and how kernels cut their work
    into blocks follow the target instead of the machine that compiles. The package runs with as many threads as there
    are where it runs (``cpp.dynamic_threads``). If the processor that it is loaded on lacks an instruction set that it
    was compiled for, loading it raises an error that names what is missing, in Python and in C++.

    Args:
        target: a level of x86-64: "x86-64-v2" (SSE4.2; kernels without explicit vectors), "x86-64-v3" (AVX2) or
            "x86-64-v4" (AVX-512 without its later additions). None: processors like the one at hand, with all that it
            has.

    Raises:
        ValueError: ``target`` is none of these, or the machine at hand is not of that architecture.
        RuntimeError: kernels cannot be compiled with the installed torch.
    """
    check_target("package_target", target)
    require_lowerings("package_target")
    from .lowering.inductor.tables import config
    from .lowering.workarounds.instructions_at_hand import instructions_of
    from .lowering.workarounds.unchecked_processors import processor_checked

    instructions = contextlib.nullcontext() if target is None else instructions_of(target)
    with config.patch({"cpp.dynamic_threads": True}), instructions, processor_checked():
        yield


def check_target(caller: str, target: str | None) -> None:
    """Raise ValueError where ``caller`` cannot make packages for that ``target``."""
    if target is None:
        return
    if target not in LEVELS:
        raise ValueError(
            f"{caller}: target must be one of {', '.join(LEVELS)}, or None for machines like this one, got {target!r}. "
            "A package for ARM can be made on an ARM machine only: for another architecture it takes another compiler, "
            "and torch's libraries for that"
        )
    if platform.machine() not in ("x86_64", "AMD64"):
        raise ValueError(f"{caller}: {target} can be compiled for on x86-64, and this machine is {platform.machine()}")
