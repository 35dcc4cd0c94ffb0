"""What is worked around while a package is compiled. See ``__init__.py``."""

from __future__ import annotations

from torch._inductor import sizevars
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

__all__ = ["CppWrapperCpu", "sizevars"]
