"""The kernels compile for GPUs, down to their machine code, where there is none: types, layouts and sizes of blocks are
right for them too."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from inductor_vision.tests.lowering.triton.test_compiled import CALLS
from inductor_vision.tests.support import depthwise_separable_conv2d
from inductor_vision.tests.support.triton import active, interpreted_sources, run_program, triton_or_skip
from torch.utils._pytree import tree_map

# An A100 and an MI300, and the memory that the threads of one of their multiprocessors share.
TARGETS = {"nvidia": (("cuda", 80, 32), 160 * 1024), "amd": (("hip", "gfx942", 64), 64 * 1024)}
WITH_KERNELS = [op for op, (_, kernel) in CALLS.items() if kernel is not None]


def in_dtype(value: object, dtype: torch.dtype) -> object:
    """What is float32 in another dtype."""
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


@pytest.mark.parametrize("vendor", ["nvidia", pytest.param("amd", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", WITH_KERNELS)
def test_kernels_compile(op: str, vendor: str):
    triton_or_skip()
    from inductor_vision.lowering.triton import kernels
    from triton import compile
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if vendor not in backends:
        pytest.skip(f"this Triton has no backend for {vendor}")
    target, shared_memory = TARGETS[vendor]
    arguments = CALLS[op][0]()
    low, double = (
        tree_map(lambda value, dtype=dtype: in_dtype(value, dtype), arguments)
        for dtype in (torch.bfloat16, torch.float64)
    )
    as_for_a_gpu = patch.object(kernels, "on_gpu", lambda tensor: True)
    with as_for_a_gpu, active("interpreter"), interpreted_sources() as sources:
        for values in (arguments, double, *([low] if "conv2d" in op else [])):
            run_program(op, values, torch.device("cpu"))
    assert sources
    for source in sources:
        again = ASTSource(source.fn, source.signature, source.constants, source.attrs)
        kernel = compile(again, target=GPUTarget(*target), options={"num_warps": 4})
        assert kernel.metadata.shared <= shared_memory


@pytest.mark.parametrize(
    "activation", ["leaky_relu(0.3)", "hardtanh(-0.3, 2)", "elu(0.3)", "celu(0.3)", "softplus(0.3, 1)"]
)
def test_parameters_of_activations_are_not_rounded(activation: str):
    """The interpreter has Python's numbers in any case; compiled, many a step makes float32 of them."""
    triton_or_skip()
    from triton import compile
    from triton.backends.compiler import GPUTarget

    sample = depthwise_separable_conv2d.sample(depthwise_separable_conv2d.Case(first=activation), torch.float64)
    with active("interpreter"):
        with interpreted_sources() as sources:
            run_program("depthwise_separable_conv2d", sample.positional, torch.device("cpu"))
        (source,) = sources
        code = compile(source, target=GPUTarget("cpu", 0, 0)).kernel.decode()
    assert "3.000000e-01> : tensor" in code and "0.3000000119" not in code
