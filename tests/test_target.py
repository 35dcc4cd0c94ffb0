"""package_target(): packages for other processors than the one at hand, which refuse to be loaded on lesser ones."""

from __future__ import annotations

import json
import pathlib
import platform
import re
from unittest.mock import patch

import inductor_vision
import pytest
import torch
from inductor_vision import package_target
from inductor_vision.lowering.common.machine import LEVELS, cache_bytes, cache_bytes_here, multiplied_dtypes
from inductor_vision.lowering.common.panels import bf16_dot_products
from inductor_vision.tests.support.compiled import run_alone
from inductor_vision.tests.support.machine_code import OF_NO_PROCESSOR, ONE_PACKAGE, assert_made_for, only_for_x86_64
from torch import Tensor, nn
from torch._inductor import config, cpu_vec_isa

pytestmark = only_for_x86_64

NEEDS_AVX512 = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="this CPU has no AVX-512")


class Network(nn.Module):
    """Kernels of several families, weights that are packed, and what Inductor makes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.offset = nn.Conv2d(32, 18, 3, padding=1)
        self.deform = inductor_vision.DeformConv2d(32, 48, 3, padding=1)
        self.pair = inductor_vision.DepthwiseSeparableConv2d(48, 32, 3, padding=1)

    def forward(self, image: Tensor, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.conv(image).relu()
        maps = self.pair(self.deform(maps, self.offset(maps)).sigmoid())
        kept, _ = inductor_vision.nms(boxes, scores, 0.5, max_detections=8)
        return inductor_vision.roi_align(maps, [boxes], 4, 0.5, 2), kept


def call_of_network() -> tuple[Tensor, Tensor, Tensor]:
    corners, sides = torch.rand(2, 20, 2) * 20
    return torch.rand(1, 3, 24, 32), torch.cat([corners, corners + sides], 1), torch.rand(20)


def make(model: nn.Module, call: tuple[Tensor, ...], path: pathlib.Path, target: str | None, **options: object) -> None:
    with torch.no_grad(), package_target(target):
        exported = torch.export.export(model.eval(), call)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)


@pytest.mark.parametrize(
    ("target", "optimized"),
    [
        # Of export_detector's target, which is this one too, a test of that is not slow.
        pytest.param("x86-64-v3", False, marks=pytest.mark.slow),
        pytest.param("x86-64-v2", True, marks=pytest.mark.slow),
        pytest.param("x86-64-v4", True, marks=[pytest.mark.slow, NEEDS_AVX512]),
    ],
)
def test_package_for_a_level(target, optimized, tmp_path):
    model, call, path = Network(), call_of_network(), tmp_path / "network.pt2"
    make(model, call, path, target, freezing=True, **ONE_PACKAGE, **{"aot_inductor.debug_compile": not optimized})
    assert_made_for(target, path)
    ((regions, kept),) = run_alone(path, [call], tmp_path)
    with torch.no_grad():
        expected, expected_kept = model(*call)
    assert torch.equal(kept, expected_kept)
    torch.testing.assert_close(regions, expected, rtol=1e-5, atol=1e-6)


def test_a_processor_that_lacks_something(tmp_path):
    """In a package that is made without a target for the sake of that alone."""
    path = tmp_path / "relu.pt2"
    make(nn.ReLU(), (torch.rand(5),), path, None, **OF_NO_PROCESSOR)
    with pytest.raises(
        RuntimeError, match=r"^this package was compiled for bdver4; the processor at hand lacks( \w+)* xop"
    ):
        torch._inductor.aoti_load_package(str(path))


@pytest.mark.parametrize("target", LEVELS)
def test_nothing_follows_the_processor_at_hand(target, monkeypatch):
    """Be it an old one, or one with all additions to AVX-512."""
    level = LEVELS[target]
    with monkeypatch.context() as processor, package_target(target):
        for has in (False, True):
            for name in ("avx2", "avx512", "vnni", "avx512_bf16", "amx_tile", "amx_fp16"):
                processor.setattr(torch.cpu, f"_is_{name}_supported", lambda has=has: has)
            capabilities = {"l2_cache_size": 123 << 10, "avx512_bf16": has, "amx_bf16": has}
            processor.setattr(torch.cpu, "get_capabilities", lambda: capabilities)  # noqa: B023  (called in this round)
            processor.setenv("ATEN_CPU_CAPABILITY", "avx512" if has else "default")
            isa = cpu_vec_isa.pick_vec_isa()
            assert isa.bit_width() == level.vector_bits
            assert not re.search("vnni|bf16|amx|fp16", isa.build_arch_flags())
            assert cache_bytes() == level.cache_bytes != cache_bytes_here()
            assert not bf16_dot_products() and multiplied_dtypes() == []
    assert cache_bytes() == cache_bytes_here() and config.cpp.march is None


@pytest.mark.parametrize("target", ["x86-64-v5", "armv8-a", "native", ""])
def test_other_targets(target):
    message = rf"^package_target: target must be one of x86-64-v2, .*, got {json.dumps(target)[1:-1]!r}. .* for ARM"
    with pytest.raises(ValueError, match=message), package_target(target):
        raise AssertionError("entered")


def test_other_machines():
    with (
        patch.object(platform, "machine", lambda: "aarch64"),
        pytest.raises(ValueError, match=r"^package_target: x86-64-v3 .* on x86-64, and this machine is aarch64"),
        package_target("x86-64-v3"),
    ):
        raise AssertionError("entered")


def test_weights_are_in_memory_once(tmp_path):
    """Of the file, from which they are copied when it is loaded, little stays resident; it can be loaded again."""
    model, x, path = nn.Linear(2048, 4096), torch.rand(1, 2048), tmp_path / "linear.pt2"
    make(model, (x,), path, None, **{"aot_inductor.debug_compile": True})
    before = memory_of_packages()
    for _ in range(2):
        package = torch._inductor.aoti_load_package(str(path))
        mapped, resident = (now - then for now, then in zip(memory_of_packages(), before))
        assert mapped >= 32 << 20 and resident < 8 << 20
        torch.testing.assert_close(package(x), model(x))


def memory_of_packages() -> tuple[int, int]:
    """Bytes that are mapped from the files of packages that were loaded, and how many of them are in memory."""
    sizes, counts = {"Size": 0, "Rss": 0}, False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = line.endswith("wrapper.so")
        elif counts and (name := line.partition(":")[0]) in sizes:
            sizes[name] += int(line.split()[1]) << 10
    return sizes["Size"], sizes["Rss"]
