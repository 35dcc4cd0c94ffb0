"""The programs of convolutions and of their gradients, with Triton kernels, compute what their decompositions do."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from inductor_vision.lowering.common.registry import _triton_program
from inductor_vision.ops.registry import OPS
from inductor_vision.tests.support import deform_conv2d, depthwise_separable_conv2d, patch_conv2d
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.convolution import gradient_like
from inductor_vision.tests.support.triton import run_program, triton_or_skip

CASES = {
    deform_conv2d: [
        *("mask_bias", "neither", "stride_padding_dilation", "kernel_1x4", "channels_37", "out_channels_130"),
        *("groups_across_offset_groups", "offset_groups_inside_groups", "depthwise", "depthwise_offset_groups"),
        *("multiplier_offset_groups", "depthwise_multiplier", "empty_batch", "borders", "borders_depthwise"),
        *("input_channels_last", "input_expanded", "offset_transposed", *deform_conv2d.HOSTILE),
    ],
    patch_conv2d: [
        *("plain", "no_bias", "stride_padding_dilation", "kernel_1x4", "kernel_beyond_the_patch", "channels_37_to_19"),
        *("groups_3_of_17", "no_patches", "patch_17x13", "channels_first_strided", "channels_last_strided"),
        *("padding_beyond_the_kernel_strided", "weight_permuted"),
    ],
    depthwise_separable_conv2d: [
        *("plain", "no_biases", "stride_3x4", "stride_padding_dilation", "kernel_2x3", "channels_37_to_19"),
        *("multiplier_3_of_5", "channels_4_to_130", "empty_batch", "multiplier_channels_last", "weights_permuted"),
        *(f"then_{name}" for name in depthwise_separable_conv2d.ACTIVATIONS if name),
    ],
}
ALL = [(family, case) for family, cases in CASES.items() for case in cases]
DTYPES = [torch.float64, torch.bfloat16, torch.float16]


def name_of(family: ModuleType) -> str:
    return family.__name__.rpartition(".")[2]


def ids(value: Any) -> str:
    return name_of(value) if isinstance(value, ModuleType) else str(value)


def check(family: ModuleType, case: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Against the decomposition in float64, from the same numbers."""
    op, s = name_of(family), family.sample(case, dtype)
    exactly = [arg.double() if isinstance(arg, torch.Tensor) else arg for arg in s.positional]
    expected = OPS[op].decomposition(*exactly)
    actual = run_program(op, s.positional, device)
    assert actual.dtype == dtype
    assert_close(actual, expected, dtype)
    assert actual.stride() == OPS[op].decomposition(*s.positional).stride() or actual.numel() == 0

    grad = gradient_like(actual)
    wanted = [True] * len(family.TENSORS)
    expected = OPS[f"{op}_backward"].decomposition(grad.double(), *exactly, wanted)
    actual = run_program(f"{op}_backward", (grad, *s.positional, wanted), device)
    for tensor, result, right in zip(family.TENSORS, actual, expected):
        assert result.dtype == dtype
        assert_close(result, right, dtype, f"gradient of {tensor}")


@pytest.mark.parametrize(("family", "case"), ALL, ids=ids)
def test_values(family: ModuleType, case: str, device: torch.device):
    """The interpreter refuses to read or write outside of tensors."""
    check(family, case, torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", CASES, ids=ids)
def test_dtypes(family: ModuleType, dtype: torch.dtype, device: torch.device):
    check(family, next(iter(CASES[family])), dtype, device)


@pytest.mark.parametrize("family", CASES, ids=ids)
def test_what_is_not_wanted_is_left_out(family: ModuleType, device: torch.device):
    op, s = name_of(family), family.sample(next(iter(CASES[family])))
    grad = gradient_like(OPS[op].decomposition(*s.positional))
    count = len(family.TENSORS)
    expected = run_program(f"{op}_backward", (grad, *s.positional, [True] * count), device)
    for i in range(count):
        wanted = [i == other for other in range(count)]
        results = run_program(f"{op}_backward", (grad, *s.positional, wanted), device)
        for other, result in enumerate(results):
            if other == i:
                assert_close(result, expected[i], torch.float32)
            else:
                assert result.numel() == 0


def refusal_of(op: str, *arguments: Any) -> str | None:
    program = _triton_program(OPS[op])
    assert program is not None
    return program.refusal(*arguments)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tf32_is_asked_for_by_either_interface(device: str):
    triton_or_skip()
    from inductor_vision.lowering.triton.kernels import dot_precision

    matmul, tensor = torch.backends.cuda.matmul, SimpleNamespace(device=torch.device(device))
    expected = "tf32" if device == "cuda" else "ieee"
    for name, value in (("allow_tf32", True), ("fp32_precision", "tf32")):
        before = getattr(matmul, name)
        assert dot_precision(tensor) == "ieee"
        setattr(matmul, name, value)
        assert dot_precision(tensor) == expected
        setattr(matmul, name, before)


def test_a_large_depthwise_kernel_is_not_unrolled():
    triton_or_skip()
    arguments = list(depthwise_separable_conv2d.sample("plain").positional)
    arguments[1] = torch.randn(*arguments[1].shape[:2], 9, 9)
    why = refusal_of("depthwise_separable_conv2d_backward", arguments[0], *arguments, [True] * 6)
    assert why == "81 taps are too many to add one by one"


def test_depthwise_patches_are_left_to_aten():
    triton_or_skip()
    why = refusal_of("patch_conv2d", *patch_conv2d.sample("depthwise").positional)
    assert why == "the products of a depthwise convolution would be mostly padding"
