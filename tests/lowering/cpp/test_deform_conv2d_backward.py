"""deform_conv2d_backward.h by itself, under sanitizers: values, bounds, bits that depend on nothing but the input."""

from __future__ import annotations

import pathlib

import pytest
from inductor_vision.tests.support.cpp import CAPABILITIES, run_sanitized

SOURCE = pathlib.Path(__file__).with_name("deform_conv2d_backward_test.cpp")
OPTIMIZATION = "-O1"

pytestmark = pytest.mark.slow

# How many calls of random shape, besides those in the source; without vector instructions a call takes long.
RANDOM_CALLS = {"AVX-512": 8, "AVX2": 5, "no vector instructions": 1}


@pytest.mark.parametrize("name", CAPABILITIES)
def test_under_sanitizers(program, name):
    figures = run_sanitized(program(name), str(RANDOM_CALLS[name]))
    assert figures["lanes"] == CAPABILITIES[name].lanes
    assert figures["calls"] >= 180 + 6 * RANDOM_CALLS[name]  # by each kernel that can do it, in each type
    assert figures["runs"] > 6 * figures["calls"]
