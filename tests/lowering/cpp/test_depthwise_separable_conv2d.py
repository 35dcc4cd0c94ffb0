"""depthwise_separable_conv2d.h by itself, under sanitizers: values, bounds, and bits that depend on nothing but the
input."""

from __future__ import annotations

import pathlib

import pytest
from inductor_vision.tests.support.cpp import CAPABILITIES, run_sanitized

SOURCE = pathlib.Path(__file__).with_name("depthwise_separable_conv2d_test.cpp")
OPTIMIZATION = "-O0"  # to optimize this program would take longer than to run it as it is

pytestmark = pytest.mark.slow

# How many calls of random shape, besides those in the source; without vector instructions a call takes long.
RANDOM_CALLS = {"AVX-512": 60, "AVX2": 60, "no vector instructions": 10}


@pytest.mark.parametrize("name", CAPABILITIES)
def test_under_sanitizers(program, name):
    figures = run_sanitized(program(name), str(RANDOM_CALLS[name]))
    assert figures["lanes"] == CAPABILITIES[name].lanes
    assert figures["calls"] > 5 * RANDOM_CALLS[name]  # in 4 types, and floats with an expansion
    assert figures["runs"] == 10 * figures["calls"]  # each by 5 settings and 2 stores
