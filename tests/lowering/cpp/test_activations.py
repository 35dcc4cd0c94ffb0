"""activations.h by itself, under sanitizers: values and gradients of all of them, at kinks and for NaN too."""

from __future__ import annotations

import pathlib
import re

import pytest
from inductor_vision.ops.depthwise_separable_conv2d import ACTIVATIONS
from inductor_vision.tests.support.cpp import CAPABILITIES, run_sanitized

SOURCE = pathlib.Path(__file__).with_name("activations_test.cpp")
OPTIMIZATION = "-O1"


def test_every_activation_is_checked():
    (checked,) = re.findall(r"check_all<\s*([^>]*)>\(", SOURCE.read_text())
    names = {"".join(word.capitalize() for word in name.split("_")) for name in ACTIVATIONS}
    assert set(re.split(r",\s*", checked)) == names


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPABILITIES)
def test_under_sanitizers(program, name):
    figures = run_sanitized(program(name))
    assert figures["lanes"] == CAPABILITIES[name].lanes
    assert figures["numbers"] > 1400
    assert figures["float_error"] < 2e-6 and figures["double_error"] < 1e-13
