"""nms.h by itself, under sanitizers: values, bounds, and results that depend on nothing but the input."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import pytest
from inductor_vision.tests.support.cpp import CAPABILITIES, compile_only, run_sanitized, sanitized_programs

SOURCE = pathlib.Path(__file__).with_name("nms_test.cpp")

pytestmark = pytest.mark.slow

# How many calls with many boxes for each kind of them, in float and double, besides those in the source.
REPEATS = {"AVX-512": 6, "AVX2": 6, "no vector instructions": 2}


@pytest.fixture(scope="module")
def program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], pathlib.Path]]:
    with sanitized_programs(request, tmp_path_factory.mktemp("nms"), SOURCE) as programs:
        yield programs


@pytest.mark.parametrize("name", CAPABILITIES)
def test_under_sanitizers(program, name):
    figures = run_sanitized(program(name), str(REPEATS[name]))
    assert figures["lanes"] == CAPABILITIES[name].lanes
    assert figures["calls"] > 15 * (9 * 11 + 2 * REPEATS[name])  # 15 kinds of boxes, in 11 sizes and 9 pairs of types
    assert figures["runs"] == 3 * figures["calls"]  # on 1, 2 and 3 threads
    assert figures["large"] >= 10
    assert figures["kept"] > 100_000
    assert figures["suppressed"] > 100_000


@pytest.mark.parametrize("name", CAPABILITIES)
def test_compiles_with_clang(name):
    CAPABILITIES[name].skip_unless_it_runs_here()
    compile_only("clang++", SOURCE, CAPABILITIES[name])
