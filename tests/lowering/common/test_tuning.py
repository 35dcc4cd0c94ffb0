"""Choices by measurement: the fast one is found, and remembered for the machine it was measured on."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from filelock import FileLock
from inductor_vision import DeformConv2d
from inductor_vision.lowering.common import tuning
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import compile_and_run
from inductor_vision.tests.support.deform_conv2d import Case, oracle, sample

MILLISECONDS = [12, 3, 8]  # candidates, told apart by how long they take


class Clock:
    """Stands for the module time: only what is measured makes it go on, however busy the machine is."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def tuned(tmp_path, monkeypatch) -> pathlib.Path:
    """The folder of what was measured, in one of the test's own."""
    monkeypatch.setattr(tuning, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    monkeypatch.setattr(tuning, "time", CLOCK)
    return tmp_path / "inductor_vision" / "tuned"


def remembered(tuned: pathlib.Path) -> list[dict[str, str]]:
    return sorted((json.loads(path.read_text()) for path in tuned.glob("*.json")), key=lambda choice: choice["problem"])


def choice(problem: str, fastest: str) -> dict[str, str]:
    return {"machine": tuning.machine(), "problem": problem, "fastest": fastest}


def sleeping() -> Callable[[int], None]:
    def run(milliseconds: int) -> None:
        CLOCK.now += milliseconds / 1000

    return run


def forbidden() -> Callable[[int], None]:
    raise AssertionError("measured again")


def test_the_fast_candidate_is_found_and_remembered(tuned):
    assert tuning.fastest("problem", MILLISECONDS, sleeping) == 3
    assert remembered(tuned) == [choice("problem", "3")]
    assert tuning.fastest("problem", MILLISECONDS, forbidden) == 3


def test_problems_are_told_apart(tuned):
    assert tuning.fastest("problem", MILLISECONDS, sleeping) == 3
    assert tuning.fastest("other", [9, 5], sleeping) == 5
    assert remembered(tuned) == [choice("other", "5"), choice("problem", "3")]


def test_a_choice_that_is_no_candidate_any_more_is_measured_anew():
    assert tuning.fastest("problem", MILLISECONDS, sleeping) == 3
    assert tuning.fastest("problem", [12, 8], sleeping) == 8
    assert tuning.fastest("problem", [12, 8], forbidden) == 8


def test_a_choice_holds_for_one_number_of_threads():
    assert tuning.fastest("problem", MILLISECONDS, sleeping) == 3
    torch.set_num_threads(torch.get_num_threads() + 1)
    with pytest.raises(AssertionError, match="measured again"):
        tuning.fastest("problem", MILLISECONDS, forbidden)


def test_a_choice_holds_for_one_vector_width():
    from torch._inductor import config

    wide = tuning.machine()
    with config.patch({"cpp.simdlen": 1}):
        assert tuning.machine() != wide


@pytest.mark.parametrize("content", [b"", b'{"fastest": "prob', b"\xff\x00\xfe", b"[]", b'{"fastest": 1}', b"{}"])
def test_a_damaged_file_is_measured_anew(tuned, content):
    tuning.fastest("problem", MILLISECONDS, sleeping)
    (file,) = tuned.glob("*.json")
    file.write_bytes(content)
    assert tuning.fastest("problem", MILLISECONDS, sleeping) == 3
    assert tuning.fastest("problem", MILLISECONDS, forbidden) == 3


def test_a_candidate_that_fails_leaves_the_files_as_they_are(tuned):
    tuning.fastest("problem", MILLISECONDS, sleeping)
    with pytest.raises(AssertionError):
        tuning.fastest("other", MILLISECONDS, forbidden)
    assert remembered(tuned) == [choice("problem", "3")]
    assert tuning.fastest("other", MILLISECONDS, sleeping) == 3


def assert_measured_and_not_remembered(tuned: pathlib.Path) -> None:
    for _ in range(2):
        assert tuning.fastest("problem", MILLISECONDS, sleeping) == 3
    assert not [path for path in tuned.rglob("*") if path.suffix != ".lock"]


def test_no_directory_can_be_made(tuned):
    tuned.parent.write_text("a file")
    assert_measured_and_not_remembered(tuned)


def test_a_directory_that_cannot_be_written(tuned, monkeypatch):
    """Root may write whatever the permissions are: what opens files is told to refuse."""
    tuned.mkdir(parents=True)
    original = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return original(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    assert_measured_and_not_remembered(tuned)
    assert not list(tuned.iterdir())


@pytest.mark.parametrize("when", ["write_text", "replace"])
def test_a_full_disk(tuned, monkeypatch, when):
    original = getattr(pathlib.Path, when)

    def full(path, *args, **kwargs):
        if when == "write_text":
            original(path, "{")  # half of it
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(pathlib.Path, when, full)
    assert_measured_and_not_remembered(tuned)


def test_a_lock_that_is_not_released(tuned, monkeypatch):
    """As of a process that was stopped. Other problems have locks of their own."""
    monkeypatch.setattr(tuning, "PATIENCE", 0.1)
    tuning.fastest("problem", MILLISECONDS, sleeping)
    (file,) = tuned.glob("*.json")
    with FileLock(f"{file}.lock"):
        assert tuning.fastest("problem", MILLISECONDS, forbidden) == 3  # what is known is there for all to read
        file.unlink()
        assert_measured_and_not_remembered(tuned)
        assert tuning.fastest("other", MILLISECONDS, sleeping) == 3
        assert remembered(tuned) == [choice("other", "3")]


def test_a_file_system_without_locks(tuned, monkeypatch):
    def acquire(self, *args, **kwargs):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    assert_measured_and_not_remembered(tuned)


TUNE = """
import pathlib, sys, time
from inductor_vision.lowering.common import tuning

folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
tuning.cache_dir = lambda: str(folder)

def prepare():
    with open(folder / "log", "a") as log:
        print("measured", file=log)
    time.sleep(2)
    return lambda milliseconds: time.sleep(milliseconds / 1000)

tuning.machine()
(folder / name).touch()
while not all((folder / name).exists() for name in "ab"):
    time.sleep(0.01)
print(tuning.fastest("problem", [12, 3, 8], prepare))
"""


def test_of_two_processes_one_measures(tmp_path):
    command = [sys.executable, "-c", TUNE, str(tmp_path)]
    processes = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "ab"]
    try:
        assert [process.communicate(timeout=120)[0].strip() for process in processes] == ["3", "3"]
    finally:
        for process in processes:
            process.kill()
    assert (tmp_path / "log").read_text().splitlines() == ["measured"]


@pytest.mark.slow
@pytest.mark.parametrize("groups,layout", [(1, "contiguous"), (24, "channels_last")])
def test_max_autotune_measures_once(tuned, monkeypatch, groups, layout):
    layer = DeformConv2d(24, 24, 3, padding=1, groups=groups)
    x, offset = sample(Case(channels=24, out_channels=24, size=(20, 30), mask=False, layout=layout)).args[:2]
    measured = []

    def measure(candidates, run):
        for candidate in candidates:
            run(candidate)
        measured.append(candidates)
        return candidates[1]

    monkeypatch.setattr(tuning, "_measure", measure)
    with torch.no_grad():
        for _ in range(2):
            compiled = compile_and_run(layer, x, offset, config={"max_autotune": True})
            assert_close(compiled.result, oracle(x, offset, layer.weight, layer.bias, padding=1), x.dtype)
            assert compiled.paths[0].detail.endswith(repr(measured[0][1]))
    assert len(measured) == 1
    (known,) = remembered(tuned)
    problem = known["problem"]
    assert problem.startswith("deform_conv2d Instance(convolution=DeformableConvolution(channels=24")
    assert f"channels_last={layout == 'channels_last'}" in problem
    assert known["fastest"] == repr(measured[0][1])


@pytest.mark.slow
def test_max_autotune_on_the_clock(tuned):
    layer = DeformConv2d(24, 24, 3, padding=1)
    x, offset = sample(Case(channels=24, out_channels=24, size=(20, 30), mask=False)).args[:2]
    with torch.no_grad():
        compiled = compile_and_run(layer, x, offset, config={"max_autotune": True})
    assert_close(compiled.result, oracle(x, offset, layer.weight, layer.bias, padding=1), x.dtype)
    (known,) = remembered(tuned)
    assert compiled.paths[0].detail.endswith(known["fastest"])
