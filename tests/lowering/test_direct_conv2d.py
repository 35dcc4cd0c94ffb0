"""What direct_conv2d compiles to: its values, its bits, what fuses into it, and how weights are packed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from inductor_vision.ops.registry import OPS
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Compiled, compile_and_run
from inductor_vision.tests.support.convolution import normal_of
from inductor_vision.tests.support.layouts import arrange, strides_of
from torch import Tensor
from torch._inductor import config

pytestmark = pytest.mark.usefixtures("optimized")

direct_conv2d = OPS["direct_conv2d"]
FP32, BF16 = torch.float32, torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """What a call looks like; of ``channels`` alone each has a filter of its own."""

    channels: int
    out_channels: int | None = None
    size: tuple[int, int] = (7, 9)
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    batch: int = 2
    bias: bool = True
    layout: str = "channels_last"
    dtype: torch.dtype = FP32

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        normal = normal_of(self, self.dtype)
        inputs = 1 if self.out_channels is None else self.channels
        outputs = self.out_channels or self.channels
        image = normal(self.batch, self.channels, *self.size)
        weight = normal(outputs, inputs, *self.kernel) / (inputs * self.kernel[0] * self.kernel[1]) ** 0.5
        return arrange(image, self.layout), weight.to(self.dtype), normal(outputs) if self.bias else None

    @property
    def geometry(self) -> list[list[int]]:
        return [[n, n] for n in (self.stride, self.padding, self.dilation)]


# Each memory format, dtype and kind is a kernel to compile: few of them.
CASES = [
    Case(16, 40),
    Case(37, 19, (1, 1), batch=1),
    Case(8, 33, (9, 8), stride=2, bias=False),
    Case(3, 20, (17, 15), (3, 3), 2, 1, layout="contiguous"),
    Case(17, 16, (6, 31), (3, 3), 1, 1),
    Case(37, size=(9, 6), kernel=(3, 3), stride=2, padding=1),
    Case(70, size=(5, 30), kernel=(5, 5), padding=2, bias=False),
    Case(20, size=(8, 7), kernel=(3, 3), padding=2, dilation=2),
    Case(20, size=(8, 7), kernel=(3, 3), padding=1, layout="contiguous"),
    Case(5, 6, batch=0),
    Case(19, 34, dtype=BF16),
    Case(19, kernel=(3, 3), padding=1, dtype=BF16),
]


def run(arguments: list[tuple[Any, ...]]) -> list[Tensor]:
    return [F.hardswish(direct_conv2d(*call)) for call in arguments]


def expected(case: Case, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    doubles = [None if tensor is None else tensor.double() for tensor in (image, weight, bias)]
    groups = case.channels if case.out_channels is None else 1
    if case.batch == 0:
        return F.hardswish(F.conv2d(*doubles, case.stride, case.padding, case.dilation, groups))
    out = F.conv2d(*doubles, case.stride, case.padding, case.dilation, groups)
    return F.hardswish(out)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    arguments = [(*case.tensors(), *case.geometry) for case in CASES]
    with torch.no_grad():
        return compile_and_run(run, arguments, config={"cpp_wrapper": True})


def test_all_are_templates_with_what_follows(compiled):
    assert compiled.kinds == ["template"] * len(CASES)
    assert compiled.templates == compiled.fused == len([case for case in CASES if case.batch > 0])


@pytest.mark.parametrize("i", range(len(CASES)))
def test_values(compiled, i):
    case, result = CASES[i], compiled.result[i]
    image, *weights = case.tensors()
    assert_close(result, expected(case, image, *weights), case.dtype, str(case))
    assert result.dtype == case.dtype
    assert strides_of(result) == strides_of(direct_conv2d(image, *weights, *case.geometry))


def test_bits_on_any_number_of_threads(compiled):
    """Of work that is shared, too: the largest maps of the cases are too small for that."""
    case = Case(24, 72, (33, 29), (3, 3), 1, 1)
    arguments = [(*case.tensors(), *case.geometry)]
    results, before = [], torch.get_num_threads()
    with torch.no_grad():
        function = compile_and_run(run, arguments).function
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(function(arguments)[0])
        finally:
            torch.set_num_threads(before)
    assert_close(results[0], expected(case, *case.tensors()), FP32)
    assert all(torch.equal(results[0], other) for other in results)


@functools.cache
def dynamic(kind: str) -> Any:
    case = {"dense": Case(9, 21, (8, 8), (3, 2), 2, 1), "depthwise": Case(21, None, (8, 8), (3, 5), 1, 2)}[kind]
    with torch.no_grad():
        return case, compile_and_run(run, [(*case.tensors(), *case.geometry)], dynamic=True).function


@pytest.mark.parametrize("kind", ["dense", "depthwise"])
@given(batch=st.integers(1, 4), size=st.tuples(st.integers(3, 40), st.integers(3, 70)), data=st.data())
@settings(max_examples=15)
def test_any_size(kind, batch, size, data):
    case, function = dynamic(kind)
    case = dataclasses.replace(case, batch=batch, size=size)
    with torch.no_grad():
        (result,) = function([(*case.tensors(), *case.geometry)])
    assert_close(result, expected(case, *case.tensors()), FP32, str(case))


@pytest.mark.slow
@pytest.mark.parametrize("simdlen", [256, 1])
def test_narrow_or_no_vectors(simdlen):
    cases = [CASES[0], CASES[3], CASES[5], CASES[10]]
    with config.patch({"cpp.simdlen": simdlen}), torch.no_grad():
        compiled = compile_and_run(run, [(*case.tensors(), *case.geometry) for case in cases])
    assert compiled.kinds == ["template"] * len(cases)
    for case, result in zip(cases, compiled.result):
        assert_close(result, expected(case, *case.tensors()), case.dtype, str(case))


REFUSED = {
    "groups": ((9, 2, 3, 3), [[1, 1], [1, 1], [1, 1]], "groups are served only where each is one channel"),
    "multiplier": ((12, 1, 3, 3), [[1, 1], [1, 1], [1, 1]], "groups are served only where each is one channel"),
    "dilation": ((4, 6, 3, 3), [[1, 1], [2, 2], [2, 2]], "kernels of dense convolutions must not be dilated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    shape, geometry, reason = REFUSED[name]
    image, weight = torch.randn(2, 6, 7, 9), torch.randn(shape)
    with torch.no_grad():
        compiled = compile_and_run(direct_conv2d, image, weight, None, *geometry)
    assert [path.kind for path in compiled.paths] == ["decomposition"] and reason in compiled.paths[0].detail
    groups = 6 // shape[1]
    assert_close(compiled.result, F.conv2d(image, weight, None, *geometry, groups), FP32)


def test_errors():
    image, weight = torch.randn(2, 6, 7, 9), torch.randn(4, 6, 3, 3)
    with pytest.raises(RuntimeError, match=r"direct_conv2d: weight must have 4 dimensions"):
        direct_conv2d(image, weight[0], None, [1, 1], [0, 0], [1, 1])
    with pytest.raises(RuntimeError, match=r"direct_conv2d: the kernel does not fit"):
        direct_conv2d(image[:, :, :2], weight, None, [1, 1], [0, 0], [1, 1])
    torch.library.opcheck(direct_conv2d.overload, (image, weight, None, [2, 1], [1, 1], [1, 1]))
