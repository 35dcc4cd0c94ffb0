"""What a benchmark suite declares: cases, contenders, and the reference that decides whether a result is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

ROLES = ("ours", "peer", "limit")


class UserError(Exception):
    """What was asked for cannot be done; the message is all that the user needs."""


class Unavailable(Exception):
    """A contender cannot take part; the message says why, for the user to read."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem to solve.

    Attributes:
        name: unique in its suite; what ``--case`` matches.
        description: the shape and whatever else is special, in a few words.
        build: makes the inputs, the same values at every call. What they are is between the suite's own functions.
        tolerance: largest relative error of a right result, see :func:`~inductor_vision.perf.verify.relative_error`.
        contenders: names of those that take part; empty for the suite's defaults.
    """

    name: str
    description: str
    build: Callable[[], Any]
    tolerance: float
    contenders: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Job:
    """A case made concrete: what a contender gets to prepare for."""

    case: Case
    inputs: Any
    threads: int


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A contender, ready to be timed.

    Attributes:
        call: does the work once, on inputs it already holds.
        output: what a first call returned: tensors or arrays, or a sequence of them.
        lean: gives back the memory that it keeps between calls, and hands out a callable that does the same work; for
            contenders with such a pool, whose peak memory would otherwise be missed.
        memory: measures the peak memory of a call, for contenders whose calls are made in another process.
        seconds: makes a call and says how long it took, for the same contenders: a clock here would count the messages.
        settle: waits until no thread of that process computes any more.
        shares: profiles a call and says which part of its time each of some operators takes; for programs of which
            these are only a part.
    """

    call: Callable[[], Any]
    output: Any
    lean: Callable[[], Callable[[], Any]] | None = None
    memory: Callable[[], int] | None = None
    seconds: Callable[[], float] | None = None
    settle: Callable[[], None] | None = None
    shares: Callable[[], dict[str, float]] | None = None


def _always() -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to solve the cases of a suite.

    Attributes:
        name: unique in its suite; what ``--contender`` matches.
        role: ``"ours"``, ``"peer"`` (another way to the same result) or ``"limit"`` (the least work, which may
            compute something else and is therefore not compared with the reference).
        prepare: compiles, allocates, runs once. Raises :class:`Unavailable` for a case that it does not support.
        check: raises :class:`Unavailable` where what it needs is not installed; quick.
        threads: a fixed number of threads, whatever the run is set to.
        compiled: whether ``prepare`` compiles, so that its time is worth a column.
        default: takes part in every case that does not name its contenders.
        isolated: is prepared and called in a process of its own. ``prepare`` and the cases must be picklable then.
        error: of its output against the reference, where not the suite's: in a lower precision a model may decide
            otherwise.
        tolerance: largest such error of a right result, where not the case's.
    """

    name: str
    role: str
    prepare: Callable[[Job], Prepared]
    check: Callable[[], None] = _always
    threads: int | None = None
    compiled: bool = False
    default: bool = True
    isolated: bool = False
    error: Callable[[Any, Any], float] | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"contender {self.name!r}: role must be one of {', '.join(ROLES)}, got {self.role!r}")


@dataclasses.dataclass(frozen=True)
class Suite:
    """The benchmark of one operator, or of programs that use some.

    Attributes:
        reference: computes the right output from a case's inputs, in float64 where the suite does not say otherwise.
        error: of an output against the reference; :func:`~inductor_vision.perf.verify.relative_error` if None.
        remark: what else to know to read its results, in sentences.
    """

    name: str
    description: str
    cases: tuple[Case, ...]
    contenders: tuple[Contender, ...]
    reference: Callable[[Any], Any]
    error: Callable[[Any, Any], float] | None = None
    remark: str = ""

    def __post_init__(self) -> None:
        for kind, names in (("case", self.case_names()), ("contender", self.contender_names())):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"suite {self.name!r}: {kind} declared twice: {', '.join(sorted(twice))}")
        for case in self.cases:
            unknown = set(case.contenders) - set(self.contender_names())
            if unknown:
                raise ValueError(f"suite {self.name!r}, case {case.name!r}: no contender {', '.join(sorted(unknown))}")

    def case_names(self) -> list[str]:
        return [case.name for case in self.cases]

    def contender_names(self) -> list[str]:
        return [contender.name for contender in self.contenders]

    def contenders_of(self, case: Case) -> tuple[Contender, ...]:
        return tuple(c for c in self.contenders if (c.name in case.contenders if case.contenders else c.default))


def select(
    suites: Sequence[Suite], case_patterns: Sequence[str], contender_patterns: Sequence[str]
) -> list[tuple[Suite, Case, tuple[Contender, ...]]]:
    """The cases that match any of the glob patterns, each with its contenders that do; no pattern matches everything.

    Raises:
        UserError: a pattern matches nothing. The message lists what exists.
    """
    cases = [(suite, case) for suite in suites for case in suite.cases]
    wanted = matching("case", [case.name for _, case in cases], case_patterns)
    cases = [(suite, case) for suite, case in cases if case.name in wanted]
    offered = [contender.name for suite, case in cases for contender in suite.contenders_of(case)]
    wanted = matching("contender of these cases", offered, contender_patterns)
    chosen = [(suite, case, tuple(c for c in suite.contenders_of(case) if c.name in wanted)) for suite, case in cases]
    return [(suite, case, contenders) for suite, case, contenders in chosen if contenders]


def matching(kind: str, names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match any of the glob patterns, each once; all of them where there is no pattern.

    Raises:
        UserError: a pattern matches nothing. The message lists what exists.
    """
    names = list(dict.fromkeys(names))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"no {kind} matches {pattern!r}; there are: {', '.join(names)}")
    return [name for name in names if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]
