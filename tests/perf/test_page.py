"""The page of benchmarks and its picture are what the kept results give."""

import dataclasses
import pathlib

import pytest
from inductor_vision.perf import __main__ as cli, machine, page, runner, speed
from inductor_vision.perf.results import CaseResult, Report, Row, Spread
from inductor_vision.perf.spec import UserError
from inductor_vision.perf.suites import load_suites
from inductor_vision.tests.support.machine import MACHINE

DOCS = pathlib.Path(__file__).parents[2] / "docs"
WRITE_THEM = "python -m inductor_vision.perf report"


@pytest.fixture(scope="module")
def kept():
    return page.read_results(page.RESULTS)


def test_the_page_is_what_the_results_give(kept):
    assert (DOCS / "benchmarks.md").read_text() == page.page(kept, load_suites()), WRITE_THEM


def test_the_picture_is_what_the_results_give(kept):
    assert speed.drawn_from(DOCS / "speed.png") == speed.digest(kept), WRITE_THEM


def test_the_tables_of_the_readme_are_what_the_results_give(kept):
    readme = (DOCS.parent / "README.md").read_text()
    assert readme == speed.with_table(readme, kept), WRITE_THEM


def test_results_are_of_cases_and_contenders_that_exist(kept):
    suites = load_suites()
    assert kept.keys() <= suites.keys()
    for name, reports in kept.items():
        for report in reports:
            assert {"cpu", "cores", "vector_instructions", "compiler", "date", "versions"} <= report.machine.keys()
            assert report.settings["threads"] and report.settings["memory"]
            for case in report.cases:
                assert case.case in suites[name].case_names()
                assert {row.contender for row in case.rows} <= set(suites[name].contender_names())
                assert report.faults() == []


def a_report(suite, case, **more):
    ours, peers = "ours-compiled", ("torchvision", "openvino", "decomposition")
    rows = [Row(ours, "ours", "ok", error=1e-7, seconds=Spread(0.0123456, 0.01, 0.02), rounds=5)]
    for peer in peers:
        ratios = {name: Spread(2.0, 1.9, 2.1) for name in (ours, *peers) if name != peer}
        rows.append(Row(peer, "peer", "ok", error=1e-7, seconds=Spread(0.0246912, 0.02, 0.03), rounds=5, ratios=ratios))
    return Report(MACHINE, {"threads": 4}, (CaseResult(suite, case, "a case", 1e-6, tuple(rows)),), **more)


def test_a_run_is_kept_suite_by_suite_with_what_the_page_needs(tmp_path):
    reports = a_report("nms", "20000"), a_report("roi_pool", "p3-k1000")
    both = dataclasses.replace(reports[0], cases=tuple(case for report in reports for case in report.cases))
    paths = page.write_results(both, tmp_path / "machine")
    assert [path.name for path in paths] == ["nms.json", "roi_pool.json"]
    results = page.read_results(tmp_path)
    assert results.keys() == {"nms", "roi_pool"}
    ours, peer, *_ = results["nms"][0].cases[0].rows
    assert ours.seconds == Spread(0.01235, 0.01, 0.02)
    assert peer.ratios == {"ours-compiled": Spread(2.0, 1.9, 2.1)}
    text = page.page(results, load_suites())
    assert text.index("### nms") < text.index("a processor") < text.index("| 20000: a case | 12.3 ms | 2.00 |")
    assert "### roi_pool" in text and "Move as many bytes" not in text  # the limit was not measured


def test_what_was_not_measured_again_stays_if_it_is_comparable(tmp_path):
    def names(*reports):
        for report in reports:
            page.write_results(report, tmp_path)
        return [(case.case, case.rows[0].rounds) for case in Report.read(tmp_path / "nms.json").cases]

    def again(report, **more):
        [case] = report.cases
        rows = (dataclasses.replace(case.rows[0], rounds=9), *case.rows[1:])
        return dataclasses.replace(report, cases=(dataclasses.replace(case, rows=rows),), **more)

    first, second = a_report("nms", "1000"), a_report("nms", "20000")
    assert names(first, second) == [("1000", 5), ("20000", 5)]
    tomorrow = {**MACHINE, "date": "2020-02-03T02:02:02+00:00"}
    assert names(again(first, machine=tomorrow)) == [("1000", 9), ("20000", 5)]
    assert names(again(second, settings={"threads": 1})) == [("20000", 9)]
    assert names(again(first, settings={"threads": 1}, note="Published.")) == [("1000", 9)]


def test_a_run_keeps_each_result_at_once(tmp_path, monkeypatch, capsys):
    """What comes before an interruption, or a crash, is there."""

    def run_case(suite, case, *arguments):
        if case.name == "20000":
            raise MemoryError
        return a_report(suite.name, case.name).cases[0]

    monkeypatch.setattr(runner, "run_case", run_case)
    monkeypatch.setattr(machine, "describe_machine", lambda: MACHINE)
    with pytest.raises(MemoryError):
        cli.main(["run", "nms", "--save", str(tmp_path)])
    assert [case.case for case in Report.read(tmp_path / "nms.json").cases] == ["1000", "4000"]


def test_the_command_writes_page_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    page.write_results(a_report("nms", "20000"), tmp_path / "results" / "machine")
    readme = tmp_path / "README.md"
    readme.write_text(f"Before.\n{speed._BEGIN}Old.\n{speed._END}After.\n")
    options = ["--results", str(tmp_path / "results"), "--docs", str(tmp_path), "--readme", str(readme)]
    assert cli.main(["report", *options]) == 0
    results = page.read_results(tmp_path / "results")
    assert "| `nms`, 20000 boxes | 12.3 ms | 2.00 | - | 2.00 |\n" in speed.tables(results)
    assert readme.read_text() == f"Before.\n{speed._BEGIN}{speed.tables(results)}{speed._END}After.\n"
    assert (tmp_path / "benchmarks.md").read_text() == page.page(results, load_suites())
    assert speed.drawn_from(tmp_path / "speed.png") == speed.digest(results)
    page.write_results(a_report("nms", "20000", note="Now."), tmp_path / "results" / "machine")
    assert speed.digest(page.read_results(tmp_path / "results")) == speed.digest(results)
    slower = a_report("nms", "20000")
    ours, *others = slower.cases[0].rows
    ours = dataclasses.replace(ours, seconds=Spread(0.02))
    page.write_results(
        dataclasses.replace(slower, cases=(dataclasses.replace(slower.cases[0], rows=(ours, *others)),)),
        tmp_path / "results" / "machine",
    )
    assert speed.digest(page.read_results(tmp_path / "results")) != speed.digest(results)


def test_models_are_compared_in_each_precision():
    def row(name, role, milliseconds, **ratios):
        return Row(
            name, role, "ok", seconds=Spread(milliseconds / 1e3), ratios={k: Spread(v) for k, v in ratios.items()}
        )

    rows = (
        row("ours-frozen", "ours", 20),
        row("ours-aoti", "ours", 18, **{"ours-frozen": 0.9}),
        row("ours-winograd", "ours", 14, **{"ours-frozen": 0.7}),
        row("ours-bf16", "ours", 10),
        row("openvino", "peer", 30, **{"ours-frozen": 1.5, "ours-bf16": 3.0}),
        row("openvino-default", "peer", 13, **{"ours-frozen": 0.6}),
        Row("onnxruntime", "peer", "ok", ratios={"ours-frozen": Spread(1.1)}),  # as of what was published
    )
    case = CaseResult("classifiers", "resnet50-b1", "a case", 1e-4, rows)
    report = Report(MACHINE, {"threads": 2}, (case,))
    faster = dataclasses.replace(case, rows=(row("ours-bf16", "ours", 5),))
    later = Report({**MACHINE, "date": "9999-01-01"}, {"threads": 2}, (faster,))
    text = speed.tables({"classifiers": [report]})
    assert "| ResNet-50, float32 | 20.0 ms | 0.70 | 0.90 | - | 1.10 | 1.50 |\n" in text
    assert "| ResNet-50, bfloat16 | 10.0 ms | - | - | - | - | 1.30 |\n" in text
    text = speed.tables({"classifiers": [report, later]})  # each row is of the latest run that has it
    assert "| ResNet-50, float32 | 20.0 ms |" in text and "| ResNet-50, bfloat16 | 5.00 ms |" in text


def test_what_is_no_result(tmp_path, capsys):
    with pytest.raises(UserError, match="the README has no place for tables"):
        speed.with_table("No place.", {})
    with pytest.raises(UserError, match="no results in"):
        page.read_results(tmp_path)
    (tmp_path / "machine").mkdir()
    a_report("nms", "20000").write(tmp_path / "machine" / "roi_align.json")
    assert cli.main(["report", "--results", str(tmp_path), "--docs", str(tmp_path)]) == 2
    assert "roi_align.json is not the result of a run of roi_align alone" in capsys.readouterr().err
