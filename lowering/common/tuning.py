"""Choices made by measurement, remembered on disk for each kind of CPU.

Used under ``torch._inductor.config.max_autotune``. There is a file for each choice, in Inductor's cache directory, and
any may be deleted at any time. Processes that tune the same problem at once wait for each other, and find what the
first one measured. Nothing about those files fails a compilation: where they cannot be read, locked or written, the
problem is measured, and not remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from filelock import FileLock

from ...paths import logger
from ..inductor.codegen import cache_dir, pick_vec_isa
from .cache_key import TAG

T = TypeVar("T")

SECONDS = 0.5  # for each problem, compilation not counted
PATIENCE = 120  # seconds to wait for another process that measures the problem; compiling for it takes half a minute


def machine() -> str:
    """What a measurement is valid for: this CPU, vector width, number of threads, and version of the kernels."""
    model = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return f"{model}, {pick_vec_isa()}, {torch.get_num_threads()} threads, {TAG}"


def fastest(problem: str, candidates: Sequence[T], prepare: Callable[[], Callable[[T], None]]) -> T:
    """The candidate that ran fastest, from disk where this machine has measured the problem before.

    Args:
        problem: what is tuned, in words; part of the key.
        candidates: what to choose from; their ``repr`` tells them apart.
        prepare: makes ready to run, once, and returns a function that runs with a given candidate.
    """
    key = {"machine": machine(), "problem": problem}
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = pathlib.Path(cache_dir()) / "inductor_vision" / "tuned" / f"{name}.json"

    def known() -> T | None:
        chosen = _read(path)
        return next((candidate for candidate in candidates if repr(candidate) == chosen), None)

    found = known()
    if found is None:
        with _locked(path) as alone:
            found = known() if alone else None  # now, if another process was measuring it
            if found is None:
                found = _measure(candidates, prepare())
                if alone:
                    _write(path, {**key, "fastest": repr(found)})
    return found


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[bool]:
    """Whether this process is the only one that has to do with a file, within this context."""
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{path}.lock", timeout=PATIENCE))
            alone = True
        except (OSError, NotImplementedError) as error:  # filelock's: waited too long; locks are not to be had here
            logger.info("measured, but not remembered: %s", error)
            alone = False
        yield alone


def _read(path: pathlib.Path) -> str | None:
    try:
        return json.loads(path.read_text())["fastest"]
    except (OSError, ValueError, KeyError, TypeError):  # nothing yet, or a file that was damaged: measure anew
        return None


def _write(path: pathlib.Path, content: dict[str, str]) -> None:
    """Write so that a reader, or a crash, never sees half a file."""
    new = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        new.write_text(json.dumps(content, indent=1))
        new.replace(path)
    except OSError as error:
        logger.info("measured, but not remembered: %s", error)
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


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
