"""What a process does with memory that it has freed."""

from __future__ import annotations

import ctypes
import sys

from .paths import logger

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_memory() -> bool:
    """Have this process keep the memory that it frees, and use it again.

    By default, glibc's ``malloc`` maps each block of more than 32 MB (at first of 128 KB) afresh, and unmaps it when it
    is freed. The kernel fills every page of it with zeros at its first use, which takes as long as a pass over the
    block or two. A detector has gigabytes of such blocks in a call. After this call they come from one heap that only
    grows, so that from the second call on a model works in memory that it has touched before.

    It is for the whole process, whichever thread allocates: what was resident at most stays resident. Call it early:
    blocks that exist already are freed as before. The same without Python: variables of the environment, or
    ``mallopt`` in C++; see docs/deployment.md.

    Returns:
        Whether it has an effect. It has none, and a warning says why, where ``malloc`` is not glibc's: on macOS,
        Windows and musl, and under a preloaded jemalloc or tcmalloc, most of which keep memory by themselves.
    """
    reason = why_not_glibc()
    if reason is None:
        mallopt = ctypes.CDLL(None).mallopt
        settings = {
            _M_MMAP_MAX: 0,  # the threshold above which blocks are mapped cannot be set to more than 32 MB
            _M_TRIM_THRESHOLD: -1,  # what is free at the heap's end is never given back
            _M_TOP_PAD: 64 << 20,  # each growth of the heap is a system call
            _M_ARENA_MAX: 1,  # other threads' heaps are of 64 MB at most, and what one frees is not for the others
        }
        if all(mallopt(*setting) for setting in settings.items()):
            return True
        reason = "mallopt refused"
    logger.warning("inductor_vision.keep_memory() has no effect here: %s", reason)
    return False


class _SymbolInfo(ctypes.Structure):
    """Dl_info of dlfcn.h."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def why_not_glibc() -> str | None:
    """Why malloc is not glibc's; None if it is."""
    if not sys.platform.startswith("linux"):
        return f"malloc of {sys.platform} has no such settings"
    process = ctypes.CDLL(None)
    if not hasattr(process, "gnu_get_libc_version"):
        return "the C library is not glibc"
    info = _SymbolInfo()
    if not process.dladdr(ctypes.cast(process.malloc, ctypes.c_void_p), ctypes.byref(info)):
        return "the library that malloc comes from is unknown"
    file = (info.file or b"").decode(errors="replace")
    return None if "libc.so" in file or "libc-" in file else f"malloc is that of {file}"
