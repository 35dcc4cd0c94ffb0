"""Time the contenders of a case side by side, after checking that they compute the right thing."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from .compile_time import compile_seconds
from .interleaving import Side, interleave_watched, threads_restored
from .isolated import prepare_in_own_process
from .memory import extra_memory, setting
from .progress import Progress
from .results import CaseResult, Row, Spread
from .spec import Case, Contender, Job, Prepared, Suite, Unavailable
from .verify import relative_error


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        seconds: for one case, divided evenly among its contenders.
        memory: what becomes of freed memory in this process and those of contenders, see :func:`~.memory.setting`.
    """

    threads: int
    seconds: float = 10.0
    compile_time: bool = False
    memory: str = dataclasses.field(default_factory=setting)


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
    sides: dict[str, Side] = {}
    with threads_restored():
        for contender in contenders:
            threads = contender.threads or settings.threads
            torch.set_num_threads(threads)
            progress.say(f"{label}: {'compiling' if contender.compiled else 'preparing'} {contender.name}")
            row, prepared = _check(contender, Job(case, inputs, threads), suite.error or relative_error, reference)
            if prepared:
                progress.say(f"{label}: memory of {contender.name}", passing=True)
                row = _with_memory(row, prepared)
                row = dataclasses.replace(row, shares=prepared.shares() if prepared.shares else {})
                sides[contender.name] = Side.of(contender.name, threads, prepared)
            rows[contender.name] = row
        foreign = interleave_watched(
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


def _check(
    contender: Contender, job: Job, error_of: Callable[[Any, Any], float], reference: Any
) -> tuple[Row, Prepared | None]:
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
    error = (contender.error or error_of)(prepared.output, reference)
    tolerance = job.case.tolerance if contender.tolerance is None else contender.tolerance
    if error == math.inf:
        return row("wrong", reason="not finite, or of another shape than the reference"), None
    if error > tolerance:
        return row("wrong", error=error, reason=f"relative error {error:.1e}, allowed {tolerance:.0e}"), None
    return row("ok", error=error), dataclasses.replace(prepared, output=None)


def _with_memory(row: Row, prepared: Prepared) -> Row:
    try:
        memory = prepared.memory() if prepared.memory else extra_memory(prepared.call, prepared.lean)
        return dataclasses.replace(row, memory=memory)
    except Unavailable as reason:
        return dataclasses.replace(row, memory_reason=str(reason))


def _with_times(row: Row, side: Side, sides: list[Side]) -> Row:
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
