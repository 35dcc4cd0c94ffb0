"""A report as text: for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .memory import RETURNED
from .results import CaseResult, Report, Row, Spread

_OTHER_ARITHMETIC = "other arithmetic"
_NOTHING = "-"
_FOREIGN_CORES = 0.1  # this much is always going on


def heading(report: Report) -> str:
    """On what the numbers were taken, in one line."""
    line = machine_line(report.machine, report.settings["threads"])
    memory = report.settings.get("memory", RETURNED)
    return f"{line}; freed memory: {memory}"


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
    note = [report.note] if report.note else []
    return "\n\n".join([heading(report), *note, *map(_text_case, report.cases)])


def _text_case(case: CaseResult) -> str:
    bases = [base for base in (case.first("limit"), case.first("ours")) if base]
    compiles = any(row.compile_cold is not None for row in case.rows)
    head = ["contender", "ms", "p10 .. p90", *(f"/ {base.contender}" for base in bases), "error", "extra memory"]
    head += ["compile cold", "warm"] if compiles else []
    lines = [head]
    for row in case.rows:
        if not row.is_timed:
            lines.append([row.contender, describe_fault(row)])
            continue
        cells = [row.contender, ms(row.seconds.median) if row.seconds else _NOTHING, _range(row.seconds)]
        cells += [_ratio(row, base) for base in bases]
        cells += [_error(row), _megabytes(row.memory)]
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


def _error(row: Row) -> str:
    if row.error is None:
        return _OTHER_ARITHMETIC if row.role == "limit" else _NOTHING
    return f"{row.error:.0e}"


def _range(seconds: Spread | None) -> str:
    return f"{ms(seconds.p10)} .. {ms(seconds.p90)}" if seconds and seconds.p10 and seconds.p90 else _NOTHING


def _ratio(row: Row, base: Row) -> str:
    ratio = row.against(base)
    return _NOTHING if ratio is None else "1" if row is base else significant(ratio)


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


def markdown(report: Report, *, all_memory: bool = False) -> str:
    """A table for each suite, with a row for each case; ``all_memory``: and with the memory of all contenders."""
    suites: dict[str, list[CaseResult]] = {}
    for case in report.cases:
        suites.setdefault(case.suite, []).append(case)
    parts = [f"{heading(report)}.{f' {report.note}' if report.note else ''}"]
    for cases in suites.values():
        parts.append(_markdown_times(cases))
        rows = [row for case in cases for row in case.rows]
        if any(row.shares or (all_memory and row.memory is not None) for row in rows):
            parts.append(_markdown_details(cases))
    remarks = "\n".join(f"- {remark}" for remark in _remarks(report))
    return "\n\n".join([*parts, *([remarks] if remarks else [])])


def _markdown_times(cases: Sequence[CaseResult]) -> str:
    """A column for each contender: the time of the one that stands for this package, multiples of it for the others;
    and its memory and times of compilation, if they were measured."""
    names, bases = _columns(cases), [case.base() for case in cases]
    has_memory = any(base and base.memory is not None for base in bases)
    compiles = any(base and base.compile_cold is not None for base in bases)
    more = [*(["extra memory"] if has_memory else []), *(["compile cold", "warm"] if compiles else [])]
    head = [cases[0].suite, *names, *more]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for case, base in zip(cases, bases):
        rows = {row.contender: row for row in case.rows}
        cells = [_time_or_ratio(rows.get(name), base) for name in names]
        cells += [_megabytes(base.memory if base else None)] if has_memory else []
        times = (base.compile_cold, base.compile_warm) if base else (None, None)
        cells += map(_seconds, times) if compiles else []
        lines.append([f"{case.case}: {case.description}", *cells])
    return markdown_table(lines)


def _markdown_details(cases: Sequence[CaseResult]) -> str:
    """The contenders' share of time in operators, if it was measured, and their memory."""
    has_shares = any(row.shares for case in cases for row in case.rows)
    known = {row.contender for case in cases for row in case.rows if row.shares or row.memory is not None}
    names = [name for name in _columns(cases) if name in known]
    title = "time in operators; extra memory" if has_shares else "extra memory"
    lines = [[title, *names], ["---", *["--:"] * len(names)]]
    for case in cases:
        rows = {row.contender: row for row in case.rows}
        lines.append([case.case, *(_details(rows.get(name), has_shares) for name in names)])
    return markdown_table(lines)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _columns(cases: Sequence[CaseResult]) -> list[str]:
    """Who took part in any of the cases, in the suite's order as far as the cases show it."""
    names: list[str] = []
    for case in cases:
        at = 0
        for row in case.rows:
            if row.contender in names:
                at = names.index(row.contender) + 1
            elif row.status != "unavailable":
                names.insert(at, row.contender)
                at += 1
    return names


def _time_or_ratio(row: Row | None, base: Row | None) -> str:
    if row is None or row.status == "unavailable":
        return _NOTHING
    if not row.is_timed or base is None:
        return row.status.upper()
    if row is base:
        return f"{ms(row.seconds.median)} ms" if row.seconds else _NOTHING
    ratio = row.against(base)
    return _NOTHING if ratio is None else multiple(ratio)


def _details(row: Row | None, has_shares: bool) -> str:
    if row is None or (not row.shares and row.memory is None):
        return _NOTHING
    return f"{_parts(row)}; {_megabytes(row.memory)}" if has_shares else _megabytes(row.memory)


def _remarks(report: Report) -> list[str]:
    """Why somebody is not among the contenders of a case, and which numbers not to trust."""
    absent: dict[tuple[str, str, str], list[str]] = {}
    for case in report.cases:
        for row in case.rows:
            if not row.is_timed:
                absent.setdefault((case.suite, row.contender, describe_fault(row)), []).append(case.case)
    everywhere = {suite: sum(case.suite == suite for case in report.cases) for suite, _, _ in absent}
    remarks = [
        f"{suite}, {contender}: {fault}" + ("" if len(cases) == everywhere[suite] else f" ({', '.join(cases)})")
        for (suite, contender, fault), cases in absent.items()
    ]
    warnings = ((f"{case.suite}/{case.case}", busy_warning(case.foreign_cores)) for case in report.cases)
    return sorted({*remarks, *(f"{name}: {warning}" for name, warning in warnings if warning)})


def _parts(row: Row) -> str:
    """The share of the time in operators, and in each of them."""
    each = ", ".join(f"{name} {percent(share)}" for name, share in sorted(row.shares.items()))
    return f"{percent(sum(row.shares.values()))} ({each})" if row.shares else _NOTHING


def percent(share: float) -> str:
    return f"{share:.1%}"


def ms(seconds: float) -> str:
    """Seconds as milliseconds."""
    return significant(seconds * 1e3)


def significant(value: float) -> str:
    """Three digits, never in scientific notation."""
    return f"{value:.{2 if value >= 1 else 3}f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def multiple(ratio: float) -> str:
    """A ratio of times, in tables of many."""
    return f"{ratio:.2f}" if ratio < 10 else significant(ratio)


def _megabytes(count: int | None) -> str:
    return _NOTHING if count is None else f"{count / 2**20:.1f} MB"


def _seconds(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.1f} s"


def listing(lines: Iterable[tuple[str, str]], indent: str = "    ") -> str:
    """Names beside their descriptions."""
    lines = list(lines)
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join(f"{indent}{name.ljust(width)}  {text}".rstrip() for name, text in lines)
