"""A report as text: for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .results import CaseResult, Report, Row

_OTHER_ARITHMETIC = "other arithmetic"
_NOTHING = "-"
_FOREIGN_CORES = 0.1  # this much is always going on


def heading(report: Report) -> str:
    """On what the numbers were taken, in one line."""
    return machine_line(report.machine, report.settings["threads"])


def machine_line(machine: Mapping[str, Any], threads: int) -> str:
    """What :func:`~inductor_vision.perf.machine.describe_machine` found, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['vector_instructions']}, {threads} threads on "
        f"{machine['cores']} cores; {versions}; {machine['compiler']}; {machine['date'][:10]}"
    )


def busy_warning(foreign_cores: float | None) -> str:
    """A word of warning when a measurement did not have the machine to itself; empty otherwise.

    Threads that wait for each other at the end of a parallel loop wait for a time slice then, and every contender with
    short calls takes equally long: the ratios come out closer to 1 than they are.
    """
    if not foreign_cores or foreign_cores < _FOREIGN_CORES:
        return ""
    return f"not to be trusted: other programs kept {foreign_cores:.1f} cores busy meanwhile"


def describe_fault(row: Row) -> str:
    """Why a row has no times, in one line; the whole reason is in the JSON."""
    word = {"unavailable": "skipped"}.get(row.status, row.status.upper())
    return f"{word}: {' '.join(row.reason.split())[:160]}"


def text_table(report: Report) -> str:
    """Every case with a line per contender."""
    return "\n\n".join([heading(report), *map(_text_case, report.cases)])


def _text_case(case: CaseResult) -> str:
    bases = [base for base in (case.first("limit"), case.first("ours")) if base]
    compiles = any(row.compile_cold is not None for row in case.rows)
    head = ["contender", "ms", "p10 .. p90", *(f"/ {base.contender}" for base in bases), "error", "extra memory"]
    head += ["compile cold", "warm"] if compiles else []
    lines = [head]
    for row in case.rows:
        if row.seconds is None:
            lines.append([row.contender, describe_fault(row)])
            continue
        cells = [row.contender, ms(row.seconds.median), f"{ms(row.seconds.p10)} .. {ms(row.seconds.p90)}"]
        cells += [_ratio(row, base) for base in bases]
        cells += [_OTHER_ARITHMETIC if row.error is None else f"{row.error:.0e}", _megabytes(row.memory)]
        cells += [_seconds(row.compile_cold), _seconds(row.compile_warm)] if compiles else []
        lines.append(cells)
    remarks = {f"extra memory: {row.memory_reason}" for row in case.rows if row.memory_reason} | {
        busy_warning(case.foreign_cores)
    }
    remarks |= {f"{row.contender}: {_parts(row)} of the time in operators" for row in case.rows if row.shares}
    rounds = [row.rounds for row in case.rows if row.rounds]
    counted = f" ({min(rounds)} to {max(rounds)} rounds)" if rounds else ""
    return "\n".join(
        [
            f"{case.suite}/{case.case}: {case.description}{counted}",
            *aligned(lines),
            *(f"  {remark}" for remark in sorted(remarks) if remark),
        ]
    )


def aligned(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Columns flush right but for those that are named. A line of two cells is a name and a remark of any length."""
    full = [line for line in lines if len(line) > 2]
    widths = [max(len(line[0]) for line in lines), *(max(map(len, column)) for column in list(zip(*full))[1:])]
    out = []
    for line in lines:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ]
        out.append("  ".join(["", *([cells[0], line[1]] if len(line) == 2 else cells)]).rstrip())
    return out


def markdown(report: Report) -> str:
    """A row per case, a column per contender. Cases with other contenders get a table of their own."""
    tables: dict[tuple[str, tuple[str, ...]], list[CaseResult]] = {}
    for case in report.cases:
        tables.setdefault((case.suite, tuple(row.contender for row in case.rows)), []).append(case)
    remarks = {
        f"{row.contender}, {case.suite}/{case.case}: {describe_fault(row)}"
        for case in report.cases
        for row in case.rows
        if row.seconds is None
    }
    remarks |= {
        f"{case.suite}/{case.case}: {warning}" for case in report.cases if (warning := busy_warning(case.foreign_cores))
    }
    parts = [table for cases in tables.values() for table in (_markdown_table(cases), _markdown_shares(cases)) if table]
    parts.append(f"Medians of interleaved rounds; ratios are medians over rounds. {heading(report)}.")
    return "\n\n".join([*parts, "\n".join(f"- {remark}" for remark in sorted(remarks))])


def _markdown_table(cases: Sequence[CaseResult]) -> str:
    """Times, in brackets multiples of the time of this package's first contender, and more about that one."""
    present = {row.contender for case in cases for row in case.rows if row.status != "unavailable"}
    names = [row.contender for row in cases[0].rows if row.contender in present]
    ours, limit = _standing_for("ours", cases), _standing_for("limit", cases)
    compiles = any(row.compile_cold for case in cases for row in case.rows)
    head = [f"ms (x {ours})" if ours else "ms", *names]
    if ours:
        head += [f"{ours} / {limit}"] if limit else []
        head += [f"{ours}: extra memory", *(["compile cold", "warm"] if compiles else [])]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for case in cases:
        rows = {row.contender: row for row in case.rows}
        times = [_time_and_ratio(rows[name], ours) for name in names]
        cells = [f"{case.suite}/{case.case}: {case.description}", *times]
        if ours:
            us = rows[ours]
            cells += [_ratio(us, rows[limit])] if limit else []
            cells += [_megabytes(us.memory)]
            cells += [_seconds(us.compile_cold), _seconds(us.compile_warm)] if compiles else []
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_shares(cases: Sequence[CaseResult]) -> str:
    """Of every contender the share of the time in operators, and the memory; where somebody looked at the former."""
    if not any(row.shares for case in cases for row in case.rows):
        return ""
    names = [row.contender for row in cases[0].rows]
    lines = [["time in operators; extra memory", *names], ["---", *["---"] * len(names)]]
    for case in cases:
        rows = {row.contender: row for row in case.rows}
        cells = [f"{_parts(rows[name])}; {_megabytes(rows[name].memory)}" for name in names]
        lines.append([f"{case.suite}/{case.case}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _parts(row: Row) -> str:
    """The share of the time in operators, and in each of them."""
    each = ", ".join(f"{name} {percent(share)}" for name, share in sorted(row.shares.items()))
    return f"{percent(sum(row.shares.values()))} ({each})" if row.shares else _NOTHING


def percent(share: float) -> str:
    return f"{share:.1%}"


def _standing_for(role: str, cases: Sequence[CaseResult]) -> str | None:
    timed = {row.contender for case in cases for row in case.rows if row.seconds}
    return next((row.contender for row in cases[0].rows if row.role == role and row.contender in timed), None)


def _time_and_ratio(row: Row, base: str | None) -> str:
    if not row.seconds:
        return {"unavailable": _NOTHING}.get(row.status, row.status.upper())
    ratio = row.ratios.get(base)
    return ms(row.seconds.median) + (f" ({significant(ratio.median)})" if ratio else "")


def _ratio(row: Row, base: Row) -> str:
    if row.contender == base.contender:
        return "1"
    ratio = row.ratios.get(base.contender)
    return significant(ratio.median) if ratio else _NOTHING


def ms(seconds: float) -> str:
    """Seconds as milliseconds."""
    return significant(seconds * 1e3)


def significant(value: float) -> str:
    """Three digits, never in scientific notation."""
    return f"{value:.{2 if value >= 1 else 3}f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _megabytes(count: int | None) -> str:
    return _NOTHING if count is None else f"{count / 2**20:.1f} MB"


def _seconds(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.1f} s"


def listing(lines: Iterable[tuple[str, str]], indent: str = "    ") -> str:
    """Names beside their descriptions."""
    lines = list(lines)
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join(f"{indent}{name.ljust(width)}  {text}".rstrip() for name, text in lines)
