"""Time several things side by side: each takes its turn in every round, so that what disturbs one disturbs all."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .machine import foreign_seconds
from .spec import Prepared

# Thread pools go on spinning after a run and take the cores from whoever is timed next: where it was measured, OpenMP's
# for 10 ms, ONNX Runtime's for 55 ms.
PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.3
# Short calls are repeated within a turn, so that a turn is long enough to time.
_TURN_SECONDS = 0.004
_MOST_CALLS = 20
_CALIBRATION_SECONDS = 0.03
# In a call that is not timed threads wake up that slept through the pause, and memory is mapped again that a virtual
# machine gave back meanwhile: who is called again and again has both. A long call does not notice.
_WARM_UP_BELOW_SECONDS = 0.5
# Also for contenders that use up their share of the time at once.
_FEWEST_ROUNDS = 5


@dataclasses.dataclass
class Side:
    """A contender that can be timed, and its times by round.

    ``seconds`` makes a call and says how long it took, where a clock around ``call`` would say too much; ``settle``
    waits until the process that it is made in computes no more, where that is another one.
    """

    name: str
    threads: int
    call: Callable[[], Any]
    seconds: Callable[[], float] | None = None
    settle: Callable[[], None] | None = None
    estimate: float = 0.0
    spent: float = 0.0
    times: dict[int, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, name: str, threads: int, prepared: Prepared) -> Side:
        return cls(name, threads, prepared.call, prepared.seconds, prepared.settle)

    def calibrate(self) -> None:
        """Estimate the time of a call: the best of a few, or the first that takes long."""
        torch.set_num_threads(self.threads)
        self.wait()
        self.estimate = math.inf
        deadline = time.perf_counter() + _CALIBRATION_SECONDS
        while time.perf_counter() < deadline:
            self.estimate = min(self.estimate, self._time())
        self.wait()

    def take_turn(self, number: int) -> None:
        """Its threads are at rest when it is another's turn."""
        begin = time.perf_counter()
        torch.set_num_threads(self.threads)
        if self.estimate < _WARM_UP_BELOW_SECONDS:
            self.call()
        calls = max(1, min(_MOST_CALLS, int(_TURN_SECONDS / max(self.estimate, 1e-9))))
        self.times[number] = statistics.median(self._time() for _ in range(calls))
        self.wait()
        self.spent += time.perf_counter() - begin

    def wait(self) -> None:
        """Until no thread of the process that it computes in does so any more."""
        (self.settle or wait_until_idle)()

    def _time(self) -> float:
        return self.seconds() if self.seconds else time_call(self.call)


def wait_until_idle() -> None:
    """Wait until no thread of this process computes any more."""
    begin = time.perf_counter()
    busy = True
    while busy and time.perf_counter() - begin < _LONGEST_PAUSE_SECONDS:
        computed, start = time.process_time(), time.perf_counter()
        time.sleep(PAUSE_SECONDS)
        busy = time.process_time() - computed > 0.2 * (time.perf_counter() - start)


def time_call(call: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(sides: list[Side], seconds: float, say: Callable[[str], None]) -> None:
    """Give each side a turn in every round, in rotated order, until each has had its share of the time.

    A slow side runs out of its share early and then sits out; the others go on. Rounds with both are compared.
    """
    for side in sides:
        side.wait()  # what prepared it may not have come to rest
    for side in sides:
        if not side.estimate:
            side.calibrate()
    share = seconds / max(1, len(sides))
    number = 0
    with collection_off():
        while active := [s for s in sides if s.spent < share or len(s.times) < _FEWEST_ROUNDS]:
            first = number % len(active)
            for side in active[first:] + active[:first]:
                say(f"round {number + 1}: {side.name}")
                side.take_turn(number)
            number += 1


def interleave_watched(sides: list[Side], seconds: float, say: Callable[[str], None]) -> float | None:
    """Interleave, and see how many cores other programs kept busy meanwhile; None where the system does not say."""
    begin, before = time.perf_counter(), foreign_seconds()
    interleave(sides, seconds, say)
    after = foreign_seconds()
    return None if before is None or after is None else max(0.0, (after - before) / (time.perf_counter() - begin))


@contextlib.contextmanager
def threads_restored() -> Iterator[None]:
    """What is inside may set torch's number of threads."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def collection_off() -> Iterator[None]:
    """Collect garbage now, which takes a third of a second, and then no more."""
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
