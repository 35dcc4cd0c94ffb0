"""upsample2d.h by itself, under sanitizers: values, bounds, and bits that depend on nothing but the input."""

from __future__ import annotations

import pathlib

import pytest
from inductor_vision.tests.support.cpp import CAPABILITIES, run_sanitized

SOURCE = pathlib.Path(__file__).with_name("upsample2d_test.cpp")
OPTIMIZATION = "-O1"

pytestmark = pytest.mark.slow

# Calls of random shape for each of 4 dtypes.
CALLS = {"AVX-512": 150, "AVX2": 150, "no vector instructions": 60}


@pytest.mark.parametrize("name", CAPABILITIES)
def test_under_sanitizers(program, name):
    figures = run_sanitized(program(name), str(CALLS[name]))
    assert figures["lanes"] == CAPABILITIES[name].lanes
    assert figures["calls"] == 4 * (CALLS[name] + 2)
    assert figures["runs"] == 6 * figures["calls"]  # two memory formats, on 1, 2 and 3 threads
    assert 0 < figures["error"] <= 1  # as a part of what is allowed
