"""``python -m inductor_vision.perf``, on a suite that takes no time."""

import dataclasses
import gc
import os
import subprocess
import sys

import pytest
import torch
from inductor_vision.perf import __main__ as cli, interleaving, machine, memory
from inductor_vision.perf.results import CaseResult, Report, Row, Spread
from inductor_vision.perf.spec import Case, Contender, Prepared, Suite, Unavailable
from inductor_vision.perf.suites import load_suites
from inductor_vision.tests.support.machine import MACHINE


def doubles(factor):
    return lambda job: Prepared(lambda: job.inputs * factor, job.inputs * factor)


def missing():
    raise Unavailable("peer_library is not installed")


def fake_suite(factor):
    contenders = (
        Contender("us", "ours", doubles(factor)),
        Contender("them", "peer", doubles(2)),
        Contender("absent", "peer", doubles(2), check=missing),
        Contender("bound", "limit", doubles(5)),
    )
    cases = tuple(Case(name, f"the {name} one", lambda: torch.ones(8), 1e-6) for name in ("small", "large"))
    return Suite("fake", "doubling", cases, contenders, lambda x: 2 * x.double())


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # takes a third of a second beside a loaded torch
    monkeypatch.setattr(interleaving, "wait_until_idle", lambda: None)
    monkeypatch.setattr(interleaving, "_CALIBRATION_SECONDS", 0.002)
    monkeypatch.setattr(machine, "describe_machine", lambda: MACHINE)

    def call(*arguments, factor=2):
        monkeypatch.setattr(cli, "load_suites", lambda: {"fake": fake_suite(factor)})
        status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def run_arguments(*more):
    return ("run", "fake", "--case", "small", "--seconds", "0.05", *more)


def test_run_prints_a_table_and_reports_progress(command):
    status, out, err = command(*run_arguments())
    assert status == 0
    assert "a processor, AVX2" in out and "fake/small: the small one" in out
    assert "fake/large" not in out
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert "/ bound" in lines["contender"] and "/ us" in lines["contender"]
    assert lines["absent"].endswith("skipped: peer_library is not installed")
    assert "other arithmetic" in lines["bound"]
    assert "fake/small: preparing them" in err and "\r" not in err


def test_a_wrong_result_fails_the_run(command):
    status, out, err = command(*run_arguments(), factor=3)
    assert status == 1
    [line] = [line for line in out.splitlines() if line.startswith("  us")]
    assert line.split(maxsplit=1)[1] == "WRONG: relative error 5.0e-01, allowed 1e-06"
    assert "/ us" not in out
    assert "error: fake/small: us is wrong" in err


def test_list_and_help_name_cases_contenders_and_who_is_unavailable(command):
    for arguments in (["list"], []):
        status, out, _ = command(*arguments)
        assert status == 0
        assert "small  the small one" in out
        assert "absent  peer, unavailable: peer_library is not installed" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nms"], "no suite matches 'nms'; there are: fake"),
        (["run", "--case", "tiny"], "no case matches 'tiny'; there are: small, large"),
        (["run", "--contender", "x*"], "no contender of these cases matches 'x*'; there are: us, them, absent, bound"),
        (["run", "--json", "no-such-folder/x.json"], "there is no folder no-such-folder"),
        (["show", "no-such-file.json"], "No such file"),
    ],
)
def test_unknown_names(command, arguments, message):
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_json_is_read_back_as_it_was_written_and_shown(command, tmp_path):
    path = tmp_path / "report.json"
    _, out, _ = command(*run_arguments("--json", path, "--threads", "1"))
    report = Report.read(path)
    again = tmp_path / "again.json"
    report.write(again)
    assert again.read_text() == path.read_text()
    assert report.settings == {"threads": 1, "seconds": 0.05, "compile_time": False, "memory": "returned"}
    assert report.cases[0].first("ours").ratios["bound"].median > 0
    assert command("show", path)[1] == out


@pytest.mark.parametrize(
    ("text", "message"), [('{"format": 99}', "a report in format 99"), ("[]", "not a report"), ("", "not a report")]
)
def test_another_file_is_refused(command, tmp_path, text, message):
    path = tmp_path / "report.json"
    path.write_text(text)
    status, _, err = command("show", path)
    assert status == 2 and message in err


def test_published_medians_are_shown_without_what_is_not_known(command, tmp_path):
    rows = (
        Row("us", "ours", "ok", seconds=Spread(2e-3)),
        Row("them", "peer", "ok", ratios={"us": Spread(10.0)}),
    )
    path = tmp_path / "report.json"
    Report(MACHINE, {"threads": 4}, (CaseResult("fake", "small", "the small one", 1e-6, rows),)).write(path)
    assert Report.read(path).cases[0].rows == rows
    out = command("show", path)[1]
    cells = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("  ")}
    assert cells["us"] == ["2.00", "-", "1", "-", "-"]
    assert cells["them"] == ["-", "-", "10.0", "-", "-"]
    assert "| small: the small one | 2.00 ms | 10.0 |" in command("show", path, "--markdown")[1]


@pytest.mark.parametrize(
    ("environment", "setting"),
    [
        ({"PATH": "/bin"}, "returned"),
        (memory.KEEPING, "kept"),
        ({**memory.KEEPING, "MALLOC_ARENA_MAX": "2"}, "MALLOC_ARENA_MAX=2 MALLOC_MMAP_MAX_=0"),
        ({**memory.KEEPING, "LD_PRELOAD": "libjemalloc.so"}, "LD_PRELOAD=libjemalloc.so MALLOC_ARENA_MAX=1"),
        ({"LD_PRELOAD": "libjemalloc.so"}, "LD_PRELOAD=libjemalloc.so"),
    ],
)
def test_the_report_says_what_becomes_of_freed_memory(environment, setting):
    assert memory.setting(environment).startswith(setting)


@pytest.mark.skipif(memory.platform.libc_ver()[0] != "glibc", reason="this C library cannot be told to keep memory")
def test_kept_memory_is_not_mapped_again(command, monkeypatch):
    """The command starts itself again, told so; a process that is told so does."""
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    command(*run_arguments("--memory", "kept"))
    [(program, arguments, environment)] = started
    assert program == sys.executable
    assert arguments == [program, "-m", "inductor_vision.perf", *run_arguments("--memory", "kept")]

    def faults(environment):
        done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], env=environment, capture_output=True, text=True)
        return int(done.stdout)

    assert memory.setting(environment) == "kept"
    assert faults(environment) < 100
    assert faults({name: value for name, value in environment.items() if name not in memory.KEEPING}) > 1000


@pytest.mark.skipif(memory.platform.libc_ver()[0] != "glibc", reason="this C library cannot be told to keep memory")
@pytest.mark.parametrize("variable", ["LD_PRELOAD", "MALLOC_PERTURB_"])
def test_other_settings_of_malloc_are_an_error(command, monkeypatch, variable):
    """It does not start itself again, which would not end."""
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("started again"))
    monkeypatch.setenv(variable, "1")
    status, _, error = command(*run_arguments("--memory", "kept"))
    assert status == 2 and f"--memory kept: this process was started with {variable}=1" in error


PAGE_FAULTS = """
import ctypes, resource

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def use(size=64 << 20):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def a_report(foreign_cores=0.0):
    def row(name, role, seconds, ratios, **more):
        spreads = {other: Spread(ratio, ratio, ratio) for other, ratio in ratios.items()}
        return Row(
            name, role, "ok", error=1e-7, seconds=Spread(seconds, seconds, seconds), rounds=5, ratios=spreads, **more
        )

    rows = (
        row("us", "ours", 2e-3, {"them": 0.1, "bound": 1.25}, memory=3 << 20),
        row("them", "peer", 20e-3, {"us": 10.0, "bound": 12.5}),
        Row("absent", "peer", "unavailable", reason="peer_library is not installed"),
        row("bound", "limit", 1.6e-3, {"us": 0.8, "them": 0.08}),
    )
    settings = {"threads": 4, "seconds": 10.0, "compile_time": False}
    return Report(MACHINE, settings, (CaseResult("fake", "small", "the small one", 1e-6, rows, foreign_cores),))


def test_markdown(command, tmp_path):
    path = tmp_path / "report.json"
    a_report().write(path)
    lines = command("show", path, "--markdown")[1].splitlines()
    assert lines[0].startswith(
        "a processor, AVX2, 4 threads on 4 cores; torch 2.13.0; a compiler; 2020-02-02; freed memory"
    )
    assert lines[2] == "| fake | us | them | bound | extra memory |"
    assert lines[4] == "| small: the small one | 2.00 ms | 10.0 | 0.80 | 3.0 MB |"
    assert "- fake, absent: skipped: peer_library is not installed" in lines


def test_markdown_has_times_of_compilation_if_they_were_measured(command, tmp_path):
    [case] = a_report().cases
    us, *others = case.rows
    us = dataclasses.replace(us, compile_cold=12.34, compile_warm=0.5)
    path = tmp_path / "report.json"
    nobody = dataclasses.replace(case, case="nobody", rows=(Row("us", "ours", "wrong", reason="it is"),))
    dataclasses.replace(a_report(), cases=(dataclasses.replace(case, rows=(us, *others)), nobody)).write(path)
    lines = command("show", path, "--markdown")[1].splitlines()
    assert lines[2] == "| fake | us | them | bound | extra memory | compile cold | warm |"
    assert lines[4] == "| small: the small one | 2.00 ms | 10.0 | 0.80 | 3.0 MB | 12.3 s | 0.5 s |"
    assert lines[5] == "| nobody: the small one | WRONG | - | - | - | - | - |"


def test_markdown_of_cases_with_other_contenders(command, tmp_path):
    """A column for each contender of any case; who stands for this package may differ."""
    [case] = a_report().cases
    us, them, *_ = case.rows
    alone = dataclasses.replace(
        us, contender="us-alone", seconds=Spread(4e-3), ratios={"them": Spread(0.2)}, memory=None
    )
    them = dataclasses.replace(them, ratios={"us-alone": Spread(5.0)})
    wrong = Row("us", "ours", "wrong", reason="relative error 1.0e+00")
    other = dataclasses.replace(case, case="other", rows=(wrong, alone, them), foreign_cores=None)
    path = tmp_path / "report.json"
    dataclasses.replace(a_report(), cases=(case, other), note="By the way.").write(path)
    lines = command("show", path, "--markdown")[1].splitlines()
    assert lines[0].endswith("freed memory: returned. By the way.")
    assert lines[2] == "| fake | us | us-alone | them | bound | extra memory |"
    assert lines[4] == "| small: the small one | 2.00 ms | - | 10.0 | 0.80 | 3.0 MB |"
    assert lines[5] == "| other: the small one | WRONG | 4.00 ms | 5.00 | - | - |"
    assert "- fake, absent: skipped: peer_library is not installed (small)" in lines
    assert "- fake, us: WRONG: relative error 1.0e+00 (other)" in lines


def test_a_busy_machine_is_pointed_out(command, tmp_path):
    path = tmp_path / "report.json"
    a_report(foreign_cores=1.5).write(path)
    for more in ([], ["--markdown"]):
        assert "other programs kept 1.5 cores busy" in command("show", path, *more)[1]


def test_plot(command, tmp_path):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "report.json", tmp_path / "report.png"
    a_report().write(path)
    assert command("show", path, "--plot", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_suites_are_found_in_their_folder():
    suites = load_suites()
    assert "deform_conv2d" in suites
    assert all(name == suite.name for name, suite in suites.items())
