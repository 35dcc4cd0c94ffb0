"""The table of modes of sampling operators: which cases there are, and what a kernel that ends its process gives."""

from __future__ import annotations

import os

import pytest
from inductor_vision.perf import sampling_modes
from inductor_vision.perf.sampling_modes import chosen


@pytest.mark.parametrize(("operator", "count"), [("grid_sampler_2d", 864), ("upsample2d", 96)])
def test_every_case_is_another(operator, count):
    _, make = sampling_modes._MATRICES[operator]
    problems = list(make())
    assert len({str(problem) for problem in problems}) == len(problems) == count
    sample = chosen(problems, 10)
    assert sample == chosen(problems, 10) and len(set(map(str, sample))) == 10
    assert chosen(problems, None) == problems


def test_a_process_that_ends(monkeypatch):
    def measure(operator, problem, threads, seconds, names):
        if "eager" in names:
            os._exit(1)
        return {name: 2.0 if name.startswith("ours") else 3.0 for name in names}

    monkeypatch.setattr(sampling_modes, "_measure", measure)
    row = sampling_modes._row("grid_sampler_2d", "case", 1, 0.0)
    assert row == "| case | 2 | ends the process | 3 | 1.50 |"


def test_contenders_are_measured(capsys, monkeypatch):
    """All but the one that is compiled in other tests."""
    monkeypatch.setattr(sampling_modes, "_CONTENDERS", ("eager",))
    sampling_modes.main(["--operator", "upsample2d", "--sample", "1", "--threads", "1", "--seconds", "0.01"])
    *_, row = capsys.readouterr().out.splitlines()
    _, case, milliseconds, _, _ = row.split("|")
    assert "ch, " in case and float(milliseconds) > 0
