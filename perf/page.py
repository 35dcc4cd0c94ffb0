"""The page of benchmarks, ``docs/benchmarks.md``: everything that is kept in ``perf/results/``, and nothing else.

A file there is what one run of one suite found on one machine: ``<machine>/<suite>.json``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Iterable
from pathlib import Path

from .report import markdown
from .results import Report
from .spec import Contender, Suite, UserError

RESULTS = Path(__file__).parent / "results"
ROOT = RESULTS.parents[1]
# Suites of whole programs, in the order of the page; the others are of one operator.
PROGRAMS = ("detectors", "transformers", "classifiers", "segmentation", "training")
_WIDTH = 120

_INTRODUCTION = """\
# Benchmarks

<!-- Written by `python -m inductor_vision.perf report` from the files in perf/results/: change nothing here. -->

A table for each suite of `perf/suites/` and each machine. A row is a case. The contender with milliseconds stands for
this package; the others are multiples of its time, medians over interleaved rounds: **above 1 is slower than this
package**, below 1 is faster. Every result was compared with the reference before it was timed. Extra memory is the peak
of a call beyond its inputs and results. The limit is the least work that anybody could do, and may compute something
else. Freed memory is returned to the system, as malloc does by default, or kept (`run --memory kept`), for all alike.

`python -m inductor_vision.perf list` says what the suites, cases and contenders are, and `run` measures them:

    make perf ARGS="run roi_align --json roi_align.json"             # one suite, a few minutes
    make perf ARGS="run --save perf/results/my-machine"              # all of them, for this page; takes hours
    make perf ARGS="report"                                          # this page and docs/speed.png"""


def read_results(folder: Path) -> dict[str, list[Report]]:
    """The reports of each suite, by the names of the machines' folders.

    Raises:
        UserError: there are none, or a file is not of the suite that it is named after.
    """
    results: dict[str, list[Report]] = {}
    for path in sorted(folder.glob("*/*.json")):
        report = Report.read(path)
        if {case.suite for case in report.cases} != {path.stem}:
            raise UserError(f"{path} is not the result of a run of {path.stem} alone, which its name says")
        results.setdefault(path.stem, []).append(report)
    if not results:
        raise UserError(f"no results in {folder}: there is no */*.json; `run --save {folder}/MACHINE` writes some")
    return results


def write_results(report: Report, folder: Path) -> list[Path]:
    """Write a file for each suite of a run, condensed. Cases in it that were not measured again stay, if they were
    measured in the same way; one that was is replaced with all of its contenders."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suite in dict.fromkeys(case.suite for case in report.cases):
        path = folder / f"{suite}.json"
        cases = {case.case: case for case in report.cases if case.suite == suite}
        if path.exists() and _measured_alike(before := Report.read(path), report):
            cases = {case.case: case for case in before.cases} | cases
        dataclasses.replace(report, cases=tuple(cases.values())).condensed().write(path)
        paths.append(path)
    return paths


def _measured_alike(a: Report, b: Report) -> bool:
    """On one machine, with the same programs."""

    def conditions(report: Report) -> object:
        return {**report.machine, "date": ""}, {**report.settings, "seconds": 0, "compile_time": False}, report.note

    return conditions(a) == conditions(b)


def page(results: dict[str, list[Report]], suites: dict[str, Suite]) -> str:
    """The page as Markdown. Suites that are no more are left out with their results."""
    programs = [name for name in PROGRAMS if name in results]
    operators = [name for name in suites if name in results and name not in PROGRAMS]
    parts = [_INTRODUCTION]
    for title, names in (("Whole programs", programs), ("Operators", operators)):
        if names:
            parts += [f"## {title}", *(_section(suites[name], results[name]) for name in names)]
    return "\n\n".join(parts) + "\n"


def _section(suite: Suite, reports: Iterable[Report]) -> str:
    about = f"{suite.description[:1].upper()}{suite.description[1:]}."
    timed = {row.contender for report in reports for case in report.cases for row in case.rows if row.is_timed}
    limits = [
        f"The limit, `{contender.name}`: {_what_it_does(contender)}"
        for contender in suite.contenders
        if contender.role == "limit" and contender.name in timed and _what_it_does(contender)
    ]
    text = textwrap.fill(
        " ".join([about, *limits, suite.remark]), _WIDTH, break_long_words=False, break_on_hyphens=False
    )
    tables = (markdown(report, all_memory=suite.name in PROGRAMS) for report in reports)
    return "\n\n".join([f"### {suite.name}", text, *tables])


def _what_it_does(contender: Contender) -> str:
    """The first paragraph of its function's docstring, in one line."""
    function = contender.prepare
    while isinstance(function, functools.partial):
        if function.keywords:
            return ""  # a variation, which the docstring is not about
        function = function.func
    text = inspect.getdoc(function) or ""
    return " ".join(text.partition("\n\n")[0].split())
