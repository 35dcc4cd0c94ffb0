"""deform_conv2d.h by itself, under sanitizers: values, bounds, and bits that depend on nothing but the input."""

from __future__ import annotations

import pathlib
import platform

import pytest
import torch
from inductor_vision.tests.support.cpp import (
    BF16_DOT_PRODUCTS,
    CAPABILITIES,
    compile_only,
    run_sanitized,
)

SOURCE = pathlib.Path(__file__).with_name("deform_conv2d_test.cpp")
OPTIMIZATION = "-O1"

pytestmark = pytest.mark.slow

# How many calls of random shape, besides those in the source; without vector instructions a call takes long.
RANDOM_CALLS = {"AVX-512": 25, "AVX2": 15, "no vector instructions": 3}


@pytest.mark.parametrize("name", CAPABILITIES)
def test_under_sanitizers(program, name):
    figures = run_sanitized(program(name), str(RANDOM_CALLS[name]))
    assert figures["lanes"] == CAPABILITIES[name].lanes
    assert figures["calls"] >= 12 * RANDOM_CALLS[name]  # each by 3 kernels, in 4 types
    assert figures["runs"] > figures["calls"]
    native = name == "AVX-512" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    assert figures["bf16_dot"] == native


BF16_DOT = """
#include "gemm.h"
static_assert(INDUCTOR_VISION_BF16_DOT, "");
namespace inductor_vision {
template void gemm(
    const Rows<at::BFloat16>&, Panels<at::BFloat16>, int64_t, const Sums<float>&, int64_t);
}
"""


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_bf16_dot_products_compile(kept, tmp_path, compiler):
    """Also where no CPU is there to run them."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"AVX-512 is for x86-64, this machine is {platform.machine()}")
    source = tmp_path / "bf16_dot.cpp"
    source.write_text(BF16_DOT)
    compile_only(kept, compiler, source, BF16_DOT_PRODUCTS, "-c")
