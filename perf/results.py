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
    """Median, with the range that holds four fifths of the values; None where only the median is known."""

    median: float
    p10: float | None = None
    p90: float | None = None

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
        seconds: the time of one call; None if there is none, or where only ratios were published.
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

    @property
    def is_timed(self) -> bool:
        return self.status == "ok"

    def against(self, other: Row) -> float | None:
        """How many times as long it takes, the median over rounds; None where it was not compared with the other."""
        if other.contender == self.contender:
            return 1.0
        ratio = self.ratios.get(other.contender)
        return ratio.median if ratio else None


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
        return next((row for row in self.rows if row.role == role and row.is_timed), None)

    def base(self) -> Row | None:
        """Whose time the others are compared with: the first of this package, or else the first there is."""
        return self.first("ours") or next((row for row in self.rows if row.is_timed), None)


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole run: on which machine, with which settings, and what came out.

    ``note`` is what else must be known about the numbers, a sentence.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    cases: tuple[CaseResult, ...]
    note: str = ""

    def faults(self) -> list[str]:
        """What must not be: this package's own contenders that are wrong or broken."""
        return [
            f"{case.suite}/{case.case}: {row.contender} is {row.status}"
            for case in self.cases
            for row in case.rows
            if row.role == "ours" and row.status in ("wrong", "failed")
        ]

    def condensed(self) -> Report:
        """What tables and pictures are made of: four digits, and of the ratios those to the contenders that stand for
        this package and for the limit."""
        return dataclasses.replace(self, cases=tuple(map(_condensed, self.cases)))

    def write(self, path: Path) -> None:
        """Write JSON, a line for each row, without what is empty."""
        data = _without_empty(dataclasses.asdict(self))
        cases = []
        for case in data.pop("cases"):
            rows = ",\n".join(f"   {json.dumps(row)}" for row in case.pop("rows"))
            cases.append(f'  {{{json.dumps(case)[1:-1]}, "rows": [\n{rows}\n  ]}}')
        head = json.dumps({"format": _FORMAT, **data}, indent=1)[:-2]
        path.write_text(f'{head},\n "cases": [\n' + ",\n".join(cases) + "\n ]\n}\n")

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
        cases = tuple(
            CaseResult(**{"description": "", **case, "rows": tuple(map(_row, case["rows"]))}) for case in data["cases"]
        )
        return cls(data["machine"], data["settings"], cases, data.get("note", ""))


def _condensed(case: CaseResult) -> CaseResult:
    bases = {row.contender for row in (case.base(), case.first("limit")) if row}
    rows = (
        dataclasses.replace(
            row,
            seconds=row.seconds and _rounded(row.seconds),
            ratios={name: _rounded(ratio) for name, ratio in row.ratios.items() if name in bases},
        )
        for row in case.rows
    )
    return dataclasses.replace(case, rows=tuple(rows))


def _rounded(spread: Spread) -> Spread:
    return Spread(*(None if value is None else float(f"{value:.4g}") for value in dataclasses.astuple(spread)))


def _without_empty(value: Any) -> Any:
    """Without the values of dictionaries that are None, empty strings or empty dictionaries: all of them defaults."""
    if isinstance(value, dict):
        return {name: _without_empty(part) for name, part in value.items() if part not in (None, "", {})}
    return list(map(_without_empty, value)) if isinstance(value, (list, tuple)) else value


def _row(data: dict[str, Any]) -> Row:
    spreads = {name: Spread(**spread) for name, spread in data.get("ratios", {}).items()}
    return Row(**{**data, "seconds": Spread(**data["seconds"]) if "seconds" in data else None, "ratios": spreads})
