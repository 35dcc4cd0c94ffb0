"""box_iou_rotated.h and nms_rotated.h by themselves, under sanitizers: values, bounds, the same bits on any threads."""

from __future__ import annotations

import pathlib

import pytest
from inductor_vision.tests.support.cpp import CAPABILITIES, run_sanitized

SOURCE = pathlib.Path(__file__).with_name("rotated_test.cpp")
OPTIMIZATION = "-O1"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", CAPABILITIES)
def test_under_sanitizers(program, name):
    figures = run_sanitized(program(name), "1")
    assert figures["lanes"] == CAPABILITIES[name].lanes
    assert figures["calls"] > 15 * 9 * 7  # 15 kinds of boxes, in 9 sizes, of 5 pairs of types, two of them twice
    assert figures["runs"] == 3 * figures["calls"]  # on 1, 2 and 3 threads
    assert figures["error"] < 1e-9
    assert min(figures["overlaps"], figures["kept"], figures["suppressed"]) > 5_000
