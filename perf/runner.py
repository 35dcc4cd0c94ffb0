"""Time the contenders of a case side by side, after checking that they compute the right thing."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .compile_time import compile_seconds
from .isolated import prepare_in_own_process
from .machine import foreign_seconds
from .memory import extra_memory
from .progress import Progress
from .results import CaseResult, Row, Spread
from .spec import Case, Contender, Job, Prepared, Suite, Unavailable
from .verify import relative_error

# The thread pools of ONNX Runtime, OpenVINO and OpenMP go on spinning after a run, up to about 4 ms where it was
# measured, and take the cores from whoever is timed next.
PAUSE_SECONDS = 0.006
# Short calls are repeated within a turn, so that a turn is long enough to time.
_TURN_SECONDS = 0.004
_MOST_CALLS = 20
_CALIBRATION_SECONDS = 0.03
# Threads that slept through the pause wake up in a call that is not timed; a long call does not notice.
_WARM_UP_BELOW_SECONDS = 0.05
# Also for contenders that use up their share of the time at once.
_FEWEST_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure. ``seconds`` is the time for one case, divided evenly among its contenders."""

    threads: int
    seconds: float = 10.0
    compile_time: bool = False


@dataclasses.dataclass
class _Side:
    """A contender that can be timed, and its times by round."""

    name: str
    threads: int
    call: Callable[[], Any]
    estimate: float = 0.0
    spent: float = 0.0
    times: dict[int, float] = dataclasses.field(default_factory=dict)

    def calibrate(self) -> None:
        """Estimate the time of a call: the best of a few, or the first that takes long."""
        torch.set_num_threads(self.threads)
        time.sleep(PAUSE_SECONDS)
        self.estimate = math.inf
        deadline = time.perf_counter() + _CALIBRATION_SECONDS
        while time.perf_counter() < deadline:
            self.estimate = min(self.estimate, _time(self.call))

    def take_turn(self, number: int) -> None:
        begin = time.perf_counter()
        torch.set_num_threads(self.threads)
        time.sleep(PAUSE_SECONDS)
        if self.estimate < _WARM_UP_BELOW_SECONDS:
            self.call()
        calls = max(1, min(_MOST_CALLS, int(_TURN_SECONDS / max(self.estimate, 1e-9))))
        self.times[number] = statistics.median(_time(self.call) for _ in range(calls))
        self.spent += time.perf_counter() - begin


def _time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run_case(
    suite: Suite, case: Case, contenders: tuple[Contender, ...], settings: Settings, progress: Progress
) -> CaseResult:
    """Check, measure and compare. A contender that is wrong, or fails, is reported and never timed."""
    if "torch._dynamo" in sys.modules:  # else the cases together exceed its limit of recompilations
        torch._dynamo.reset()
    label = f"{suite.name}/{case.name}"
    progress.say(f"{label}: {case.description}: reference")
    inputs = case.build()
    reference = suite.reference(inputs)
    rows: dict[str, Row] = {}
    sides: dict[str, _Side] = {}
    with _threads_restored():
        for contender in contenders:
            threads = contender.threads or settings.threads
            torch.set_num_threads(threads)
            progress.say(f"{label}: {'compiling' if contender.compiled else 'preparing'} {contender.name}")
            row, prepared = _check(
                contender, Job(case, inputs, threads), lambda output: (suite.error or relative_error)(output, reference)
            )
            if prepared:
                progress.say(f"{label}: memory of {contender.name}", passing=True)
                row = _with_memory(row, prepared)
                row = dataclasses.replace(row, shares=prepared.shares() if prepared.shares else {})
                sides[contender.name] = _Side(contender.name, threads, prepared.call)
            rows[contender.name] = row
        foreign = _interleave_watched(
            list(sides.values()), settings.seconds, lambda text: progress.say(f"{label}: {text}", passing=True)
        )
    for name, side in sides.items():
        rows[name] = _with_times(rows[name], side, list(sides.values()))
    for contender in contenders if settings.compile_time else ():
        if contender.compiled and contender.name in sides:
            progress.say(f"{label}: compile time of {contender.name}")
            rows[contender.name] = _with_compile_time(
                rows[contender.name], suite, case, sides[contender.name].threads, progress
            )
    return CaseResult(suite.name, case.name, case.description, case.tolerance, tuple(rows.values()), foreign)


def _check(contender: Contender, job: Job, error_of: Callable[[Any], float]) -> tuple[Row, Prepared | None]:
    """Prepare a contender and compare its output; it is handed back only if it may be timed."""

    def row(status: str, **more: Any) -> Row:
        return Row(contender.name, contender.role, status, **more)

    try:
        contender.check()
        isolated = contender.isolated
        prepared = prepare_in_own_process(contender.prepare, job) if isolated else contender.prepare(job)
    except Unavailable as reason:
        return row("unavailable", reason=str(reason)), None
    except Exception as error:  # one that breaks must not take the others' results along; the row says what happened
        return row("failed", reason=f"{type(error).__name__}: {error}"), None
    if contender.role == "limit":
        return row("ok"), prepared
    error = error_of(prepared.output)
    if error == math.inf:
        return row("wrong", reason="not finite, or of another shape than the reference"), None
    if error > job.case.tolerance:
        return row("wrong", error=error, reason=f"relative error {error:.1e}, allowed {job.case.tolerance:.0e}"), None
    return row("ok", error=error), dataclasses.replace(prepared, output=None)


def _with_memory(row: Row, prepared: Prepared) -> Row:
    try:
        memory = prepared.memory() if prepared.memory else extra_memory(prepared.call, prepared.lean)
        return dataclasses.replace(row, memory=memory)
    except Unavailable as reason:
        return dataclasses.replace(row, memory_reason=str(reason))


def interleave(sides: list[_Side], seconds: float, say: Callable[[str], None]) -> None:
    """Give each side a turn in every round, in rotated order, until each has had its share of the time.

    A slow side runs out of its share early and then sits out; the others go on. Rounds with both are compared.
    """
    for side in sides:
        side.calibrate()
    share = seconds / max(1, len(sides))
    number = 0
    with _collection_off():
        while active := [s for s in sides if s.spent < share or len(s.times) < _FEWEST_ROUNDS]:
            first = number % len(active)
            for side in active[first:] + active[:first]:
                say(f"round {number + 1}: {side.name}")
                side.take_turn(number)
            number += 1


def _interleave_watched(sides: list[_Side], seconds: float, say: Callable[[str], None]) -> float | None:
    """Interleave, and see how many cores other programs kept busy meanwhile; None where the system does not say."""
    begin, before = time.perf_counter(), foreign_seconds()
    interleave(sides, seconds, say)
    after = foreign_seconds()
    return None if before is None or after is None else max(0.0, (after - before) / (time.perf_counter() - begin))


def _with_times(row: Row, side: _Side, sides: list[_Side]) -> Row:
    ratios = {}
    for other in sides:
        both = [number for number in side.times if number in other.times]
        if other is not side:
            ratios[other.name] = Spread.of([side.times[number] / other.times[number] for number in both])
    seconds = Spread.of(list(side.times.values()))
    return dataclasses.replace(row, seconds=seconds, rounds=len(side.times), ratios=ratios)


def _with_compile_time(row: Row, suite: Suite, case: Case, threads: int, progress: Progress) -> Row:
    try:
        cold, warm = compile_seconds(suite.name, case.name, row.contender, threads)
    except RuntimeError as error:  # the times that were measured are worth more than this column
        progress.say(f"no compile time of {row.contender}: {error}")
        return row
    return dataclasses.replace(row, compile_cold=cold, compile_warm=warm)


@contextlib.contextmanager
def _threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _collection_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
