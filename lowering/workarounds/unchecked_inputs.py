"""AOTInductor packages read what they are given as if it were as expected.

The fault, seen in torch 2.13 to 2.15: Inductor generates checks of the shape, strides and dtype of inputs, but they are
made only where the environment has ``AOTI_RUNTIME_CHECK_INPUTS=1``; elsewhere other inputs are read beyond their end.

The way around: the generated condition is exchanged, so that they are made unless the variable is 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from .package_wrappers import method_exchanged, not_as_tested

_PACKAGE = "a package that checks its inputs"
_ASKED_FOR = "env_var_value != nullptr && env_var_value[0] != '0'"
_NOT_DECLINED = "env_var_value == nullptr || env_var_value[0] != '0'"


def inputs_checked() -> contextlib.AbstractContextManager[None]:
    """Within this context what is packaged checks the shape, strides and dtype of its inputs.

    Raises:
        RuntimeError: Inductor generates them otherwise than the releases of torch that this is tested with.
    """
    return method_exchanged("generate_input_output_runtime_checks", _unless_declined, _PACKAGE)


def _unless_declined(original: Callable[..., None]) -> Callable[..., None]:
    def generate(wrapper: Any) -> None:
        original(wrapper)
        # Where Inductor generates Triton code too, it may write two programs at once, and a package is the second.
        lines = getattr(wrapper.prefix, "aot", wrapper.prefix)._lines
        asking = [i for i, line in enumerate(lines) if _ASKED_FOR in str(line)]
        if len(asking) != 1:
            found = f"{_ASKED_FOR!r} is in {len(asking)} lines of the generated code, not in one"
            raise not_as_tested(_PACKAGE, found)
        lines[asking[0]] = lines[asking[0]].replace(_ASKED_FOR, _NOT_DECLINED)

    return generate
