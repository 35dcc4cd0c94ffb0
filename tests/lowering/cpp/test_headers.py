"""The kernels' headers can meet in one C++ file, as they do where Inductor puts a whole model into one."""

from __future__ import annotations

import re
import subprocess

import pytest
from inductor_vision.lowering.common.template import splice_header
from inductor_vision.tests.support.cpp import CAPABILITIES, HEADERS, build, compile_only

NAMES = sorted(path.name for path in HEADERS.glob("*.h"))


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize(
    ("order", "compiler"), [("forward", "g++"), pytest.param("reverse", "clang++", marks=pytest.mark.slow)]
)
def test_no_two_collide(kept, tmp_path, order, compiler, name):
    """Each as it stands in a kernel's source: below Inductor's own header, with all that it includes."""
    CAPABILITIES[name].skip_unless_it_runs_here()
    source = tmp_path / f"headers_{order}.cpp"
    names = NAMES if order == "forward" else NAMES[::-1]
    source.write_text("\n".join(["#include <torch/csrc/inductor/cpp_prefix.h>", *map(splice_header, names)]))
    compile_only(kept, compiler, source, CAPABILITIES[name], "-fsyntax-only")


EXPORTED = """
template class inductor_vision::DeformTile<inductor_vision::DeformKernel::gemm, float, float>;
extern "C" void exported() {}
"""


def test_libraries_share_nothing(kept, tmp_path):
    """Of what two libraries in a process both export, the dynamic linker may let the second have the first one's, which
    was compiled for other vector instructions, or is of another release."""
    source = tmp_path / "exporting.cpp"
    source.write_text("\n".join([*map(splice_header, NAMES), EXPORTED]))
    library = build(kept, source, CAPABILITIES["no vector instructions"], "-O0", "-shared", "-fPIC")
    symbols = subprocess.run(["nm", "-DC", "--defined-only", library], check=True, capture_output=True, text=True)
    assert "exported" in symbols.stdout
    assert "inductor_vision::" not in symbols.stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_namespace_is_hidden(name):
    """Which holds for what is between its braces alone, not for where another header opens it."""
    opened = re.findall(r"^namespace\b(.*)\binductor_vision\b", (HEADERS / name).read_text(), flags=re.MULTILINE)
    assert set(opened) == {' [[gnu::visibility("hidden")]] '}


def test_macros_have_names_that_nobody_else_gives():
    """A macro changes all that follows it in the file, Inductor's code too."""
    texts = [(HEADERS / name).read_text() for name in NAMES]
    defined = [macro for text in texts for macro in re.findall(r"^ *# *define +(\w+)", text, flags=re.MULTILINE)]
    assert len(defined) >= len(NAMES)  # each has a guard
    assert [macro for macro in defined if not macro.startswith("INDUCTOR_VISION_")] == []
