"""That packages look at the processor depends on how Inductor writes them; that they do is tested in
tests/test_target.py."""

from __future__ import annotations

import pathlib

import pytest
from inductor_vision.lowering.workarounds.unchecked_processors import processor_checked
from inductor_vision.tests.support.oldest_torch import with_oldest_torch
from torch._inductor.codegen import cpp_wrapper_cpu
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu


def test_no_such_method(monkeypatch):
    monkeypatch.delattr(CppWrapperCpu, "_write_aoti_interface_header")
    with (
        pytest.raises(RuntimeError, match=r"has no _write_aoti_interface_header \(this is torch .*tested with"),
        processor_checked(),
    ):
        raise AssertionError("entered")


@with_oldest_torch
def test_torch_still_needs_this():
    """Where this fails, packages look at the processor: the module can go."""
    text = (pathlib.Path(cpp_wrapper_cpu.__file__).parent / "aoti_runtime" / "interface.cpp").read_text()
    create = text[text.index("\nAOTIRuntimeError AOTInductorModelContainerCreateWithDevice(") :]
    assert "AOTInductorModelContainer(" in create and "cpu" not in create[: create.index("\n}\n")]
