"""What a run found, as data that survives a trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .spec import UserError

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, with the range that holds four fifths of the values."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), deciles[0], deciles[-1])


@dataclasses.dataclass(frozen=True)
class Row:
    """How one contender did in one case.

    Attributes:
        status: ``"ok"``, ``"wrong"``, ``"unavailable"`` or ``"failed"``; only ``"ok"`` rows have times and ratios.
        reason: why it is unavailable or failed, or how it is wrong.
        error: relative error against the reference, where that is a number; None for a limit, which may compute
            something else.
        seconds: the time of one call.
        rounds: in how many rounds it was timed.
        ratios: for other contenders, this one's time divided by theirs, round by round.
        memory: peak bytes beyond inputs and outputs; None where it cannot be measured, ``memory_reason`` says why.
        compile_cold, compile_warm: seconds to the first result with empty caches and with filled ones.
        shares: which part of the time some operators take, by their names; empty where nobody looked.
    """

    contender: str
    role: str
    status: str
    reason: str = ""
    error: float | None = None
    seconds: Spread | None = None
    rounds: int = 0
    ratios: dict[str, Spread] = dataclasses.field(default_factory=dict)
    memory: int | None = None
    memory_reason: str = ""
    compile_cold: float | None = None
    compile_warm: float | None = None
    shares: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """One case, with a row per contender in the suite's order.

    ``foreign_cores`` is how many cores other programs kept busy during the measurement; None where it is not known.
    """

    suite: str
    case: str
    description: str
    tolerance: float
    rows: tuple[Row, ...]
    foreign_cores: float | None = None

    def first(self, role: str) -> Row | None:
        """The contender that stands for a role: the first that was timed."""
        return next((row for row in self.rows if row.role == role and row.seconds), None)


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole run: on which machine, with which settings, and what came out."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    cases: tuple[CaseResult, ...]

    def faults(self) -> list[str]:
        """What must not be: this package's own contenders that are wrong or broken."""
        return [
            f"{case.suite}/{case.case}: {row.contender} is {row.status}"
            for case in self.cases
            for row in case.rows
            if row.role == "ours" and row.status in ("wrong", "failed")
        ]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """What :meth:`write` wrote.

        Raises:
            UserError: it is something else.
        """
        try:
            data = json.loads(path.read_text())
            version = data["format"]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path} is not a report") from error
        if version != _FORMAT:
            raise UserError(f"{path} is a report in format {version}; this version reads format {_FORMAT}")
        cases = tuple(CaseResult(**{**case, "rows": tuple(map(_row, case["rows"]))}) for case in data["cases"])
        return cls(data["machine"], data["settings"], cases)


def _row(data: dict[str, Any]) -> Row:
    seconds = Spread(**data["seconds"]) if data["seconds"] else None
    return Row(**{**data, "seconds": seconds, "ratios": {k: Spread(**v) for k, v in data["ratios"].items()}})
