"""``python -m inductor_vision.perf``: list, run and show benchmarks, and write the page of their results."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .memory import KEPT, RETURNED, restart_keeping_memory, setting
from .options import check_outputs, positive
from .page import RESULTS, ROOT, page, read_results, write_results
from .progress import Progress
from .report import listing, markdown, text_table
from .results import Report
from .spec import Case, Contender, Suite, Unavailable, UserError, matching, select
from .suites import load_suites

if TYPE_CHECKING:  # it imports torch's compiler-adjacent parts, which `list` does not need
    from .runner import Settings


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    options.arguments = sys.argv[1:] if argv is None else argv
    if options.command is None:
        parser.print_help()
        print("\n" + describe_suites(load_suites()))
        return 0
    try:
        return options.command(options)
    except (UserError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m inductor_vision.perf",
        description="Benchmarks against peers and against the limit of the machine.",
    )
    commands = parser.add_subparsers(title="commands", metavar="{list,run,show,report}")
    parser.set_defaults(command=None)

    list_ = commands.add_parser("list", help="suites, their cases and contenders, and who is unavailable here")
    list_.set_defaults(command=_list)

    run = commands.add_parser("run", help="measure")
    run.set_defaults(command=_run)
    run.add_argument("suites", nargs="*", metavar="SUITE", help="all of them by default")
    run.add_argument("--case", action="append", default=[], metavar="GLOB", help="only these cases; may be repeated")
    run.add_argument("--contender", action="append", default=[], metavar="GLOB", help="only these; may be repeated")
    run.add_argument("--threads", type=positive(int), metavar="N", help="default: what torch uses here")
    budget = run.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=positive(float), default=10.0, metavar="S", help="per case (default: 10)")
    budget.add_argument("--quick", action="store_const", dest="seconds", const=1.0, help="the same as --seconds 1")
    run.add_argument(
        "--memory",
        choices=(RETURNED, KEPT),
        help="what malloc does with freed memory, for all contenders: return it to the system, as it does by default, "
        "or keep it, as ONNX Runtime and OpenVINO do",
    )
    run.add_argument(
        "--compile-time", action="store_true", help="measure cold and warm compilation too, which takes long"
    )
    run.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    run.add_argument("--save", type=Path, metavar="FOLDER", help="write FOLDER/SUITE.json for each suite, for `report`")
    _add_output_options(run)

    show = commands.add_parser("show", help="print or plot what an earlier run wrote with --json")
    show.set_defaults(command=_show)
    show.add_argument("file", type=Path)
    _add_output_options(show)

    report = commands.add_parser(
        "report", help="write docs/benchmarks.md, docs/speed.png and the README's tables from what is in perf/results"
    )
    report.set_defaults(command=_report)
    report.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: perf/results")
    report.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="FOLDER", help="default: docs")
    report.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="default: README.md")
    return parser


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times as multiples of the limit's")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def _list(options: argparse.Namespace) -> int:
    print(describe_suites(load_suites()))
    return 0


def describe_suites(suites: dict[str, Suite]) -> str:
    """Every suite with its cases and contenders, and why a contender cannot take part here."""
    parts = []
    for suite in suites.values():
        parts.append(f"{suite.name}: {suite.description}")
        parts.append("  cases\n" + listing((case.name, case.description) for case in suite.cases))
        parts.append("  contenders\n" + listing((c.name, f"{c.role}{_remark(c)}") for c in suite.contenders))
    return "\n".join(parts)


def _remark(contender: Contender) -> str:
    try:
        contender.check()
    except Unavailable as reason:
        return f", unavailable: {reason}"
    return "" if contender.default else ", only in cases that ask for it"


def _run(options: argparse.Namespace) -> int:
    import torch

    from .machine import describe_machine
    from .runner import Settings

    suites = load_suites()
    chosen = [suites[name] for name in matching("suite", suites, options.suites)]
    work = select(chosen, options.case, options.contender)
    check_outputs(options.json, plot=options.plot)
    if options.memory == KEPT and setting() != KEPT:
        restart_keeping_memory("inductor_vision.perf", options.arguments)
    if options.memory == RETURNED and setting() != RETURNED:
        raise UserError(f"--memory returned: this process was started with {setting()}")
    settings = Settings(options.threads or torch.get_num_threads(), options.seconds, options.compile_time)
    machine = describe_machine()
    report = Report(machine, vars(settings), ())
    report, interrupted = _measure(work, settings, report, options.save)
    if options.json:
        report.write(options.json)
    _output(report, options)
    for fault in report.faults():
        print(f"error: {fault}", file=sys.stderr)
    return 130 if interrupted else 1 if report.faults() else 0


def _measure(
    work: list[tuple[Suite, Case, tuple[Contender, ...]]], settings: Settings, report: Report, folder: Path | None
) -> tuple[Report, bool]:
    """All results, or those so far and True when the user interrupts: what took minutes is not thrown away.

    In ``folder`` each is kept at once.
    """
    from .runner import run_case

    progress = Progress()
    try:
        for number, (suite, case, contenders) in enumerate(work, 1):
            result = run_case(suite, case, contenders, settings, progress.part(f"{number}/{len(work)}"))
            report = dataclasses.replace(report, cases=(*report.cases, result))
            if folder:
                write_results(dataclasses.replace(report, cases=(result,)), folder)
    except KeyboardInterrupt:
        return report, True
    finally:
        progress.done()
    return report, False


def _show(options: argparse.Namespace) -> int:
    _output(Report.read(options.file), options)
    return 0


def _report(options: argparse.Namespace) -> int:
    from .speed import draw, with_table

    check_outputs(options.docs / "benchmarks.md", plot=options.docs / "speed.png")
    results = read_results(options.results)
    (options.docs / "benchmarks.md").write_text(page(results, load_suites()))
    options.readme.write_text(with_table(options.readme.read_text(), results))
    draw(results, options.docs / "speed.png")
    return 0


def _output(report: Report, options: argparse.Namespace) -> None:
    print(markdown(report) if options.markdown else text_table(report))
    if options.plot:
        from .plot import plot

        plot(report, options.plot)


if __name__ == "__main__":
    sys.exit(main())
