"""soft_nms.h by itself, under sanitizers: values, bounds, and results that depend on nothing but the input."""

from __future__ import annotations

import pathlib

import pytest
from inductor_vision.tests.support.cpp import CAPABILITIES, run_sanitized

SOURCE = pathlib.Path(__file__).with_name("soft_nms_test.cpp")
OPTIMIZATION = "-O1"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", CAPABILITIES)
def test_under_sanitizers(program, name):
    figures = run_sanitized(program(name), "1")
    assert figures["lanes"] == CAPABILITIES[name].lanes
    assert figures["calls"] > 15 * 13 * 6  # 15 kinds of boxes, in 13 sizes and 6 pairs of types
    assert figures["runs"] == 3 * figures["calls"]  # on 1, 2 and 3 threads
    assert min(figures["taken"], figures["lowered"], figures["dropped"]) > 10_000
