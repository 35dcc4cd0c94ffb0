"""The kernels' headers compile with clang, without warnings."""

from __future__ import annotations

import pathlib

import pytest
from inductor_vision.tests.support.cpp import CAPABILITIES, compile_only

FOLDER = pathlib.Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*_test.cpp"))
# What a precompiled header includes may be a copy that is newer than it, as in an environment that was made again.
BY_CONTENT = "-fpch-validate-input-files-content"
# As far as clang itself goes, without LLVM: functions that want other vector instructions are errors only there.
GENERATE = "-c", "-Xclang", "-emit-llvm-only"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
@pytest.mark.parametrize("name", CAPABILITIES)
def test_compiles_with_clang(kept, source, name):
    CAPABILITIES[name].skip_unless_it_runs_here()
    header = compile_only(kept, "clang++", FOLDER / "torch_headers.h", CAPABILITIES[name], "-xc++-header", BY_CONTENT)
    compile_only(kept, "clang++", source, CAPABILITIES[name], *GENERATE, "-include-pch", str(header), BY_CONTENT)
