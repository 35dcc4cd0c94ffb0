"""nms.h by itself, under sanitizers: values, bounds, and results that depend on nothing but the input."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import pytest
from inductor_vision.tests.support.cpp import CAPABILITIES, compile_only, run_sanitized, sanitized_programs

SOURCE = pathlib.Path(__file__).with_name("nms_test.cpp")

pytestmark = pytest.mark.slow

# How many random calls for each pair of types, besides those in the source.
RANDOM_CALLS = {"AVX-512": 60, "AVX2": 40, "no vector instructions": 10}


@pytest.fixture(scope="module")
def program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], pathlib.Path]]:
    with sanitized_programs(request, tmp_path_factory.mktemp("nms"), SOURCE) as programs:
        yield programs


@pytest.mark.parametrize("name", CAPABILITIES)
def test_under_sanitizers(program, name):
    figures = run_sanitized(program(name), str(RANDOM_CALLS[name]))
    assert figures["lanes"] == CAPABILITIES[name].lanes


@pytest.mark.parametrize("name", CAPABILITIES)
def test_compiles_with_clang(name):
    CAPABILITIES[name].skip_unless_it_runs_here()
    compile_only("clang++", SOURCE, CAPABILITIES[name])
