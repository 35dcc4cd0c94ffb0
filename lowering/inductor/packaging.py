"""What is worked around while a package is compiled. See ``__init__.py``."""

from __future__ import annotations

from torch._inductor import cpu_vec_isa, freezing
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.cpu_vec_isa import VecAVX2, VecAVX512
from torch._inductor.fx_passes import mkldnn_fusion

__all__ = ["CppWrapperCpu", "VecAVX2", "VecAVX512", "cpu_vec_isa", "freezing", "mkldnn_fusion"]
