"""What multiscale_deformable_attention and its gradient compile to: one kernel each, and what it computes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from inductor_vision import multiscale_deformable_attention
from inductor_vision.lowering import multiscale_deformable_attention as lowering
from inductor_vision.ops.registry import OPS
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Compiled, compile_and_run
from inductor_vision.tests.support.multiscale_deformable_attention import CASES, TENSORS, Case, gradient_oracle, oracle
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa

pytestmark = pytest.mark.usefixtures("optimized")

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FORWARD = OPS["multiscale_deformable_attention"]
BACKWARD = FORWARD.backward

PRECISIONS = {
    f"{dtype}, {others}": Case(dtype=dtype, others=others, channels=11, locations="hostile")
    for dtype, others in ((FP64, FP64), (FP64, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP32), (FP32, BF16))
}
CALLS = {**CASES, **PRECISIONS}
# Each kind of kernel, and what its loops end with.
QUICK = (
    *("three levels", "points that differ", "many points", "one pixel", "61 channels", "borders", "hostile"),
    *("discrete, hostile", "tensor of sizes", "channels_first", "heads_first", "stepped", "no queries"),
    f"{FP64}, {FP64}",
    f"{BF16}, {FP32}",
)


def compute(cases: Sequence[Case]) -> Compiled:
    """All calls, and their gradients, in one graph and one source file."""

    def run(calls: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, ...]]:
        return [(FORWARD(*arguments), *BACKWARD(grad, *arguments, [True] * 3)) for grad, *arguments in calls]

    calls = [case.positional_backward[:-1] for case in cases]
    return compile_and_run(run, calls, config={"cpp_wrapper": True})


def assert_right(case: Case, results: Sequence[Tensor]) -> None:
    out, *gradients = results
    assert out.dtype == case.dtype and out.is_contiguous()
    assert_close(out, oracle(case), case.dtype)
    others = case.others or case.dtype
    coarser = max(case.dtype, others, key=lambda dtype: torch.finfo(dtype).eps)
    for name, gradient, tensor, expected in zip(TENSORS, gradients, case.tensors(), gradient_oracle(case)):
        assert gradient.dtype == tensor.dtype and gradient.is_contiguous()
        assert_close(gradient, expected, coarser, f"gradient of {name}")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(QUICK, id="some"),
        pytest.param([name for name in CALLS if name not in QUICK], id="others", marks=pytest.mark.slow),
    ],
)
def compiled(request) -> tuple[dict[str, Case], Compiled]:
    cases = {name: CALLS[name] for name in request.param}
    with config.patch({"aot_inductor.debug_compile": True}):  # compiles in a third of the time
        return cases, compute(list(cases.values()))


def test_every_call_is_a_template(compiled):
    cases, compiled = compiled
    assert compiled.kinds == ["template"] * 2 * len(cases)
    assert compiled.templates == 2 * len(cases)
    details = [path.detail for path in compiled.paths if path.op == FORWARD.name]
    strided = ["no neighbours" in detail for detail in details]
    assert strided == [case.layout in ("channels_first", "stepped") for case in cases.values()]


def test_values_and_gradients(compiled):
    cases, compiled = compiled
    for name, results in zip(cases, compiled.result):
        print(name)  # that which fails is the last
        assert_right(cases[name], results)


@pytest.mark.slow
@pytest.mark.parametrize("simdlen,bits", [(None, None), (256, 256), (1, 0)])
def test_optimized_with_wide_narrow_and_no_vectors(simdlen, bits):
    names = [
        "points that differ",
        "61 channels",
        "hostile",
        "discrete, hostile",
        "channels_first",
        str((BF16, FP32))[1:-1],
    ]
    cases = [CALLS[name] for name in names]
    with config.patch({"cpp.simdlen": simdlen}):
        isa = pick_vec_isa()
        assert bits is None or (isa.bit_width() if isa else 0) == bits
        results = compute(cases).result
    for case, result in zip(cases, results):
        assert_right(case, result)


@pytest.mark.usefixtures("unoptimized")
def test_every_number_of_threads_gives_the_same_bits(monkeypatch):
    """Gradients of values are cut into tiles, by the number of threads too."""
    monkeypatch.setattr(lowering, "cache_bytes", lambda: 1 << 12)
    cases = [
        Case(batch=1, heads=1, sizes=((23, 17), (9, 8)), points=(4, 4), queries=200, channels=19),
        Case(batch=3, heads=2, sizes=((13, 11),), points=(3,), queries=90, channels=16, dtype=BF16, others=FP32),
    ]
    arguments = [case.positional_backward for case in cases]

    def run(calls: Sequence[tuple[Any, ...]]) -> list[Tensor]:
        return [result for grad, *call in calls for result in (FORWARD(*call[:-1]), *BACKWARD(grad, *call))]

    compiled = compile_and_run(run, arguments, config={"cpp_wrapper": True})
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, compiled.function(arguments), compiled.result))
    for i, case in enumerate(cases):
        assert_right(case, compiled.result[4 * i : 4 * i + 4])


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("as_tensor", [False, True])
def test_one_compilation_serves_all_sizes(as_tensor):
    """Also those of levels, whether they come as numbers or as a tensor."""
    # No two sizes are the same: torch.compile takes those for one.
    first = Case(points=(2, 3), sizes=((6, 9), (4, 10)), batch=7, queries=11, as_tensor=as_tensor)
    others = [
        dataclasses.replace(first, sizes=((17, 9), (2, 7)), batch=3, queries=33),
        dataclasses.replace(first, sizes=((2, 3), (11, 4)), queries=2),
    ]

    def run(grad: Tensor, value: Tensor, maps: Any, locations: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        sizes, shapes = ([], maps) if as_tensor else ([length for map in maps for length in map.shape], None)
        arguments = value, sizes, shapes, locations, weights, list(first.points), "default"
        return FORWARD(*arguments), *BACKWARD(grad, *arguments, [True] * 3)

    def call(case: Case) -> tuple[Any, ...]:
        value, locations, weights = case.tensors()
        maps = torch.tensor(case.sizes) if as_tensor else [torch.empty(size) for size in case.sizes]
        return case.grad, value, maps, locations, weights

    compiled = compile_and_run(run, *call(first), dynamic=True)
    assert compiled.kinds == ["template"] * 2
    assert_right(first, compiled.result)
    with torch.compiler.set_stance("fail_on_recompile"):
        for case in others:
            assert_right(case, compiled.function(*call(case)))


@pytest.mark.usefixtures("unoptimized")
def test_wrong_sizes_in_a_tensor_are_the_same_error_as_in_eager_mode():
    value, shapes, *others = Case(as_tensor=True).arguments
    compiled = compile_and_run(multiscale_deformable_attention, value, shapes, *others)
    assert compiled.kinds == ["template"]
    for wrong in ([(5, 7), (3, 4), (1, 3)], [(5, 7), (7, 2), (0, 2)], [(2**62, 4), (7, 7), (2**62, 4)]):
        with pytest.raises(RuntimeError) as eager:
            multiscale_deformable_attention(value, torch.tensor(wrong), *others)
        with pytest.raises(RuntimeError) as from_kernel:
            compiled.function(value, torch.tensor(wrong), *others)
        assert str(from_kernel.value) == str(eager.value)


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_neighbours_are_fused(dtype):
    """A bias for each channel of each head, a residual, an activation, and a conversion."""
    case = Case(dtype=dtype, others=FP32, queries=40, channels=16)
    value, shapes, locations, weights, points, _ = case.arguments
    bias, residual = torch.randn(48), torch.randn(2, 40, 48)

    def function(value: Tensor) -> tuple[Tensor, Tensor]:
        out = multiscale_deformable_attention(value, shapes, locations, weights, points)
        return (out + bias + residual).relu(), out

    compiled = compile_and_run(function, value)
    assert (compiled.kinds, compiled.templates, compiled.fused, compiled.kernels) == (["template"], 1, 1, 1)
    assert_close(compiled.result[0], (oracle(case) + bias + residual).relu(), dtype)
    assert_close(compiled.result[1], oracle(case), dtype)


class Layer(nn.Module):
    """The attention layer of Deformable DETR, whose value has ``[B, H, D, S]`` in memory, as in rf-detr."""

    def __init__(self, dimension: int = 32, heads: int = 4, levels: int = 2, points: int = 3) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.value_proj, self.output_proj = nn.Linear(dimension, dimension), nn.Linear(dimension, dimension)
        self.sampling_offsets = nn.Linear(dimension, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dimension, heads * levels * points)

    def forward(self, queries: Tensor, reference: Tensor, memory: Tensor, mask: Tensor, maps: list[Tensor]) -> Tensor:
        value = self.value_proj(memory).masked_fill(mask[..., None], 0)
        value = value.transpose(1, 2).contiguous().unflatten(1, (self.heads, -1))  # [B, H, D, S]
        shapes = [map.shape for map in maps]
        levels = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(queries).unflatten(-1, (*levels, 2))
        size = torch.tensor([(width, height) for height, width in shapes])[:, None]
        locations = reference[:, :, None, None, None] + offsets / size
        weights = self.attention_weights(queries).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, levels[1:])
        out = multiscale_deformable_attention(value.permute(0, 3, 1, 2), shapes, locations, weights)
        return self.output_proj(out)


def layer_inputs() -> tuple[Tensor, ...]:
    return torch.randn(2, 9, 32), torch.rand(2, 9, 2), torch.randn(2, 42, 32), torch.rand(2, 42) < 0.2


MAPS = [torch.empty(6, 5), torch.empty(3, 4)]


@pytest.mark.usefixtures("unoptimized")
def test_a_value_that_is_yet_to_be_written_is_written_one_head_after_the_other():
    """Behind a mask, and even where it would be copied into another order."""
    layer, tensors = Layer(), layer_inputs()
    with torch.no_grad():
        compiled = compile_and_run(layer, *tensors, MAPS, config={"cpp_wrapper": True})
        assert_close(compiled.result, layer(*tensors, MAPS), FP32)
    (path,) = compiled.paths
    assert (path.kind, path.detail) == ("template", "fused")
    strides = re.search(r"\.pixel = \D*64_t>\((\d+)L\), \.head = \D*64_t>\((\d+)L\)", compiled.source)
    assert strides and strides.groups() == ("8", str(8 * 42))


@pytest.mark.usefixtures("unoptimized")
def test_a_layer_is_trained():
    layer, (*tensors, mask) = Layer(), layer_inputs()

    def train(layer: nn.Module, *tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = layer(*leaves, mask, MAPS)
        return [out, *torch.autograd.grad(out.square().sum(), [*leaves, *layer.parameters()])]

    compiled = compile_and_run(layer, *tensors, run=train, config={"cpp_wrapper": True})
    assert {(path.op, path.kind) for path in compiled.paths} == {
        (FORWARD.name, "template"), (BACKWARD.name, "template")
    }  # fmt: skip
    for actual, expected in zip(compiled.result, train(layer, *tensors)):
        assert_close(actual, expected, FP32)


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
def test_only_the_gradients_that_are_wanted():
    grad, *arguments, _ = Case().positional_backward
    subsets = [[True, False, False], [False, True, False], [False, False, True], [False, False, False]]
    compiled = compile_and_run(
        lambda: [BACKWARD(grad, *arguments, wanted) for wanted in subsets], config={"cpp_wrapper": True}
    )
    assert compiled.templates == 3
    together = BACKWARD(grad, *arguments, [True] * 3)
    for wanted, results in zip(subsets, compiled.result):
        for want, result, expected in zip(wanted, results, together):
            assert_close(result, expected if want else torch.empty(0), FP32)
