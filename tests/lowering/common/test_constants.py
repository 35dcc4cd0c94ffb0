"""Weights are packed once, when they are compiled, where they are constants, and at every call where they are not."""

from __future__ import annotations

import pytest
import torch
from inductor_vision import DeformConv2d, deform_conv2d
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import caches_disabled, compile_and_run, constants_of_package
from inductor_vision.tests.support.deform_conv2d import Case, oracle, sample
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config


class SharedKernel(nn.Module):
    """One 3x3 kernel for all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(1, 1, 3, 3))
        self.bias = None
        self.channels = channels

    @property
    def weight(self) -> Tensor:
        return self.kernel.expand(self.channels, 1, 3, 3)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        return deform_conv2d(x, offset, self.weight, padding=1)


def reference(conv: nn.Module, x: Tensor, offset: Tensor) -> Tensor:
    return oracle(x, offset, conv.weight, conv.bias, padding=1)


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return sample(Case(channels=24, out_channels=24, mask=False), dtype).args[:2]


class Layers(nn.ModuleList):
    """A layer for each order of packed weights."""

    def __init__(self, bf16: bool) -> None:
        super().__init__([DeformConv2d(24, 40, 3, padding=1, groups=groups) for groups in (1, 4)])
        self.extend([DeformConv2d(24, 24, 3, padding=1, groups=24), SharedKernel(24)])
        if bf16:
            self.append(DeformConv2d(24, 40, 3, padding=1).to(torch.bfloat16))

    def calls(self) -> list[tuple[Tensor, Tensor]]:
        return [arguments(next(layer.parameters()).dtype) for layer in self]

    def forward(self, calls: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [layer(*call) for layer, call in zip(self, calls)]

    def assert_right(self, results: list[Tensor]) -> None:
        for result, layer, call in zip(results, self, self.calls()):
            assert_close(result, reference(layer, *call), result.dtype)


def test_frozen_weights_are_packed_at_compile_time():
    layers = Layers(bf16=True)
    with torch.no_grad():
        compiled = compile_and_run(layers, layers.calls(), config={"freezing": True})
    assert compiled.templates == compiled.kernels == len(layers)
    layers.assert_right(compiled.result)


def test_other_weights_are_packed_at_every_call():
    layers = Layers(bf16=False)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    with torch.no_grad():
        compiled = compile_and_run(layers, layers.calls())
        assert compiled.templates == len(layers) < compiled.kernels
        layers.assert_right(compiled.result)
    for parameter in layers.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        layers.assert_right(compiled.function(layers.calls()))


def test_the_cache_of_graphs_tells_frozen_weights_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()
    for _ in range(2):
        torch._dynamo.reset()
        layer = DeformConv2d(24, 40, 3, padding=1)
        with torch.no_grad(), config.patch(freezing=True, fx_graph_cache=True):
            result = torch.compile(layer)(*arguments())
        assert_close(result, reference(layer, *arguments()), torch.float32)
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] == 2


class WeightWithOtherUsers(nn.Module):
    """The weight is packed for one operator and read as it is by another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = DeformConv2d(24, 40, 3, padding=1)

    def forward(self, x: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x, offset), nn.functional.conv2d(x, self.conv.weight, padding=1)


@pytest.mark.slow
@pytest.mark.parametrize("freezing", [False, True])
def test_packages_keep_a_weight_that_others_use(tmp_path, freezing):
    model = WeightWithOtherUsers()
    x, offset = arguments()
    with torch.no_grad(), caches_disabled(), config.patch(freezing=freezing):
        exported = torch.export.export(model, (x, offset))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        deformable, plain = torch._inductor.aoti_load_package(path)(x, offset)
    assert_close(deformable, reference(model.conv, x, offset), torch.float32)
    assert_close(plain, nn.functional.conv2d(x.double(), model.conv.weight.double(), padding=1), torch.float32)


class Awkward(nn.Module):
    """Packed weights that are views of a parameter, or equal it, or a buffer that changes; a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one = DeformConv2d(1, 1, 3, padding=1)
        self.repeated = DeformConv2d(8, 8, 3, padding=1)
        self.shared = nn.Parameter(torch.randn(9))
        self.taps_first = nn.Parameter(torch.randn(9, 8))
        self.register_buffer("calls", torch.zeros(9, 8))
        self.zeros = nn.Parameter(torch.zeros(8, 1, 3, 3))

    def forward(self, x: Tensor, offset: Tensor) -> list[Tensor]:
        self.calls.add_(1)
        once = self.repeated(x, offset)
        depthwise = [
            self.shared.view(1, 1, 3, 3).expand(8, 1, 3, 3),
            self.taps_first.t().reshape(8, 1, 3, 3),
            self.zeros,
        ]
        return [
            self.one(x[:, :1], offset),
            once,
            self.repeated(once, offset),
            *(deform_conv2d(x, offset, weight, padding=1) for weight in depthwise),
        ]


@pytest.mark.slow
def test_packages_hold_one_copy_of_each_packed_weight(tmp_path):
    model = Awkward()
    x, offset = sample(Case(channels=8, out_channels=8, mask=False), torch.float32).args[:2]
    with torch.no_grad(), caches_disabled():
        exported = torch.export.export(model, (x, offset))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        package = torch._inductor.aoti_load_package(path)
        package(x, offset)
        results = package(x, offset)
        for result, expected in zip(results, model.double()(x.double(), offset.double()), strict=True):
            assert_close(result, expected, torch.float32)
    # The biases are so small that Inductor writes them into the code. Left are what is packed, and `calls`.
    assert sorted(constants_of_package(path)) == sorted(["9, 1", "1, 1, 9, 8, 16", "9", "9, 8", "9, 8", "9, 8"])
