"""What patch_conv2d and its gradients compile to: which kernel takes a call, what it computes, what is fused into it."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from inductor_vision import PatchConv2d, explain, patch_conv2d
from inductor_vision.lowering import patch_conv2d as lowering
from inductor_vision.ops.registry import OPS
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close, relative_error
from inductor_vision.tests.support.compiled import (
    Compiled,
    compile_and_run,
    constants_of_package,
    run_python,
)
from inductor_vision.tests.support.layouts import strides_of
from inductor_vision.tests.support.patch_conv2d import (
    CASES,
    TENSORS,
    Case,
    Sample,
    gradient_like,
    gradient_oracle,
    oracle,
    sample,
)
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch.export import Dim

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BACKWARD = OPS["patch_conv2d_backward"]
ORDERS = ("patches_first", "channels_first", "channels_last")

# One call: the sample, and which gradients are wanted: None: it is the forward pass.
Call = tuple[Sample, tuple[str, ...] | None]

# The narrow types in one memory order: each of both costs the compiler dearly.
QUICK_FORWARD = {
    FP32: [
        "plain", "numbers", "padding_beyond_the_kernel", "dilation_beyond_the_patch", "kernel_1x1", "channels_3_to_17",
        "channels_64_to_40", "groups_3_of_17", "no_patches", "patches_13", "batch_3_of_7", "input_channels_first",
        "input_channels_last", "input_stepped", "unbatched_channels_first", "weight_permuted",
    ],
    BF16: ["channels_last_strided"],
}  # fmt: skip
QUICK_BACKWARD = {
    FP32: ["plain", "numbers", "padding_beyond_the_kernel", "groups_3_of_17", "no_patches", "patches_13"],
    BF16: ["channels_last_strided"],
}


def in_dtypes(names: dict[torch.dtype, list[str]]) -> list[Sample]:
    return [sample(name, dtype) for dtype in names for name in names[dtype]]


QUICK: list[Call] = [
    *((s, None) for s in in_dtypes(QUICK_FORWARD)),
    *((s, tuple(s.tensors)) for s in in_dtypes(QUICK_BACKWARD)),
]


def identifier(call: Call) -> str:
    s, wanted = call
    return f"{s.name}-{str(s.args[0].dtype)[6:]}{'' if wanted is None else '-backward'}"


def wanted_of(call: Call) -> list[bool]:
    return [name in (call[1] or ()) for name in TENSORS]


def gradient_of(s: Sample) -> Tensor:
    return gradient_like(torch.empty(s.case.out_shape, dtype=s.args[0].dtype))


def arguments_of(call: Call) -> tuple[Any, ...]:
    """Of :func:`run_all`."""
    s, wanted = call
    if wanted is None:
        return None, s.args, s.kwargs
    return (gradient_of(s), *s.positional, wanted_of(call)), None, None


def run_all(calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [
        BACKWARD(*backward) if backward is not None else patch_conv2d(*args, **kwargs)
        for backward, args, kwargs in calls
    ]


def compute(calls: Sequence[Call], **options: Any) -> Compiled:
    """All calls in one graph and one source file, which takes little longer to compile than one of them."""
    with torch.no_grad():
        return compile_and_run(run_all, list(map(arguments_of, calls)), config={"cpp_wrapper": True, **options})


def kernels_of(call: Call) -> list[tuple[str, str]]:
    """The operator and what is said of each kernel that a call compiles to."""
    s, wanted = call
    layout = s.case.layout.removeprefix("sliced_")
    order = {"expanded": "channels_first", "patches_last": "channels_first"}.get(layout, layout)
    if order not in ORDERS or (s.case.channels == 1 and order == "channels_last"):
        order = "patches_first"
    if wanted is None:
        return [("patch_conv2d", f"{order}, fused")]
    sums = [name for name in ("weight", "bias") if name in wanted]
    kernels = [("patch_conv2d_backward", f"gradient of the input, {order}, fused")] if "input" in wanted else []
    return kernels + ([("patch_conv2d_backward", f"gradients of {', '.join(sums)}")] if sums else [])


def assert_takes_templates(compiled: Compiled, calls: Sequence[Call]) -> None:
    """Each call, and by those that are meant for it."""
    expected = [kernel for call in calls for kernel in kernels_of(call)]
    assert sorted((path.op, path.detail) for path in compiled.paths) == sorted(expected)
    assert compiled.kinds == ["template"] * len(expected)
    assert compiled.templates == len(expected)


def assert_right(call: Call, result: Any) -> None:
    """What the plain loop gives, laid out as eagerly; a gradient that is not wanted is empty."""
    s, wanted = call
    dtype = s.args[0].dtype
    if wanted is None:
        eager = patch_conv2d(*s.args, **s.kwargs)
        assert result.dtype == dtype
        assert strides_of(result) == strides_of(eager), s.name
        assert_close(result, oracle(s), dtype, s.name)
        return
    expected = gradient_oracle(s, gradient_of(s))
    for name, values, eager in zip(TENSORS, result, BACKWARD(gradient_of(s), *s.positional, wanted_of(call))):
        assert values.dtype == dtype
        assert values.shape == eager.shape and strides_of(values) == strides_of(eager), f"{s.name}: {name}"
        if name in wanted:
            assert_close(values, expected[name].reshape(values.shape), dtype, f"{s.name}: gradient of {name}")
        else:
            assert values.numel() == 0


@pytest.fixture(scope="module")
def quick() -> Compiled:
    return compute(QUICK)


def test_every_call_is_a_template(quick):
    assert_takes_templates(quick, QUICK)


@pytest.mark.parametrize("i", range(len(QUICK)), ids=map(identifier, QUICK))
def test_values(quick, i):
    assert_right(QUICK[i], quick.result[i])
