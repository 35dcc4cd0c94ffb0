"""Choices made by measurement, remembered on disk for each kind of CPU.

Used under ``torch._inductor.config.max_autotune``. The file is in Inductor's cache directory and may be deleted at any
time. Processes that tune at once wait for each other, and find what the first one measured.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from filelock import FileLock

from .inductor import cache_dir, pick_vec_isa
from .registry import TAG

T = TypeVar("T")

SECONDS = 0.5  # for each problem, compilation not counted


def cache_bytes() -> int:
    """Of the second-level cache of one core."""
    return torch.cpu.get_capabilities().get("l2_cache_size", 0) or 512 << 10


def machine() -> str:
    """What a measurement is valid for: this CPU, vector width, number of threads, and version of the kernels."""
    capabilities = torch.cpu.get_capabilities()
    model = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    l2_cache = capabilities.get("l2_cache_size", 0) >> 10
    return f"{model}, {l2_cache} KiB L2, {pick_vec_isa()}, {torch.get_num_threads()} threads, {TAG}"


def fastest(problem: str, candidates: Sequence[T], prepare: Callable[[], Callable[[T], None]]) -> T:
    """The candidate that ran fastest, from disk where this machine has measured the problem before.

    Args:
        problem: what is tuned, in words; part of the key.
        candidates: what to choose from; their ``repr`` tells them apart.
        prepare: makes ready to run, once, and returns a function that runs with a given candidate.
    """
    path = pathlib.Path(cache_dir()) / "inductor_vision" / "tuned.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:  # nowhere to remember
        return _measure(candidates, prepare())
    with FileLock(f"{path}.lock"):
        known = _read(path)
        chosen = known.setdefault(machine(), {}).get(problem)
        for candidate in candidates:
            if repr(candidate) == chosen:
                return candidate
        best = _measure(candidates, prepare())
        known[machine()][problem] = repr(best)
        _replace(path, known)
    return best


def _read(path: pathlib.Path) -> dict[str, dict[str, str]]:
    try:
        known = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # nothing yet, or a file that was damaged: measure anew
        return {}
    sound = isinstance(known, dict) and all(isinstance(choices, dict) for choices in known.values())
    return known if sound else {}


def _replace(path: pathlib.Path, content: dict[str, dict[str, str]]) -> None:
    """Write so that a reader, or a crash, never sees half a file."""
    new = path.with_suffix(f".{os.getpid()}.tmp")
    new.write_text(json.dumps(content, indent=1, sort_keys=True))
    new.replace(path)


def _measure(candidates: Sequence[T], run: Callable[[T], None]) -> T:
    """The least of each candidate's times, taken in turns so that a slow moment of the machine hits all alike."""
    least = {}
    for candidate in candidates:  # a first run each, which also warms up
        run(candidate)
        least[candidate] = float("inf")
    end = time.perf_counter() + SECONDS
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        for candidate in candidates:
            start = time.perf_counter()
            run(candidate)
            least[candidate] = min(least[candidate], time.perf_counter() - start)
        rounds += 1
    return min(candidates, key=least.__getitem__)
