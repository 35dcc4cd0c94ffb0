"""The kernels' headers compile with clang, without warnings."""

from __future__ import annotations

import pathlib

import pytest
from inductor_vision.tests.support.cpp import CAPABILITIES, compile_only

SOURCES = sorted(pathlib.Path(__file__).parent.glob("*_test.cpp"))

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
@pytest.mark.parametrize("name", CAPABILITIES)
def test_compiles_with_clang(source, name):
    CAPABILITIES[name].skip_unless_it_runs_here()
    compile_only("clang++", source, CAPABILITIES[name])
