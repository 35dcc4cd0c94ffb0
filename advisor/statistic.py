"""When is a ratio of times a difference?"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

_CONFIDENCE = 0.95
# What two placements of the same buffers in memory may differ by, or a processor from one second to the next.
_LEAST_NOISE = 0.02


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A median of ratios, round by round, and the interval that holds the true median with a probability of 95 %.

    With fewer than six rounds no interval can; then it is their whole range.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        ordered, n = sorted(values), len(values)
        # The true median is below the k-th smallest value with the probability of fewer than k heads among n coins.
        k, tail = 1, 2.0**-n
        while k < n / 2 and tail + math.comb(n, k) * 2.0**-n <= (1 - _CONFIDENCE) / 2:
            tail += math.comb(n, k) * 2.0**-n
            k += 1
        return cls(statistics.median(ordered), ordered[k - 1], ordered[n - k], n)


def noise_of(twin: Ratio) -> float:
    """What a thing differs from itself, measured like two things: a ratio closer to 1 says nothing.

    Chance is not in it: the intervals of other ratios are as wide as chance makes them, and it would count twice.
    """
    return max(_LEAST_NOISE, abs(twin.median - 1))


def is_faster(ratio: Ratio, noise: float) -> bool:
    """Beyond noise: even the upper end of its interval is further from 1 than a thing is from itself."""
    return ratio.high < 1 - noise
