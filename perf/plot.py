"""A report as a picture: how long each contender takes, in multiples of the limit."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import describe_fault, heading
from .results import CaseResult, Report, Row, Spread
from .spec import UserError

COLORS = {"ours": "#2171b5", "peer": "#f79646"}
_LEGEND = {"ours": "this package", "peer": "peers"}
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 1}
_BAR_INCHES = 0.17
_HEAD = 3.2  # rows that a case takes beside its bars: its name, its description, and some space
_ROWS_PER_COLUMN = 60


def plot(report: Report, path: Path) -> None:
    """Write a PNG: a group of bars per case, on a logarithmic axis on which 1 is the limit.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        UserError: no case has a limit to compare with.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [case for case in report.cases if any(_is_compared(case, row) for row in case.rows)]
    if not cases:
        raise UserError("nothing to plot: no case was timed together with its limit")
    columns = _columns(cases)
    height = max(sum(len(_bars(case)) + _HEAD for case in column) for column in columns)
    figure, axes = plt.subplots(
        1, len(columns), figsize=(1 + 6.6 * len(columns), 2 + height * _BAR_INCHES), sharex=True, squeeze=False
    )
    for axis, column in zip(axes[0], columns):
        _draw_column(axis, column, height)
    ratios = [_ratio(case, row) for case in cases for row in _bars(case) if row.is_timed]
    lowest, highest = min((r.median for r in ratios), default=1), max((r.p90 for r in ratios), default=1)
    axes[0][0].set_xlim(min(0.5, 0.8 * lowest), max(2, 1.6 * highest))
    inch = 1 / figure.get_figheight()
    title = "Time of one call divided by the limit's: shorter is better"
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=11)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    figure.legend(handles, [_LEGEND[role] for role in COLORS], loc="upper right", ncols=2, frameon=False, fontsize=8)
    note = textwrap.fill(f"Bars: median, lines: 10th to 90th percentile. {heading(report)}", 125 * len(columns))
    figure.text(0.5, 0.1 * inch, note, ha="center", fontsize=6.5, color="0.35")
    figure.tight_layout(rect=(0, (0.15 + 0.12 * note.count("\n")) * inch, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(case: CaseResult) -> list[Row]:
    """What is drawn of a case: who was timed against the limit, and who is wrong or broken."""
    rows = [row for row in case.rows if row.role != "limit" and row.status != "unavailable"]
    return [row for row in rows if _is_compared(case, row) or not row.is_timed]


def _is_compared(case: CaseResult, row: Row) -> bool:
    limit = case.first("limit")
    return limit is not None and limit.contender in row.ratios


def _ratio(case: CaseResult, row: Row) -> Spread:
    return row.ratios[case.first("limit").contender]


def _columns(cases: Sequence[CaseResult]) -> list[list[CaseResult]]:
    """Spread the cases over columns of about the same height, in order."""
    total = sum(len(_bars(case)) for case in cases)
    target = total / math.ceil(total / _ROWS_PER_COLUMN)
    columns: list[list[CaseResult]] = [[]]
    filled = 0
    for case in cases:
        if columns[-1] and filled + len(_bars(case)) / 2 > target * len(columns):
            columns.append([])
        columns[-1].append(case)
        filled += len(_bars(case))
    return columns


def _draw_column(axis: Any, cases: Sequence[CaseResult], height: float) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    y, ticks = 0.0, []
    for case in cases:
        at = {"transform": axis.get_yaxis_transform(), "va": "center"}
        axis.text(0.0, y - 0.9, f" {case.suite}, {case.case}", weight="bold", fontsize=9, bbox=PLAIN, **at)
        axis.text(0.0, y, f" {case.description}", fontsize=7.5, color="0.4", bbox=PLAIN, **at)
        for row in _bars(case):
            y += 1
            _draw_bar(axis, y, case, row)
            ticks.append((y, row.contender))
        y += _HEAD
    axis.set_xscale("log")
    axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7.5)
    axis.set_ylim(height - 0.8, -1.9)
    axis.axvline(1, color="black", linewidth=1)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _draw_bar(axis: Any, y: float, case: CaseResult, row: Row) -> None:
    if not row.is_timed:
        axis.text(1, y, f" {describe_fault(row)[:60]}", va="center", fontsize=7.5, color="#b10026")
        return
    ratio = _ratio(case, row)
    axis.barh(y, ratio.median - 1, left=1, height=0.82, color=COLORS[row.role])
    axis.plot([ratio.p10, ratio.p90], [y, y], color="0.45", linewidth=0.8)
    label = f"  {ratio.median:.2f}" if ratio.median < 10 else f"  {ratio.median:.0f}"
    axis.text(max(1, ratio.median, ratio.p90), y, label, va="center", fontsize=7.5)
