"""The benchmark runner on a suite of sleeping functions."""

import gc
import io
import itertools
import math
import sys
import threading
import time

import pytest
import torch
from inductor_vision.perf import interleaving, runner
from inductor_vision.perf.interleaving import Side, interleave, wait_until_idle
from inductor_vision.perf.memory import extra_memory
from inductor_vision.perf.progress import Progress
from inductor_vision.perf.results import Report
from inductor_vision.perf.runner import Settings, run_case
from inductor_vision.perf.spec import Case, Contender, Prepared, Suite, Unavailable, UserError, matching, select
from inductor_vision.perf.verify import relative_error

SETTINGS = Settings(threads=1, seconds=0.2)


def double(job, *, factor=2.0, seconds=0.0):
    def call():
        time.sleep(seconds)
        return job.inputs * factor

    return Prepared(call, call())


def missing():
    raise Unavailable("it is not installed")


def not_this_case(job):
    raise Unavailable("not this case")


def broken(job):
    raise ZeroDivisionError("what happened")


def suite_of(*contenders):
    case = Case("small", "three numbers", lambda: torch.arange(1.0, 4.0), 1e-6)
    return Suite("fake", "doubling", (case,), contenders, lambda x: 2 * x.double())


def run(*contenders, settings=SETTINGS):
    suite = suite_of(*contenders)
    result = run_case(suite, suite.cases[0], suite.contenders, settings, Progress(io.StringIO()))
    return result, {row.contender: row for row in result.rows}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # takes a third of a second beside a loaded torch
    monkeypatch.setattr(interleaving, "wait_until_idle", lambda: None)
    monkeypatch.setattr(interleaving, "_CALIBRATION_SECONDS", 0.002)


def test_threads_that_spin_are_waited_for():
    end = time.perf_counter() + 0.1

    def spin():
        while time.perf_counter() < end:
            pass

    threading.Thread(target=spin).start()
    wait_until_idle()
    assert time.perf_counter() >= end


def test_every_round_has_every_side_once_in_rotated_order():
    order = []
    sides = [Side(name, 1, lambda: time.sleep(0.002)) for name in "abc"]
    interleave(sides, 0.1, order.append)
    rounds = [[text[-1] for text in order if text.startswith(f"round {n}:")] for n in (1, 2, 3, 4)]
    assert rounds == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert sides[0].times.keys() >= {0, 1, 2, 3}


def test_a_side_is_at_rest_when_it_is_anothers_turn():
    order = []
    sides = [
        Side(name, 1, lambda name=name: order.append(name), settle=lambda name=name: order.append(f"{name} rests"))
        for name in "ab"
    ]
    interleave(sides, 0.01, lambda text: None)
    followers = {name: {after for before, after in itertools.pairwise(order) if before == name} for name in "ab"}
    assert followers == {name: {name, f"{name} rests"} for name in "ab"}


def test_a_contender_may_have_an_error_and_a_tolerance_of_its_own():
    inexact = {"error": lambda output, reference: relative_error(output / 2, reference), "tolerance": 0.1}
    _, rows = run(
        Contender("low", "ours", lambda job: double(job, factor=4.2), **inexact),
        Contender("lower", "ours", lambda job: double(job, factor=4.8), **inexact),
        Contender("exact", "peer", lambda job: double(job, factor=4.2)),
    )
    assert (rows["low"].status, rows["lower"].status, rows["exact"].status) == ("ok", "wrong", "wrong")
    assert rows["low"].error == pytest.approx(0.05)
    assert rows["lower"].reason == "relative error 2.0e-01, allowed 1e-01"


def test_a_slow_side_sits_out_once_its_share_is_used(monkeypatch):
    monkeypatch.setattr(interleaving, "_FEWEST_ROUNDS", 2)
    slow, quick = Side("slow", 1, lambda: time.sleep(0.02)), Side("quick", 1, lambda: time.sleep(0.001))
    interleave([slow, quick], 0.2, lambda text: None)
    assert 2 <= len(slow.times) < len(quick.times)
    assert slow.times.keys() <= quick.times.keys()


def test_times_and_ratios():
    _, rows = run(
        Contender("fast", "ours", lambda job: double(job, seconds=0.002)),
        Contender("slow", "peer", lambda job: double(job, seconds=0.008)),
    )
    fast, slow = rows["fast"], rows["slow"]
    assert 0.002 <= fast.seconds.p10 <= fast.seconds.median <= fast.seconds.p90
    assert fast.ratios["slow"].median < 1 < slow.ratios["fast"].median
    assert "fast" not in fast.ratios


def test_a_wrong_result_has_no_time_and_no_ratio():
    result, rows = run(
        Contender("wrong", "ours", lambda job: double(job, factor=2.1)),
        Contender("right", "peer", double),
    )
    assert rows["wrong"].status == "wrong"
    assert rows["wrong"].error == pytest.approx(0.05, rel=1e-3)
    assert rows["wrong"].seconds is None and rows["wrong"].ratios == {}
    assert "wrong" not in rows["right"].ratios
    assert Report({}, {}, (result,)).faults() == ["fake/small: wrong is wrong"]


def test_nonsense_is_wrong():
    _, rows = run(Contender("nan", "ours", lambda job: double(job, factor=math.nan)))
    assert (rows["nan"].status, rows["nan"].error, rows["nan"].seconds) == ("wrong", None, None)


def test_a_limit_may_compute_something_else():
    result, rows = run(
        Contender("limit", "limit", lambda job: double(job, factor=7.0)), Contender("us", "ours", double)
    )
    assert rows["limit"].status == "ok" and rows["limit"].error is None
    assert rows["us"].ratios["limit"].median > 0
    assert result.first("limit") is rows["limit"]


def test_who_cannot_take_part_is_named_with_the_reason():
    result, rows = run(
        Contender("absent", "peer", double, check=missing),
        Contender("refuses", "ours", not_this_case),
        Contender("breaks", "ours", broken),
    )
    assert (rows["absent"].status, rows["absent"].reason) == ("unavailable", "it is not installed")
    assert (rows["refuses"].status, rows["refuses"].reason) == ("unavailable", "not this case")
    assert (rows["breaks"].status, rows["breaks"].reason) == ("failed", "ZeroDivisionError: what happened")
    assert Report({}, {}, (result,)).faults() == ["fake/small: breaks is failed"]


def test_threads_are_set_for_each_contender_and_restored():
    seen = set()

    def prepare(job):
        def call():
            seen.add((job.threads, torch.get_num_threads()))
            return job.inputs * 2

        return Prepared(call, call())

    before = torch.get_num_threads()
    run(Contender("one", "ours", prepare, threads=1), Contender("all", "peer", prepare), settings=Settings(3, 0.05))
    assert seen == {(1, 1), (3, 3)}
    assert torch.get_num_threads() == before


def test_compile_time_of_compiled_contenders_only(monkeypatch):
    monkeypatch.setattr(runner, "compile_seconds", lambda *arguments: (2.0, 1.0))
    _, rows = run(
        Contender("compiled", "ours", double, compiled=True),
        Contender("eager", "peer", double),
        settings=Settings(1, 0.05, compile_time=True),
    )
    assert (rows["compiled"].compile_cold, rows["compiled"].compile_warm) == (2.0, 1.0)
    assert rows["eager"].compile_cold is None


@pytest.mark.parametrize(
    "output",
    [torch.tensor([1.0, math.nan]), torch.ones(3), (torch.ones(2), torch.ones(2)), torch.tensor([1.0, math.inf])],
    ids=["nan", "shape", "count", "infinite"],
)
def test_the_error_of_nonsense_is_infinite(output):
    assert relative_error(output, torch.ones(2)) == math.inf


def test_relative_error_of_arrays_and_sequences():
    right = [torch.tensor([1.0, 4.0], dtype=torch.float64), torch.tensor([1, 2])]
    assert relative_error([torch.tensor([1.0, 4.0]).numpy(), torch.tensor([1, 2])], right) == 0
    assert relative_error([torch.tensor([2.0, 4.0]), torch.tensor([1, 2])], right) == 0.25


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_memory_beyond_the_output():
    def call():
        scratch = torch.ones(8 << 20)  # 32 MiB
        return scratch[: 1 << 20].clone()  # 4 MiB

    assert extra_memory(call) == pytest.approx(32 << 20, abs=2 << 20)
    assert extra_memory(lambda: torch.ones(1 << 20)) < 2 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_pooled_memory_is_counted_when_the_contender_can_give_it_back():
    pool = {}

    def call():
        if not pool:
            pool["buffer"] = torch.ones(4 << 20)
        return torch.zeros(1)

    def lean():
        pool.clear()
        return call

    assert extra_memory(call) < 2 << 20
    assert extra_memory(call, lean) == pytest.approx(16 << 20, abs=2 << 20)


def test_suites_are_checked_as_they_are_declared():
    one = Contender("one", "ours", double)
    with pytest.raises(ValueError, match="declared twice: one"):
        suite_of(one, one)
    with pytest.raises(ValueError, match="no contender two"):
        Suite("fake", "", (Case("c", "", lambda: None, 1e-6, ("two",)),), (one,), lambda x: x)
    with pytest.raises(ValueError, match="role must be one of ours, peer, limit"):
        Contender("one", "us", double)


def test_selection_by_glob():
    suite = suite_of(Contender("us-1", "ours", double), Contender("extra", "ours", double, default=False))
    [(_, case, contenders)] = select([suite], ["sm*"], [])
    assert case.name == "small" and [c.name for c in contenders] == ["us-1"]
    with pytest.raises(UserError, match=r"no case matches 'large'; there are: small"):
        select([suite], ["large"], [])
    with pytest.raises(UserError, match=r"no contender .* matches 'extra'; there are: us-1"):
        select([suite], [], ["extra"])
    assert matching("name", ["a", "b", "a"], []) == ["a", "b"]
