"""heatmaps_to_keypoints.h by itself, under sanitizers: values, bounds, errors, and bits that depend on nothing but the
input."""

from __future__ import annotations

import pathlib

import pytest
from inductor_vision.tests.support.cpp import CAPABILITIES, run_sanitized

SOURCE = pathlib.Path(__file__).with_name("heatmaps_to_keypoints_test.cpp")
OPTIMIZATION = "-O1"

pytestmark = pytest.mark.slow

# Calls of random shape for each of 7 pairs of types.
CALLS = {"AVX-512": 60, "AVX2": 60, "no vector instructions": 20}


@pytest.mark.parametrize("name", CAPABILITIES)
def test_under_sanitizers(program, name):
    figures = run_sanitized(program(name), str(CALLS[name]))
    assert figures["lanes"] == CAPABILITIES[name].lanes
    assert figures["calls"] == 7 * CALLS[name]
    assert figures["runs"] == 3 * figures["calls"]  # on 1, 2 and 3 threads
    assert figures["rejected"] >= 7 * 12
    assert 0 < figures["error"] <= 1  # as a part of what is allowed
