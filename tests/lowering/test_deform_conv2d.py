"""What deform_conv2d compiles to: which kernel takes a call, what it computes, and what is fused into it."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from inductor_vision import DeformConv2d, deform_conv2d
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Compiled, caches_disabled, compile_and_run, run_python
from inductor_vision.tests.support.deform_conv2d import CASES, HOSTILE, Case, Sample, oracle, sample
from torch import Tensor, nn
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.utils import run_and_get_code

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Case -> the kernel that takes it.
FEW = {
    "mask_bias": "GEMM",
    "channels_37": "GEMM",
    "channels_64": "GEMM",
    "groups_8": "GEMM",
    "groups_across_offset_groups": "GEMM",
    "input_channels_last": "GEMM",
    "hostile": "GEMM",
    "depthwise_37": "depthwise",
    "shared": "shared",
}
MANY = {
    **FEW,
    "neither": "GEMM",
    "numbers": "GEMM",
    "stride_padding_dilation": "GEMM",
    "kernel_1x1": "GEMM",
    "kernel_5x5": "GEMM",
    "channels_520": "GEMM",
    "depthwise_multiplier": "GEMM",
    "input_stepped": "GEMM",
    "input_sliced": "GEMM",
    "input_transposed": "GEMM",
    "offset_channels_last": "GEMM",
    "offset_stepped": "GEMM",
    "empty_batch": "GEMM",
    "one_output_pixel": "GEMM",
    "borders": "GEMM",
    "weight_permuted": "GEMM",
    "hostile_offset_groups": "GEMM",
    "depthwise_channels_last": "depthwise",
    "depthwise_offset_groups": "depthwise",
    "empty_batch_depthwise": "depthwise",
    "borders_depthwise": "depthwise",
    "hostile_depthwise": "depthwise",
    "shared_channels_last": "shared",
    "hostile_shared": "shared",
}
QUICK = {FP32: MANY, FP64: FEW, BF16: FEW, FP16: FEW}


def kernel_of(case: Case) -> str:
    if case.channels == case.out_channels == case.groups:
        return "shared" if case.weight_layout == "shared" else "depthwise"
    return "GEMM"


REST = {name: kernel_of(case) for name, case in {**CASES, **HOSTILE}.items() if name not in MANY}


def expected_path(case: Case, dtype: torch.dtype, kernel: str) -> str:
    """The part of the path's detail that the case decides."""
    dots = dtype == BF16 and kernel == "GEMM" and case.channels // case.groups % 2 == 0
    dots = dots and torch.cpu._is_avx512_bf16_supported() and pick_vec_isa().bit_width() == 512
    return f"{kernel} kernel, {'bf16 dot products' if dots else 'fused'}, "


def call_all(calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Tensor]:
    return [deform_conv2d(*args, **kwargs) for args, kwargs in calls]


def compute(samples: Sequence[Sample], **config: Any) -> Compiled:
    """All samples in one graph and one source file, which takes little longer to compile than one of them."""
    with torch.no_grad():
        return compile_and_run(call_all, [(s.args, s.kwargs) for s in samples], config={"cpp_wrapper": True, **config})


def reference(sample: Sample) -> Tensor:
    return oracle(*sample.args, **sample.kwargs)


def assert_takes_template(compiled: Compiled, samples: Sequence[Sample]) -> None:
    """Each sample by a template, and by the one that is meant for it."""
    assert compiled.templates == len(samples)
    assert compiled.kinds == ["template"] * len(samples)
    for path, s in zip(compiled.paths, samples):
        assert path.op == "deform_conv2d"
        assert path.detail.startswith(expected_path(s.case, s.args[0].dtype, kernel_of(s.case))), s.name


def assert_right(compiled: Compiled, samples: Sequence[Sample]) -> None:
    for result, s in zip(compiled.result, samples):
        assert result.dtype == s.args[0].dtype
        assert_close(result, reference(s), result.dtype, s.name)
        assert result.stride() == deform_conv2d(*s.args, **s.kwargs).stride(), s.name


@pytest.fixture(scope="module")
def quick() -> tuple[Compiled, list[tuple[str, torch.dtype]]]:
    keys = [(name, dtype) for dtype, names in QUICK.items() for name in names]
    return compute([sample(name, dtype) for name, dtype in keys]), keys


def test_every_call_is_a_template(quick):
    compiled, keys = quick
    assert compiled.templates == len(compiled.paths) == len(compiled.result) == len(keys)


@pytest.mark.parametrize("name,dtype", [(name, dtype) for dtype, names in QUICK.items() for name in names])
def test_values(quick, name, dtype):
    compiled, keys = quick
    index, s = keys.index((name, dtype)), sample(name, dtype)
    path, result = compiled.paths[index], compiled.result[index]
    assert (path.op, path.kind) == ("deform_conv2d", "template")
    assert path.detail.startswith(expected_path(s.case, dtype, MANY[name]))
    assert result.dtype == dtype
    assert_close(result, reference(s), dtype)
    assert result.stride() == deform_conv2d(*s.args, **s.kwargs).stride()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_values_of_all_other_cases(dtype):
    samples = [sample(name, dtype) for name in REST]
    compiled = compute(samples)
    assert_takes_template(compiled, samples)
    assert_right(compiled, samples)


VECTORS = ["mask_bias", "channels_37", "groups_8", "input_channels_last", "depthwise_37", "shared", "hostile"]


@pytest.mark.parametrize("simdlen,bits", [(256, 256), (1, 0)])
def test_narrow_or_no_vectors(simdlen, bits):
    from torch._inductor import config

    with config.patch({"cpp.simdlen": simdlen}):
        isa = pick_vec_isa()
        assert (isa.bit_width() if isa else 0) == bits
        samples = [sample(name, dtype) for dtype in (FP32, BF16) for name in VECTORS]
        samples += [sample(name, dtype) for dtype in (FP64, FP16) for name in ("mask_bias", "depthwise_37")]
        compiled = compute(samples)
    assert compiled.templates == len(samples)
    assert all("kernel, fused" in path.detail for path in compiled.paths)  # no dot products of 512 bits
    assert_right(compiled, samples)
