"""nms.h by itself, under sanitizers: values, bounds, and results that depend on nothing but the input."""

from __future__ import annotations

import pathlib

import pytest
from inductor_vision.tests.support.cpp import CAPABILITIES, run_sanitized

SOURCE = pathlib.Path(__file__).with_name("nms_test.cpp")
OPTIMIZATION = "-O1"

pytestmark = pytest.mark.slow

# How many calls with many boxes for each kind of them, in float and double, besides those in the source.
REPEATS = {"AVX-512": 6, "AVX2": 6, "no vector instructions": 2}


@pytest.mark.parametrize("name", CAPABILITIES)
def test_under_sanitizers(program, name):
    figures = run_sanitized(program(name), str(REPEATS[name]))
    assert figures["lanes"] == CAPABILITIES[name].lanes
    assert figures["calls"] > 15 * (9 * 11 + 2 * REPEATS[name])  # 15 kinds of boxes, in 11 sizes and 9 pairs of types
    assert figures["runs"] == 3 * figures["calls"]  # on 1, 2 and 3 threads
    assert figures["large"] >= 10
    assert figures["kept"] > 100_000
    assert figures["suppressed"] > 100_000
