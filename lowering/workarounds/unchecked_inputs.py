"""AOTInductor packages read what they are given as if it were as expected.

The fault, seen in torch 2.13 to 2.15: Inductor generates checks of the shape, strides and dtype of inputs, but they are
made only where the environment has ``AOTI_RUNTIME_CHECK_INPUTS=1``; elsewhere other inputs are read beyond their end.

The way around: the generated condition is exchanged, so that they are made unless the variable is 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from ...version import tested_torch

_ASKED_FOR = "env_var_value != nullptr && env_var_value[0] != '0'"
_NOT_DECLINED = "env_var_value == nullptr || env_var_value[0] != '0'"


@contextlib.contextmanager
def inputs_checked() -> Iterator[None]:
    """Within this context what is packaged checks the shape, strides and dtype of its inputs.

    Raises:
        RuntimeError: Inductor generates them otherwise than the releases of torch that this is tested with.
    """
    from ..inductor.packaging import CppWrapperCpu

    original = getattr(CppWrapperCpu, "generate_input_output_runtime_checks", None)
    if original is None:
        raise _not_as_tested("CppWrapperCpu has no generate_input_output_runtime_checks")

    def generate(wrapper: Any) -> None:
        original(wrapper)
        # Where Inductor generates Triton code too, it may write two programs at once, and a package is the second.
        lines = getattr(wrapper.prefix, "aot", wrapper.prefix)._lines
        asking = [i for i, line in enumerate(lines) if _ASKED_FOR in str(line)]
        if len(asking) != 1:
            raise _not_as_tested(f"{_ASKED_FOR!r} is in {len(asking)} lines of the generated code, not in one")
        lines[asking[0]] = lines[asking[0]].replace(_ASKED_FOR, _NOT_DECLINED)

    with patch.object(CppWrapperCpu, "generate_input_output_runtime_checks", generate):
        yield


def _not_as_tested(what: str) -> RuntimeError:
    return RuntimeError(
        f"a package that checks its inputs cannot be made: {what} (this is torch {torch.__version__}; {tested_torch()})"
    )
