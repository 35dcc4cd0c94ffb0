"""That packages check their inputs depends on text that Inductor generates: other text is an error that says so.

What packages do with inputs is in tests/test_export.py and tests/test_detectors.py.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from inductor_vision.lowering.workarounds.unchecked_inputs import _ASKED_FOR, _NOT_DECLINED, inputs_checked
from inductor_vision.tests.support.oldest_torch import with_oldest_torch
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.utils import IndentedBuffer


class Wrapper:
    """What Inductor writes a program with, as far as it matters here."""

    def __init__(self, two_programs: bool) -> None:
        self.prefix = IndentedBuffer()
        self.aot = self.prefix
        if two_programs:
            self.aot = self.prefix.aot = IndentedBuffer()  # type: ignore[attr-defined]


@pytest.mark.parametrize("two_programs", [False, True])
def test_checks_are_made_in_the_package(two_programs, monkeypatch):
    def generate(wrapper):
        wrapper.aot.splice(f"if (x)\n    return {_ASKED_FOR};")

    monkeypatch.setattr(CppWrapperCpu, "generate_input_output_runtime_checks", generate)
    wrapper = Wrapper(two_programs)
    with inputs_checked():
        CppWrapperCpu.generate_input_output_runtime_checks(wrapper)
    assert wrapper.aot.getvalue().split("\n")[1] == f"    return {_NOT_DECLINED};"
    assert CppWrapperCpu.generate_input_output_runtime_checks is generate


@pytest.mark.parametrize("lines", [0, 2])
def test_other_text(lines, monkeypatch):
    def generate(wrapper):
        for _ in range(lines):
            wrapper.aot.writeline(_ASKED_FOR)

    monkeypatch.setattr(CppWrapperCpu, "generate_input_output_runtime_checks", generate)
    message = (
        rf"in {lines} lines of the generated code, not in one \(this is torch {torch.__version__[:4]}.*is tested with"
    )
    with inputs_checked(), pytest.raises(RuntimeError, match=message):
        CppWrapperCpu.generate_input_output_runtime_checks(Wrapper(False))


def test_no_such_method(monkeypatch):
    monkeypatch.delattr(CppWrapperCpu, "generate_input_output_runtime_checks")
    with (
        pytest.raises(RuntimeError, match=r"has no generate_input_output_runtime_checks .*tested with"),
        inputs_checked(),
    ):
        raise AssertionError("entered")


@with_oldest_torch
def test_torch_still_needs_this():
    """Where this fails, packages no longer wait to be asked for checks, or ask in other words; in the first case the
    module can go."""
    generator = inspect.getsource(CppWrapperCpu.generate_input_output_runtime_checks)
    assert 'getenv("AOTI_RUNTIME_CHECK_INPUTS")' in generator and _ASKED_FOR in generator
