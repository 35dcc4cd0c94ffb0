"""AOTInductor packages that check what they are given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

_ASKED_FOR = "env_var_value != nullptr && env_var_value[0] != '0'"
_NOT_DECLINED = "env_var_value == nullptr || env_var_value[0] != '0'"


@contextlib.contextmanager
def inputs_checked() -> Iterator[None]:
    """Within this context what is packaged checks the shape, strides and dtype of its inputs.

    Inductor generates such checks, but they are made only where the environment has ``AOTI_RUNTIME_CHECK_INPUTS=1``;
    elsewhere other inputs are read as if they were as expected. Here they are made unless it is 0.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    original = CppWrapperCpu.generate_input_output_runtime_checks

    def generate(wrapper: Any) -> None:
        original(wrapper)
        lines = wrapper.prefix._lines
        (at,) = (i for i, line in enumerate(lines) if _ASKED_FOR in str(line))
        lines[at] = lines[at].replace(_ASKED_FOR, _NOT_DECLINED)

    with patch.object(CppWrapperCpu, "generate_input_output_runtime_checks", generate):
        yield
