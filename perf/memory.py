"""Peak memory of one call, beyond inputs and outputs, as the kernel accounts for it.

Linux keeps the high-water mark of a process's resident memory (``VmHWM``), and writing 5 to ``/proc/self/clear_refs``
resets it. That sees every allocator (torch's, a peer's arena, a kernel's own ``malloc``), as no hook into torch would.

What it can resolve: the counters are batched per core, about 128 KiB each, and memory that the allocator has in reserve
would be reused without growth, so it is given back first (``malloc_trim``). With transparent huge pages set to
``always`` the step is 2 MiB. Memory that a library keeps from earlier calls is not growth either: see
``Prepared.lean``. A few hundred KiB that a thread allocates once and keeps stay unseen.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .spec import Unavailable, UserError
from .verify import tensors

_MEASUREMENTS = 3

# glibc returns large blocks to the system as soon as they are freed, so that each call maps and faults in its results
# and intermediates anew. Told so when a process starts, it keeps them, as ONNX Runtime and OpenVINO do with theirs.
RETURNED, KEPT = "returned", "kept"
KEEPING = {
    "MALLOC_MMAP_MAX_": "0",  # no block is mapped by itself
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),  # the heap never shrinks
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",  # all threads share that heap
}


def setting(environment: Mapping[str, str] = os.environ) -> str:
    """What becomes of freed memory in a process that was started with these variables: "returned" to the system or
    "kept"; or the variables, where they say something else."""
    others = sorted(
        name for name in environment if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")
    )
    if all(environment.get(name) == value for name, value in KEEPING.items()) and set(others) == set(KEEPING):
        return KEPT
    return " ".join(f"{name}={environment[name]}" for name in others) or RETURNED


def restart_keeping_memory(module: str, arguments: list[str]) -> None:
    """Run a module's command again in this process's place, told to keep memory, as are processes that it starts.

    Raises:
        UserError: this C library cannot be told, or this process was told something else.
    """
    if platform.libc_ver()[0] != "glibc":
        raise UserError("--memory kept: only glibc's malloc can be told to, which this Python does not use")
    environment = {**os.environ, **KEEPING}
    if setting(environment) != KEPT:  # it would start itself again and again
        raise UserError(f"--memory kept: this process was started with {setting()}")
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)


def extra_memory(call: Callable[[], Any], lean: Callable[[], Callable[[], Any]] | None = None) -> int:
    """Bytes that a call needs at its peak beyond what it returns; the median of a few calls, after one to warm up.

    ``lean``, if there is one, is asked for a callable before every measurement, see :class:`Prepared`.

    Raises:
        Unavailable: not on Linux, or the mark cannot be reset here.
    """
    if not sys.platform.startswith("linux"):
        raise Unavailable("peak memory is read from /proc, which only Linux has")
    gc.collect()  # garbage that is freed during a call would hide as much growth
    growth = [_growth(lean() if lean else call) for _ in range(1 + _MEASUREMENTS)]
    return round(statistics.median(growth[1:]))


def _growth(call: Callable[[], Any]) -> int:
    with contextlib.suppress(OSError, AttributeError):  # musl has no malloc_trim, and nothing to trim
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError as error:
        raise Unavailable(f"the high-water mark cannot be reset: {error}") from error
    before = _status("VmRSS")
    output = call()
    peak = _status("VmHWM")
    returned = sum(tensor.numel() * tensor.element_size() for tensor in tensors(output))
    return max(0, peak - before - returned)


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise Unavailable(f"/proc/self/status has no {field}")
