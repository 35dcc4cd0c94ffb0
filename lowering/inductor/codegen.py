"""What templates, Triton programs and tuning use of Inductor's code generation. See ``__init__.py``."""

from __future__ import annotations

from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
from torch._inductor import config, ir
from torch._inductor.codecache import CppCodeCache
from torch._inductor.codegen.cpp import CppScheduling, get_export_declaration
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel, parse_expr_with_index_symbols
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.constant_folding import constant_fold
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.cpu_vec_isa import VecISA, pick_vec_isa, valid_vec_isa_list
from torch._inductor.lowering import lowerings
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.utils import Placeholder
from torch._inductor.virtualized import V, ops
from torch.fx.experimental.symbolic_shapes import optimization_hint, statically_known_true

__all__ = [
    "DTYPE_TO_CPP",
    "CppCodeCache",
    "CppScheduling",
    "CppTemplateKernel",
    "Placeholder",
    "V",
    "VecISA",
    "cache_dir",
    "compile_fx_inner",
    "config",
    "constant_fold",
    "get_cpp_compiler",
    "get_export_declaration",
    "ir",
    "kernel_side_table",
    "lowerings",
    "ops",
    "optimization_hint",
    "parse_expr_with_index_symbols",
    "pick_vec_isa",
    "statically_known_true",
    "triton_kernel_wrapper_functional",
    "valid_vec_isa_list",
]
