"""What deform_conv2d compiles to: which kernel takes a call, what it computes, and what is fused into it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from inductor_vision import DeformConv2d, deform_conv2d
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import (
    Compiled,
    compile_and_run,
)
from inductor_vision.tests.support.deform_conv2d import (
    CASES,
    HOSTILE,
    Case,
    Sample,
    TwoConvolutions,
    oracle,
    sample,
)
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa

pytestmark = pytest.mark.usefixtures("optimized")

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Case -> the kernel that takes it, for each dtype. Few of the narrow types: each costs the compiler dearly.
QUICK = {
    FP32: {
        "mask_bias": "GEMM",
        "neither": "GEMM",
        "numbers": "GEMM",
        "stride_padding_dilation": "GEMM",
        "kernel_1x1": "GEMM",
        "kernel_5x5": "GEMM",
        "channels_37": "GEMM",
        "channels_64": "GEMM",
        "channels_520": "GEMM",
        "groups_8": "GEMM",
        "groups_across_offset_groups": "GEMM",
        "depthwise_multiplier": "GEMM",
        "input_channels_last": "GEMM",
        "input_stepped": "GEMM",
        "input_sliced": "GEMM",
        "offset_channels_last": "GEMM",
        "offset_stepped": "GEMM",
        "empty_batch": "GEMM",
        "one_output_pixel": "GEMM",
        "borders": "GEMM",
        "weight_permuted": "GEMM",
        "hostile": "GEMM",
        "depthwise_37": "depthwise",
        "depthwise_channels_last": "depthwise",
        "hostile_depthwise": "depthwise",
        "shared": "shared",
        "shared_channels_last": "shared",
        "hostile_shared": "shared",
    },
    BF16: {
        "mask_bias": "GEMM",
        "channels_37": "GEMM",
        "channels_64": "GEMM",
        "input_channels_last": "GEMM",
        "hostile": "GEMM",
        "depthwise_37": "depthwise",
    },
}
QUICK_KEYS = [(name, dtype) for dtype, names in QUICK.items() for name in names]


def kernel_of(case: Case) -> str:
    if case.channels == case.out_channels == case.groups:
        return "shared" if case.weight_layout == "shared" else "depthwise"
    return "GEMM"


def expected_path(case: Case, dtype: torch.dtype, kernel: str) -> str:
    """The part of the path's detail that the case decides."""
    dots = dtype == BF16 and kernel == "GEMM" and case.channels // case.groups % 2 == 0
    dots = dots and torch.cpu._is_avx512_bf16_supported() and pick_vec_isa().bit_width() == 512
    return f"{kernel} kernel, {'bf16 dot products' if dots else 'fused'}, "


def call_all(calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Tensor]:
    return [deform_conv2d(*args, **kwargs) for args, kwargs in calls]


def compute(samples: Sequence[Sample], **options: Any) -> Compiled:
    """All samples in one graph and one source file, which takes little longer to compile than one of them."""
    with torch.no_grad():
        return compile_and_run(call_all, [(s.args, s.kwargs) for s in samples], config={"cpp_wrapper": True, **options})


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
def quick() -> Compiled:
    return compute([sample(name, dtype) for name, dtype in QUICK_KEYS])


def test_every_call_is_a_template(quick):
    assert quick.templates == len(quick.paths) == len(quick.result) == len(QUICK_KEYS)


@pytest.mark.parametrize("name,dtype", QUICK_KEYS, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in QUICK_KEYS])
def test_values(quick, name, dtype):
    index, s = QUICK_KEYS.index((name, dtype)), sample(name, dtype)
    path, result = quick.paths[index], quick.result[index]
    assert (path.op, path.kind) == ("deform_conv2d", "template")
    assert path.detail.startswith(expected_path(s.case, dtype, QUICK[dtype][name]))
    assert result.dtype == dtype
    assert_close(result, reference(s), dtype)
    assert result.stride() == deform_conv2d(*s.args, **s.kwargs).stride()


FEW = ("mask_bias", "channels_37", "groups_8", "input_channels_last", "hostile", "depthwise_37", "shared")


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
def test_values_of_all_other_cases_and_dtypes():
    names = {FP32: [*CASES, *HOSTILE], BF16: [name for name in CASES if "groups" in name or "shared" in name]}
    keys = [(name, dtype) for dtype in names for name in names[dtype] if (name, dtype) not in QUICK_KEYS]
    samples = [sample(name, dtype) for name, dtype in keys]
    samples += [sample(name, dtype) for name in FEW for dtype in (FP64, FP16)]
    compiled = compute(samples)
    assert_takes_template(compiled, samples)
    assert_right(compiled, samples)


@contextlib.contextmanager
def vectors(simdlen: int, bits: int) -> Iterator[None]:
    with config.patch({"cpp.simdlen": simdlen}):
        isa = pick_vec_isa()
        assert (isa.bit_width() if isa else 0) == bits
        yield


def assert_right_without_dot_products(samples: Sequence[Sample]) -> None:
    compiled = compute(samples)
    assert compiled.templates == len(samples)
    assert all("kernel, fused" in path.detail for path in compiled.paths)
    assert_right(compiled, samples)


@pytest.mark.slow
def test_avx2():
    names = ["mask_bias", "channels_37", "groups_8", "input_channels_last", "depthwise_37", "shared"]
    with vectors(256, bits=256):
        assert_right_without_dot_products([*(sample(name) for name in names), sample("channels_64", BF16)])


def test_no_vectors():
    with vectors(1, bits=0):
        names = ["mask_bias", "channels_37", "input_channels_last", "depthwise_37"]
        assert_right_without_dot_products([*(sample(name) for name in names), sample("channels_64", BF16)])


@pytest.mark.slow
@pytest.mark.parametrize("simdlen,bits", [(256, 256), (1, 0)])
def test_narrow_or_no_vectors_of_other_dtypes(simdlen, bits):
    with vectors(simdlen, bits):
        names = ["mask_bias", "channels_37", "depthwise_37"]
        assert_right_without_dot_products([sample(name, dtype) for dtype in (FP64, BF16, FP16) for name in names])


def tensors_of(s: Sample) -> tuple[Tensor, Tensor, Tensor]:
    return s.args[0], s.args[1], s.kwargs["mask"]


def test_one_compilation_serves_all_sizes():
    network = TwoConvolutions()
    with torch.no_grad():
        compiled = compile_and_run(network, *TwoConvolutions.call(4, 7, 11), dynamic=True, config={"cpp_wrapper": True})
        assert compiled.templates == 2
        assert compiled.kinds == ["template"] * 2
        network.assert_right(compiled.result, TwoConvolutions.call(4, 7, 11))
        with torch.compiler.set_stance("fail_on_recompile"):
            for sizes in [(2, 12, 5), (5, 3, 2), (3, 20, 33)]:
                network.assert_right(compiled.function(*TwoConvolutions.call(*sizes)), TwoConvolutions.call(*sizes))


def test_every_number_of_threads_gives_the_same_bits():
    layers = nn.ModuleList(DeformConv2d(48, 48, 3, padding=1, groups=groups) for groups in (1, 1, 48))
    layers[1].to(BF16)
    samples = [
        sample(Case(channels=48, out_channels=48, size=(37, 41), layout=layout), layer.weight.dtype)
        for layer, layout in zip(layers, ("contiguous", "channels_last", "contiguous"))
    ]

    def run(*calls):
        return [layer(*call) for layer, call in zip(layers, calls)]

    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():  # frozen, so that all generated code is the template's, and compiled once
            compiled = compile_and_run(run, *map(tensors_of, samples), config={"cpp_wrapper": True, "freezing": True})
        assert compiled.templates == compiled.kernels == len(samples)
        results.append(compiled.result)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


def test_wrong_shapes_are_the_same_error_as_in_eager_mode():
    right = sample("mask_bias")
    for wrong in (right.replace(offset=right.args[1][:, :-1]), right.replace(bias=right.args[3][:-1])):
        with pytest.raises(RuntimeError) as eager:
            deform_conv2d(*wrong.args, **wrong.kwargs)
        with pytest.raises(RuntimeError) as compiled:
            compile_and_run(call_all, [(wrong.args, wrong.kwargs)])
        assert str(eager.value).startswith("deform_conv2d: ")
        assert str(eager.value) in str(compiled.value)


def test_autocast_computes_in_float32():
    s = sample("groups_2")
    images = {dtype: s.args[0].to(dtype) for dtype in (FP32, BF16)}

    def run(images, offset, weight, bias, mask):
        return {dtype: deform_conv2d(x, offset, weight, bias, padding=1, mask=mask) for dtype, x in images.items()}

    arguments = images, *s.args[1:], s.kwargs["mask"]
    with torch.autocast("cpu", BF16), torch.no_grad():
        compiled, eager = compile_and_run(run, *arguments), run(*arguments)
    assert [path.detail.partition("fused")[1] for path in compiled.paths] == ["fused", "fused"]
    for dtype, x in images.items():
        assert compiled.result[dtype].dtype == eager[dtype].dtype == dtype
        assert_close(compiled.result[dtype], reference(s.replace(input=x)), dtype)
