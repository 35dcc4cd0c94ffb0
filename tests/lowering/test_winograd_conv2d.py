"""What winograd_conv2d and its gradients compile to: which kernel takes a call, its values, what fuses into it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from inductor_vision import explain, winograd_conv2d
from inductor_vision.lowering import winograd_conv2d as lowering
from inductor_vision.lowering.common import winograd as common
from inductor_vision.ops.registry import OPS
from inductor_vision.tests.support import convolution_templates
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Compiled, compile_and_run, trace_and_run
from inductor_vision.tests.support.convolution_templates import (
    Blocks,
    assert_all_is_fused,
    assert_all_right,
    assert_same_errors,
    assert_takes_templates,
    compute,
    flat,
)
from inductor_vision.tests.support.winograd_conv2d import (
    CASES,
    TENSORS,
    Case,
    Sample,
    gradient_oracle,
    oracle,
    sample,
    spoilt,
)
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa

pytestmark = pytest.mark.usefixtures("optimized")

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BACKWARD = OPS["winograd_conv2d_backward"]
WEIGHT = ("winograd_conv2d", "transform of the weight")

# Each memory format, tile, type and number of lines of channels is a kernel to compile: few of them.
QUICK_FORWARD = {
    FP32: ["plain", "tile_2", "padding_beyond_the_kernel", "channels_3_to_17", "channels_64_to_40", "empty_batch",
           "image_1x1", "input_stepped", "many_tiles"],
    BF16: ["many_tiles_channels_last"],
}  # fmt: skip
QUICK_BACKWARD = {FP32: ["groups_2", "padding_beyond_the_kernel"]}


class Call(convolution_templates.Call):
    function = staticmethod(winograd_conv2d)
    gradients = BACKWARD
    oracle, gradient_oracle = staticmethod(oracle), staticmethod(gradient_oracle)

    @property
    def kernels(self) -> list[tuple[str, str]]:
        tile = self.sample.case.tile
        kind = f"F({tile} x {tile}, 3 x 3), fused"
        if self.wanted is None:
            return [WEIGHT, ("winograd_conv2d", kind)]
        return (
            [WEIGHT, ("winograd_conv2d_backward", f"gradient of the input, {kind}")] if "input" in self.wanted else []
        )


def with_gradients(s: Sample) -> list[Call]:
    return [Call(s), Call(s, TENSORS)]


QUICK = [
    *(Call(sample(name, dtype)) for dtype in QUICK_FORWARD for name in QUICK_FORWARD[dtype]),
    *(Call(sample(name, dtype), TENSORS) for dtype in QUICK_BACKWARD for name in QUICK_BACKWARD[dtype]),
]


@pytest.fixture(scope="module")
def quick() -> Compiled:
    return compute(QUICK)


def test_every_call_is_a_template(quick):
    assert_takes_templates(quick, QUICK)


@pytest.mark.parametrize("i", range(len(QUICK)), ids=map(str, QUICK))
def test_values(quick, i):
    QUICK[i].assert_right(quick.result[i])


FEW = ["plain", "tile_2", "channels_37_to_19", "groups_2", "input_channels_last"]
OTHER = {
    "forward": lambda: [Call(sample(name)) for name in CASES if name not in QUICK_FORWARD[FP32]],
    "gradients": lambda: [
        Call(sample(name), TENSORS)
        for name in CASES
        if name not in QUICK_BACKWARD[FP32] and not name.startswith(("input", "many", "image"))
    ],
    "low-precision": lambda: [
        call for name in FEW[1:] for dtype in (BF16, FP16) for call in with_gradients(sample(name, dtype))
    ],
    "float64": lambda: [call for name in FEW for call in with_gradients(sample(name, FP64))],
}


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("calls", OTHER.values(), ids=OTHER)
def test_all_other_cases_and_dtypes(calls):
    calls = calls()
    compiled = compute(calls)
    assert_takes_templates(compiled, calls)
    assert_all_right(compiled, calls)


@pytest.mark.slow
@pytest.mark.parametrize("simdlen,bits", [(256, 256), (1, 0)])
def test_narrow_or_no_vectors(simdlen, bits):
    samples = [*map(sample, ["plain", "channels_37_to_19"]), sample("plain", BF16)]
    calls = [call for s in samples for call in with_gradients(s)]
    with config.patch({"cpp.simdlen": simdlen}):
        isa = pick_vec_isa()
        assert (isa.bit_width() if isa else 0) == bits
        compiled = compute(calls)
    assert_takes_templates(compiled, calls)
    assert_all_right(compiled, calls)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [2, 4])
def test_bad_pixels_stay_in_their_tiles(tile):
    samples = []
    for layout in ("contiguous", "channels_last"):
        s = sample(Case(size=(15, 13), padding=(1, 2), tile=tile, layout=layout))
        image = s.args[0].clone()
        image[0, 1, 6, 7], image[1, 4, 14, 12], image[1, 0, 0, 4] = torch.nan, torch.inf, -torch.inf
        samples.append(s.replace(input=image))
    compiled = compute([Call(s) for s in samples])
    for i, s in enumerate(samples):
        must, may = spoilt(s)
        bad = ~compiled.result[i].isfinite().all(1)
        assert (bad | ~must).all() and (may | ~bad).all()
        right = oracle(s).where(~may[:, None], 0)
        assert_close(compiled.result[i].where(~may[:, None], 0), right, FP32)


# Weights


class Convolution(nn.Module):
    """A layer with a weight of its own."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, channels, 3, 3) / (9 * channels) ** 0.5)
        self.bias = nn.Parameter(torch.randn(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return winograd_conv2d(x, self.weight, self.bias)


SMALL, LARGE = (12, 20), (140, 150)


def kernels_of(size: tuple[int, int], **options: Any) -> Compiled:
    model, x = Convolution(16, 20), torch.randn(1, 16, *size)
    with torch.no_grad():
        compiled = compile_and_run(model, x, config=options)
        exact = copy.deepcopy(model).double()(x.double())
    assert_close(compiled.result, exact, FP32)
    return compiled


@pytest.mark.usefixtures("unoptimized")
def test_a_constant_weight_is_transformed_once():
    assert [path.detail for path in kernels_of(SMALL, freezing=True).paths] == ["F(4 x 4, 3 x 3), fused"]


@pytest.mark.usefixtures("unoptimized")
def test_another_weight_is_transformed_in_the_graph():
    assert [path.detail for path in kernels_of(SMALL).paths] == [WEIGHT[1], "F(4 x 4, 3 x 3), fused"]


@pytest.mark.slow
def test_a_weight_may_be_transformed_in_the_call_for_small_maps_too(monkeypatch):
    """Slice by slice, because there are few tiles."""
    monkeypatch.setattr(common, "_MANY_TILES", 0)
    for size in ((25, 34), SMALL):
        compiled = kernels_of(size, freezing=True)
        assert [path.detail for path in compiled.paths] == ["F(4 x 4, 3 x 3), weight transformed in the call, fused"]


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("freezing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_weight_for_a_large_map_is_transformed_in_the_call(freezing):
    compiled = kernels_of(LARGE, freezing=freezing)
    assert [path.detail for path in compiled.paths] == ["F(4 x 4, 3 x 3), weight transformed in the call, fused"]


# Neighbours


class Block(nn.Module):
    """Convolution, batch norm, activation, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Convolution(16, 16)
        self.norm = nn.BatchNorm2d(16).eval()
        for values in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(values)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution's own result, and the block's."""
        own = self.conv(x)
        return own, self.norm(own).relu() + x

    def reference(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return copy.deepcopy(self).double()(x.double())


def test_norm_activation_and_residual_are_fused():
    inputs = {
        layout: sample(Case(channels=16, out_channels=16, layout=layout)).args[0]
        for layout in ("contiguous", "channels_last")
    }
    assert_all_is_fused(Blocks(Block, inputs))


EPILOGUES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "permute": lambda y, x: y.permute(0, 2, 3, 1).relu(),
    "slice": lambda y, x: y[:, 1:4, 2:].relu(),
    "gate": lambda y, x: y * x.mean((2, 3), keepdim=True).sigmoid(),
    "convert": lambda y, x: y.sigmoid().double(),
    "fan": lambda y, x: (y, y.relu(), y.relu() * x, y.mean((2, 3))),
    "flip": lambda y, x: y + y.flip(3),
    "cat": lambda y, x: torch.cat([y, x], 1),
    "residual_of_another_format": lambda y, x: (y + (2 * x).transpose(2, 3).contiguous().transpose(2, 3)).relu(),
}


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
def test_epilogues_of_all_shapes():
    keys = [(name, layout) for name in EPILOGUES for layout in ("contiguous", "channels_last")]
    samples = {key: sample(Case(channels=16, out_channels=16, layout=key[1])) for key in keys}
    # Each call's input is its own, or all calls would be one.
    calls = [(*key, (s.args[0] * (i + 1), *s.args[1:])) for i, (key, s) in enumerate(samples.items())]

    def run(calls):
        return [flat(EPILOGUES[name](winograd_conv2d(*args), args[0])) for name, _, args in calls]

    compiled = compile_and_run(run, calls, config={"cpp_wrapper": True})
    assert compiled.templates == 2 * len(calls)  # with the transform of each weight
    assert compiled.fused > len(EPILOGUES)
    for (name, layout, args), results in zip(calls, compiled.result):
        expected = EPILOGUES[name](oracle(samples[name, layout].replace(input=args[0])), args[0].double())
        for result, values in zip(results, flat(expected)):
            assert_close(result, values, FP32, f"{name}, {layout}")


# Training


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Convolution(3, 16)
        self.second = Convolution(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).relu()


def train(network: Callable[..., Tensor], parameters: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    return list(torch.autograd.grad(network(leaf).square().sum(), [leaf, *parameters]))


@pytest.mark.usefixtures("unoptimized")
def test_one_compilation_serves_all_sizes_in_training():
    network = Network()
    parameters = list(network.parameters())

    def assert_right(results: Sequence[Tensor], x: Tensor) -> None:
        exact = copy.deepcopy(network).double()
        expected = train(exact, list(exact.parameters()), x.double())
        for result, values in zip(results, expected):
            assert_close(result, values, FP32, f"{tuple(x.shape)}")
            assert result.stride() == values.stride()

    def image(*size: int) -> Tensor:
        return sample(Case(batch=size[0], channels=3, size=size[1:], layout="channels_last")).args[0]

    def run(network: Callable[..., Any], x: Tensor) -> list[Tensor]:
        return train(network, parameters, x)

    compiled = compile_and_run(network, image(4, 7, 6), dynamic=True, run=run, config={"cpp_wrapper": True})
    assert {(path.op, path.kind) for path in compiled.paths} == {
        ("winograd_conv2d", "template"),
        ("winograd_conv2d_backward", "template"),
    }
    assert_right(compiled.result, image(4, 7, 6))
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in [(2, 5, 3), (3, 21, 80), (5, 4, 3)]:
            assert_right(run(compiled.function, image(*size)), image(*size))


@pytest.mark.usefixtures("unoptimized")
def test_autocast_computes_in_lower_precision():
    s = sample("many_tiles_channels_last")
    with torch.autocast("cpu", BF16), torch.no_grad():
        compiled = compile_and_run(lambda: winograd_conv2d(*s.args, **s.kwargs), config={"cpp_wrapper": True})
    assert set(compiled.kinds) == {"template"}
    assert compiled.result.dtype == BF16
    assert_close(compiled.result, oracle(s), BF16)


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "bound"), [(4, 2e-5), (2, 5e-6)])
def test_errors_of_512_channels_are_small(tile, bound):
    s = sample(Case(batch=1, channels=512, out_channels=64, size=(25, 34), tile=tile, layout="channels_last"))
    compiled = compute([Call(s)])
    exact = oracle(s)
    assert (compiled.result[0] - exact).abs().max() < bound * exact.abs().max()


def test_padding_that_changes_is_left_to_the_decomposition():
    x, weight, _ = sample("plain").args
    traced = trace_and_run(lambda x, padding: winograd_conv2d(x, weight, padding=padding), x, 2, dynamic=True)
    assert_close(traced.result, winograd_conv2d(x.double(), weight.double(), padding=2), FP32)
    assert [(path.kind, path.detail) for path in traced.paths] == [
        ("decomposition", "stride, padding and dilation must be constants")
    ]


def test_explain_says_how_it_is_computed():
    s = sample("tile_2")
    paths = explain(lambda *args: winograd_conv2d(*args, **s.kwargs), *s.args).paths
    assert [(path.op, path.kind, path.detail) for path in paths] == [
        ("winograd_conv2d", "template", detail) for detail in (WEIGHT[1], "F(2 x 2, 3 x 3), fused")
    ]


def test_wrong_shapes_are_the_same_error_as_in_eager_mode():
    right = sample("plain")
    assert_same_errors(
        winograd_conv2d, [right.replace(input=right.args[0][:, 1:]), right.replace(bias=right.args[2][:-1])]
    )


def test_large_maps_are_those_of_many_tiles():
    """The number of tiles decides, not the size of the map."""
    winograd = lowering.Winograd(8, 1, (1, 1), 4, False)
    assert winograd.transforms_in_the_call(1, LARGE) and not winograd.transforms_in_the_call(1, SMALL)
    assert winograd.transforms_in_the_call(140, SMALL)
