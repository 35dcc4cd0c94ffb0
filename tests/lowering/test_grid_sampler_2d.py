"""What grid_sampler_2d and its gradients compile to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Compiled, compile_and_run
from inductor_vision.tests.support.grid_sampler_2d import BACKWARD, MODES, OP, Case
from inductor_vision.tests.support.layouts import arrange
from torch import Tensor

pytestmark = pytest.mark.usefixtures("optimized")

ATEN = torch.ops.aten.grid_sampler_2d.default
ATEN_BACKWARD = torch.ops.aten.grid_sampler_2d_backward.default


# Every interpolation, every padding and both alignments of corners; then the other pairs of the former two. The program
# under cpp/ tests all combinations.
SOME_MODES = MODES[0], MODES[9], MODES[16]
OTHER_MODES = MODES[3], MODES[4], MODES[6], MODES[11], MODES[13], MODES[14]


def in_modes(all_modes: Sequence[Any], op: Any, *tensors: Tensor) -> list[Tensor]:
    return [op(*tensors, *modes) for modes in all_modes]


def backward_in_modes(all_modes: Sequence[Any], op: Any, *tensors: Tensor) -> list[Tensor]:
    return [gradient for modes in all_modes for gradient in op(*tensors, *modes, [True, True])]


def call(case: Case) -> tuple[Tensor, ...]:
    return case.grad(), case.input(), case.grid()


def compile_in(all_modes: Sequence[Any]) -> Compiled:
    """The operator and its gradients in these modes, for all sizes."""

    def function(grad: Tensor, input: Tensor, grid: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return in_modes(all_modes, OP, input, grid), backward_in_modes(all_modes, BACKWARD, grad, input, grid)

    first = call(Case(batch=3, channels=4))  # equal sizes, as that of a grid's last dimension, would have to stay so
    compiled = compile_and_run(function, *first, dynamic=True)
    assert compiled.kinds == ["template"] * 2 * len(all_modes)
    return compiled


def assert_values(compiled: Compiled, all_modes: Sequence[Any], case: Case) -> None:
    """What aten computes, NaN, infinite and huge coordinates included; of the latter gradients are not asked for."""
    grad, input, grid = call(case)
    with torch.compiler.set_stance("fail_on_recompile"):
        results, gradients = compiled.function(grad, input, grid)
    for result, stock, modes in zip(results, in_modes(all_modes, ATEN, input, grid), all_modes, strict=True):
        assert_close(result, stock, torch.float32, str(modes))
    if not case.hostile:
        stock_gradients = backward_in_modes(all_modes, ATEN_BACKWARD, grad, input, grid)
        for gradient, stock in zip(gradients, stock_gradients, strict=True):
            assert_close(gradient, stock, torch.float32)


def assert_bits_do_not_depend_on_threads(compiled: Compiled) -> None:
    tensors = call(Case(batch=3, channels=19, size=(45, 60), out=(20, 33)))
    results, gradients = compiled.function(*tensors)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again = compiled.function(*tensors)
        assert all(map(torch.equal, again[0], results)) and all(map(torch.equal, again[1], gradients))


@pytest.mark.usefixtures("unoptimized")
def test_all_sizes_and_numbers_of_threads():
    compiled = compile_in(SOME_MODES)
    sizes = st.integers(2, 24)

    @given(
        case=st.builds(
            Case,
            batch=st.integers(2, 3),
            channels=st.sampled_from([2, 3, 7, 8, 9, 17, 33]),
            size=st.tuples(sizes, sizes),
            out=st.tuples(sizes, sizes),
            hostile=st.booleans(),
        ),
    )
    def check(case: Case) -> None:
        assert_values(compiled, SOME_MODES, case)

    check()
    assert_bits_do_not_depend_on_threads(compiled)


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
def test_other_modes():
    compiled = compile_in(OTHER_MODES)
    for channels in (3, 19):
        for hostile in (False, True):
            assert_values(compiled, OTHER_MODES, Case(channels=channels, size=(13, 20), hostile=hostile))


@pytest.mark.usefixtures("unoptimized")
def test_every_layout_gives_the_same():
    case = Case(channels=19)
    layouts = ("contiguous", "channels_last", "sliced", "stepped", "transposed", "expanded")
    images = [arrange(case.input(), layout) for layout in layouts]
    images[-1] = images[-1].expand(2, -1, -1, -1)

    def function(grad: Tensor, grid: Tensor, *images: Tensor) -> list[tuple[Tensor, ...]]:
        calls = [(OP(image, grid, 0, 0, False), image) for image in images]
        return [(out, *BACKWARD(grad, image, grid, 0, 0, False, [True, True])) for out, image in calls]

    compiled = compile_and_run(function, case.grad(), case.grid(), *images, config={"cpp_wrapper": True})
    assert set(compiled.kinds) == {"template"}
    for image, (result, *gradients) in zip(images, compiled.result):
        assert result.is_contiguous()
        assert_close(result, ATEN(image, case.grid(), 0, 0, False), torch.float32)
        stock = ATEN_BACKWARD(case.grad(), image, case.grid(), 0, 0, False, [True, True])
        for gradient, right in zip(gradients, stock):
            assert_close(gradient, right, torch.float32)
    for result, *_ in compiled.result[1:-1]:
        assert torch.equal(result, compiled.result[0][0])


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float64, torch.float16))],
    ids=str,
)
def test_dtypes(dtype):
    """Against aten in float64: in a low precision its own coordinates are rounded."""
    cases = [Case(channels=channels, dtype=dtype, modes=MODES[0]) for channels in (3, 19)]
    cases += [Case(channels=9, dtype=dtype, modes=MODES[9]), Case(channels=2, dtype=dtype, modes=MODES[16])]

    def function(*tensors: Tensor) -> list[Tensor]:
        calls = zip(cases, tensors[::3], tensors[1::3], tensors[2::3])
        return [
            result
            for case, grad, input, grid in calls
            for result in (
                OP(input, grid, *case.modes),
                *BACKWARD(grad, input, grid, *case.modes, [True, True]),
            )
        ]

    tensors = [tensor for case in cases for tensor in call(case)]
    compiled = compile_and_run(function, *tensors, config={"cpp_wrapper": True})
    assert compiled.kinds == ["template"] * 2 * len(cases)
    for i, (case, results) in enumerate(zip(cases, zip(*[iter(compiled.result)] * 3))):
        grad, input, grid = (tensor.double() for tensor in tensors[3 * i : 3 * i + 3])
        right = ATEN(input, grid, *case.modes), *ATEN_BACKWARD(grad, input, grid, *case.modes, [True, True])
        for result, expected in zip(results, right):
            assert result.dtype == dtype
            assert_close(result, expected, dtype, str(case))


def test_neighbours_are_fused():
    """Pointwise ones into the store, which is channels_last before a convolution that is."""
    case = Case(batch=1, channels=16, size=(20, 24), out=(18, 20))
    weight = torch.randn(8, 16, 3, 3)

    def function(input: Tensor, grid: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        sampled = OP(input, grid, 0, 0, False)
        return (sampled + other).relu(), F.conv2d(OP(input, grid, 0, 1, False) * 2, weight)

    other = torch.randn(1, 16, 18, 20)
    with torch.no_grad():
        compiled = compile_and_run(function, case.input(), case.grid(), other, config={"cpp_wrapper": True})
        stock = [ATEN(case.input(), case.grid(), 0, padding, False) for padding in (0, 1)]
        assert_close(compiled.result[1], F.conv2d(stock[1] * 2, weight), torch.float32)
    assert (compiled.templates, compiled.fused) == (2, 2)
    assert "grid_sampler_2d<inductor_vision::GridInterpolation::bilinear, true>" in compiled.source
    assert_close(compiled.result[0], (stock[0] + other).relu(), torch.float32)
