"""What deform_conv2d compiles to: which kernel takes a call, what it computes, and what is fused into it."""

from __future__ import annotations

import contextlib
import copy
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from inductor_vision import DeformConv2d, deform_conv2d
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Compiled, caches_disabled, compile_and_run, run_python
from inductor_vision.tests.support.deform_conv2d import CASES, HOSTILE, Case, Sample, oracle, sample
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.utils import run_and_get_code

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
    FP64: {"mask_bias": "GEMM", "groups_8": "GEMM", "depthwise_37": "depthwise"},
    BF16: {
        "mask_bias": "GEMM",
        "channels_37": "GEMM",
        "channels_64": "GEMM",
        "input_channels_last": "GEMM",
        "hostile": "GEMM",
        "depthwise_37": "depthwise",
    },
    FP16: {"mask_bias": "GEMM", "hostile": "GEMM", "depthwise_37": "depthwise"},
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_values_of_all_other_cases(dtype):
    samples = [sample(name, dtype) for name in {**CASES, **HOSTILE} if name not in QUICK[dtype]]
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
        names = ["mask_bias", "channels_37", "groups_8", "hostile", "depthwise_37", "shared"]
        assert_right_without_dot_products([sample(name, dtype) for dtype in (FP64, BF16, FP16) for name in names])


def module(channels: int = 16, out_channels: int = 16, groups: int = 1) -> DeformConv2d:
    return DeformConv2d(channels, out_channels, 3, padding=1, groups=groups)


def arguments(batch: int = 2, channels: int = 16, size: tuple[int, int] = (9, 13), **changes: Any) -> Sample:
    """A call whose weight has as many outputs as inputs, so that the result can be added to the input."""
    return sample(Case(batch=batch, channels=channels, out_channels=channels, size=size, **changes))


class Block(nn.Module):
    """Deformable convolution, batch norm, activation, residual: of float64 parameters, and of any dtype's."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv = module(channels, channels)
        self.norm = nn.BatchNorm2d(channels).eval()
        for values in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(values)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution's own result, and the block's."""
        own = self.conv(x, offset, mask)
        return own, self.norm(own).relu() + x

    def reference(self, x: Tensor, offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        own = oracle(x, offset, self.conv.weight, self.conv.bias, padding=1, mask=mask)
        return own, copy.deepcopy(self.norm).double()(own).relu() + x.double()


FORMATS = [(dtype, layout) for dtype in (FP32, BF16) for layout in ("contiguous", "channels_last")]


def blocks() -> tuple[nn.ModuleList, list[tuple[Tensor, Tensor, Tensor]]]:
    """A block, and what to call it with, for each of FORMATS."""
    calls = []
    for dtype, layout in FORMATS:
        s = arguments(layout=layout, offset_layout=layout).to(dtype)
        calls.append((s.args[0], s.args[1], s.kwargs["mask"]))
    return nn.ModuleList(Block().to(dtype) for dtype, _ in FORMATS), calls


def test_bias_norm_activation_and_residual_are_fused():
    modules, calls = blocks()

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = modules

        def forward(self, calls):
            return [block(*call)[1] for block, call in zip(self.blocks, calls)]

    with torch.no_grad():
        compiled = compile_and_run(Network(), calls, config={"freezing": True})
        assert compiled.templates == compiled.fused == compiled.kernels == len(FORMATS)
        for (dtype, layout), block, call, result in zip(FORMATS, modules, calls, compiled.result):
            assert_close(result, block.reference(*call)[1], dtype, f"{dtype}, {layout}")
            assert result.stride() == call[0].stride()


def test_own_result_is_stored_beside_the_fused_one():
    modules, calls = blocks()

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = modules

        def forward(self, calls):
            return [block(*call) for block, call in zip(self.blocks, calls)]

    with torch.no_grad():
        compiled = compile_and_run(Network(), calls, config={"freezing": True})
        assert compiled.templates == compiled.fused == compiled.kernels == len(FORMATS)
        for (dtype, layout), block, call, results in zip(FORMATS, modules, calls, compiled.result):
            for name, result, expected in zip(("own", "fused"), results, block.reference(*call)):
                assert_close(result, expected, dtype, f"{name}, {dtype}, {layout}")


EPILOGUES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "flatten": lambda y, x: y.flatten(1).relu(),
    "view": lambda y, x: y.view(2, 4, 4, 9, 13).sigmoid(),
    "permute": lambda y, x: y.permute(0, 2, 3, 1).relu(),
    "permute_contiguous": lambda y, x: y.permute(0, 2, 3, 1).contiguous() + 1,
    "slice": lambda y, x: y[:, 1:7, 2:].relu(),
    "broadcast": lambda y, x: y[:, :, None] * torch.ones(1, 1, 3, 1, 1),
    "gate": lambda y, x: y * x.mean((2, 3), keepdim=True).sigmoid(),
    "convert": lambda y, x: y.sigmoid().double(),
    "in_place": lambda y, x: y.add_(x).relu_().mul_(2),
    "chain": lambda y, x: (y.relu(), y.relu().sigmoid() * x),
    "fan": lambda y, x: (y, y.relu(), y.relu() * x, y.mean((2, 3))),
    "flip": lambda y, x: y + y.flip(3),
    "pool": lambda y, x: nn.functional.avg_pool2d(y.relu(), 2),
    "cat": lambda y, x: torch.cat([y, x], 1),
    "dying_residual": lambda y, x: y + (x.cumsum(3) * 2),
}


def flat(results: Any) -> list[Tensor]:
    return list(results) if isinstance(results, (tuple, list)) else [results]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_epilogues_of_all_shapes(layout):
    s = arguments(layout=layout, offset_layout=layout)

    def run(x, offset, weight, bias, mask):
        # Each call's input is its own, or all calls would be one.
        inputs = [x * (i + 1) for i in range(len(EPILOGUES))]
        return [
            flat(epilogue(deform_conv2d(scaled, offset, weight, bias, padding=1, mask=mask), x))
            for epilogue, scaled in zip(EPILOGUES.values(), inputs)
        ]

    tensors = (*s.args, s.kwargs["mask"])
    compiled = compile_and_run(run, *tensors, config={"cpp_wrapper": True})
    assert compiled.templates == len(EPILOGUES)
    assert compiled.fused > 0
    for i, (name, epilogue) in enumerate(EPILOGUES.items()):
        x, *others = tensors
        own = oracle(x * (i + 1), *others[:3], padding=1, mask=others[3])
        for result, expected in zip(compiled.result[i], flat(epilogue(own, x.double()))):
            assert_close(result, expected, FP32, name)


class Network(nn.Module):
    """As models use it: one convolution makes offset and mask, batch norm and activation follow, then the next."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.offset = nn.Conv2d(16, 27, 3, padding=1)
        self.block = Block()
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y, x_offset, mask = self.offset(x).chunk(3, dim=1)
        return self.head(self.block(x, torch.cat([y, x_offset], 1), mask.sigmoid())[1])


class ChunkViews(nn.Module):
    """Offset and mask are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Conv2d(16, 27, 3, padding=1)
        self.conv = module()

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.offset(x).split([18, 9], dim=1)
        return self.conv(x, offset, mask)


@pytest.mark.parametrize("freezing", [False, True])
def test_networks(freezing):
    network, views = Network().eval(), ChunkViews().eval()

    def run(image, x):
        return network(image), views(x)

    image, x = torch.randn(2, 3, 12, 15), torch.randn(2, 16, 12, 15)
    with torch.no_grad():
        compiled = compile_and_run(run, image, x, config={"freezing": freezing})
        expected = copy.deepcopy(network).double()(image.double()), copy.deepcopy(views).double()(x.double())
    assert compiled.templates == 2
    assert compiled.fused == 1
    for result, values in zip(compiled.result, expected):
        assert_close(result, values, FP32)
