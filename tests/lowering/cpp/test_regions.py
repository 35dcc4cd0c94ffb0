"""The kernels of the operators on regions by themselves, under sanitizers: values, bounds, errors, and bits that depend
on nothing but the input."""

from __future__ import annotations

import pathlib

import pytest
from inductor_vision.tests.support.cpp import CAPABILITIES, run_sanitized

SOURCE = pathlib.Path(__file__).with_name("regions_test.cpp")
OPTIMIZATION = "-O0"  # to optimize this program would take longer than to run it as it is

pytestmark = pytest.mark.slow

# How many calls of random shape for each operator and pair of types, besides those in the source.
RANDOM_CALLS = {"AVX-512": 8, "AVX2": 4, "no vector instructions": 2}


@pytest.mark.parametrize("name", CAPABILITIES)
def test_under_sanitizers(program, name):
    figures = run_sanitized(program(name), str(RANDOM_CALLS[name]))
    assert figures["lanes"] == CAPABILITIES[name].lanes
    assert figures["calls"] > 4 * 8 * RANDOM_CALLS[name]  # of 4 operators, in 8 pairs of types
    assert figures["runs"] >= 2 * 6 * figures["calls"]  # forward and backward, in 6 settings
    assert figures["rejected"] > 0
