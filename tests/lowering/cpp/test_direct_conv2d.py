"""direct_conv2d.h by itself, under sanitizers: values, bounds, and bits that depend on nothing but the input."""

from __future__ import annotations

import pathlib

import pytest
from inductor_vision.tests.support.cpp import CAPABILITIES, run_sanitized

SOURCE = pathlib.Path(__file__).with_name("direct_conv2d_test.cpp")
OPTIMIZATION = "-O1"

pytestmark = pytest.mark.slow

# How many calls of random shape, besides those in the source; without vector instructions a call takes long.
RANDOM_CALLS = {"AVX-512": 20, "AVX2": 20, "no vector instructions": 2}


@pytest.mark.parametrize("name", CAPABILITIES)
def test_under_sanitizers(program, name):
    figures = run_sanitized(program(name), str(RANDOM_CALLS[name]))
    assert figures["lanes"] == CAPABILITIES[name].lanes
    calls = 17 + RANDOM_CALLS[name]
    assert figures["calls"] == 3 * calls  # in 3 dtypes
    assert figures["runs"] == 3 * 10 * calls
