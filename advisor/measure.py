"""Time ways to compute the same thing, interleaved, after checking that it is the same."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from ..perf.interleaving import Side, interleave_watched, threads_restored
from ..perf.results import Spread
from ..perf.spec import Prepared
from ..perf.verify import relative_error
from .statistic import Ratio, is_faster, noise_of
from .target import describe_error

# Who takes more than so many times as long as what there is, is not measured any further.
_HOPELESS = 2.0
# Largest relative errors of right results. Other orders of summation are let off, in all layers of a model; where a
# precision is lower they are reported, and only nonsense is wrong.
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-3, 0.1


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to compute something.

    Attributes:
        low_precision: whether values differ as those of bfloat16 do.
        has_own_process: whether it computes in another process.
        prepare_apart: prepares the same in another process, once more if it has its own.
    """

    name: str
    prepare: Callable[[], Prepared]
    threads: int
    low_precision: bool = False
    has_own_process: bool = False
    prepare_apart: Callable[[], Prepared] | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """How a way did.

    Attributes:
        status: "ok", "slow" (so much so that it was timed once only), "wrong" or "failed".
        reason: how it is wrong, or why it failed.
        ratio: of its time to that of the first way.
        error: relative error against the first way, where that is a number.
    """

    name: str
    status: str
    reason: str = ""
    seconds: Spread | None = None
    ratio: Ratio | None = None
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several ways, measured together.

    Attributes:
        seconds: of the first way.
        noise: by how much it differs from itself, see :func:`~.statistic.noise_of`.
        foreign_cores: how many cores other programs kept busy; None where it is not known.
    """

    seconds: Spread
    noise: float
    others: tuple[Measured, ...]
    foreign_cores: float | None = None

    def faster(self) -> list[Measured]:
        """Those that are faster than the first way beyond noise, the fastest first."""
        won = [other for other in self.others if other.ratio and is_faster(other.ratio, self.noise)]
        return sorted(won, key=lambda other: other.ratio.median)

    def promising(self) -> list[Measured]:
        """Those that seem faster, by more than noise, whether or not enough rounds were made to be sure."""
        return [other for other in self.others if other.ratio and other.ratio.median < 1 - self.noise]


def compare(first: Way, others: Sequence[Way], seconds: float, say: Callable[[str], None]) -> Comparison:
    """Prepare and check all ways, then time them for so many seconds, the first one twice.

    Errors of the first way are the caller's; others that fail are reported.
    """
    rows: dict[str, Measured] = {}
    with threads_restored():
        torch.set_num_threads(first.threads)
        prepared = first.prepare()
        base = Side.of(first.name, first.threads, prepared)
        base.calibrate()
        twin = _twin(first, others, prepared, say)
        sides = [base, twin]
        for way in others:
            say(f"preparing {way.name}")
            torch.set_num_threads(way.threads)
            rows[way.name], side = _check(way, prepared.output)
            if side:
                sides.append(side)
        limit = _HOPELESS * base.estimate
        timed = [side for side in sides if side in (base, twin) or side.estimate <= limit]
        foreign = interleave_watched(timed, seconds, say)
    for side in sides[2:]:
        rows[side.name] = _with_times(rows[side.name], side, base)
    noise = noise_of(_ratio(twin, base))
    return Comparison(Spread.of(list(base.times.values())), noise, tuple(rows.values()), foreign)


def _twin(first: Way, others: Sequence[Way], prepared: Prepared, say: Callable[[str], None]) -> Side:
    """The first way again, to know what a thing differs from itself.

    Two processes differ by where their memory happens to lie: where others have processes of their own, so has it.
    """
    if first.prepare_apart and any(way.has_own_process for way in others):
        say(f"preparing {first.name}, once more")
        with contextlib.suppress(Exception):  # then others fail likewise, and are reported
            prepared = first.prepare_apart()
    twin = Side.of("itself", first.threads, prepared)
    twin.calibrate()
    return twin


def _check(way: Way, reference: object) -> tuple[Measured, Side | None]:
    """Prepare a way, call it a few times and compare its result; a side only if it may be timed."""
    try:
        prepared = way.prepare()
        side = Side.of(way.name, way.threads, prepared)
        side.calibrate()
    except Exception as error:  # whatever a compiler or an operator raises; the report says what happened
        return Measured(way.name, "failed", describe_error(error)), None
    error = relative_error(prepared.output, reference)
    if error == math.inf:
        return Measured(way.name, "wrong", "its result is not finite, or of another shape"), None
    allowed = _LOW_PRECISION_TOLERANCE if way.low_precision else _TOLERANCE
    if error > allowed:
        reason = f"relative error {error:.1e}, allowed {allowed:.0e}"
        return Measured(way.name, "wrong", reason, error=error), None
    return Measured(way.name, "ok", error=error), side


def _with_times(row: Measured, side: Side, base: Side) -> Measured:
    if not side.times:
        ratio = side.estimate / base.estimate
        return dataclasses.replace(
            row, status="slow", seconds=Spread.of([side.estimate]), ratio=Ratio(ratio, ratio, ratio, 0)
        )
    return dataclasses.replace(row, seconds=Spread.of(list(side.times.values())), ratio=_ratio(side, base))


def _ratio(side: Side, base: Side) -> Ratio:
    return Ratio.of([side.times[n] / base.times[n] for n in side.times if n in base.times])
