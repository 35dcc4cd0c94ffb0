"""What inverted_residual_conv2d compiles to: its values, its bits, what fuses into it."""

from __future__ import annotations

import dataclasses
import functools
import re
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

inverted_residual_conv2d = OPS["inverted_residual_conv2d"]
FP32, BF16 = torch.float32, torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """What a call looks like; it has as many channels behind as before, for a sum."""

    channels: int
    expanded: int
    size: tuple[int, int] = (7, 9)
    kernel: tuple[int, int] = (3, 3)
    padding: tuple[int, int] = (1, 1)
    dilation: int = 1
    multiplier: int = 1
    batch: int = 2
    stride: tuple[int, int] = (1, 1)
    bias: bool = True
    activations: tuple[str, str] = ("relu6", "hardswish")
    layout: str = "channels_last"
    dtype: torch.dtype = FP32

    def arguments(self) -> tuple[Any, ...]:
        normal = normal_of(self, self.dtype)
        hidden = self.expanded * self.multiplier
        image = arrange(normal(self.batch, self.channels, *self.size), self.layout)
        weights = normal(self.expanded, self.channels, 1, 1), normal(hidden, 1, *self.kernel)
        last = (normal(self.channels, hidden, 1, 1) / hidden**0.5).to(self.dtype)
        biases = [normal(n) if self.bias else None for n in (self.expanded, hidden, self.channels)]
        geometry = list(self.stride), list(self.padding), [self.dilation] * 2
        return image, *weights, last, *biases, *geometry, *self.activations


# Each memory format, dtype and pair of activations is a kernel to compile: few of them.
CASES = [
    Case(8, 40),
    Case(37, 19, batch=1, bias=False),
    Case(5, 300, (4, 5), (5, 5), (2, 2)),
    Case(6, 7, (11, 3), (3, 1), (2, 0), dilation=2, multiplier=2),
    Case(6, 20, (6, 31), layout="contiguous", activations=("leaky_relu(0.2)", "leaky_relu(0.3)")),
    Case(9, 33, (13, 10), stride=(2, 2)),
    Case(3, 16, batch=0),
    Case(19, 34, dtype=BF16),
]


def run(arguments: list[tuple[Any, ...]]) -> list[Tensor]:
    """With the sum that the block has where sizes are the same."""
    outs = [inverted_residual_conv2d(*call) for call in arguments]
    return [out + call[0] if out.shape == call[0].shape else out.relu() for out, call in zip(outs, arguments)]


FUNCTIONS = {
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "leaky_relu(0.2)": functools.partial(F.leaky_relu, negative_slope=0.2),
    "leaky_relu(0.3)": functools.partial(F.leaky_relu, negative_slope=0.3),
}


def expected(*call: Any) -> Tensor:
    """Three convolutions of torch, in float64."""
    tensors = [None if tensor is None else tensor.double() for tensor in call[:7]]
    image, expansion, depthwise, last, *biases = tensors
    stride, padding, dilation, *activations = call[7:]
    first, second = (FUNCTIONS[name] for name in activations)
    hidden = first(F.conv2d(image, expansion, biases[0]))
    hidden = second(F.conv2d(hidden, depthwise, biases[1], stride, padding, dilation, hidden.shape[1]))
    out = F.conv2d(hidden, last, biases[2])
    return out + image if out.shape == image.shape else out.relu()


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    with torch.no_grad():
        return compile_and_run(run, [case.arguments() for case in CASES], config={"cpp_wrapper": True})


def test_all_are_templates_with_what_follows(compiled):
    assert compiled.kinds == ["template"] * len(CASES)
    assert compiled.templates == compiled.fused == len([case for case in CASES if case.batch > 0])


@pytest.mark.parametrize("i", range(len(CASES)))
def test_values(compiled, i):
    case, result = CASES[i], compiled.result[i]
    call = case.arguments()
    assert_close(result, expected(*call), case.dtype, str(case))
    assert result.dtype == case.dtype
    assert strides_of(result) == strides_of(inverted_residual_conv2d(*call))


def test_bits_on_any_number_of_threads(compiled):
    """Rows are shared, of all images together."""
    call = Case(24, 72, (33, 29), batch=2).arguments()
    results, before = [], torch.get_num_threads()
    with torch.no_grad():
        function = compile_and_run(run, [call]).function
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(function([call])[0])
        finally:
            torch.set_num_threads(before)
    assert_close(results[0], expected(*call), FP32)
    assert all(torch.equal(results[0], other) for other in results)


@functools.cache
def dynamic() -> tuple[Case, Any]:
    case = Case(9, 21, (8, 8), (3, 5), (1, 2))
    with torch.no_grad():
        return case, compile_and_run(run, [case.arguments()], dynamic=True).function


@given(batch=st.integers(1, 4), size=st.tuples(st.integers(3, 40), st.integers(5, 70)))
@settings(max_examples=15)
def test_any_size(batch, size):
    case, function = dynamic()
    call = dataclasses.replace(case, batch=batch, size=size).arguments()
    with torch.no_grad():
        (result,) = function([call])
    assert_close(result, expected(*call), FP32, f"{batch} of {size}")


@pytest.mark.slow
@pytest.mark.parametrize("simdlen", [256, 1])
def test_narrow_or_no_vectors(simdlen):
    calls = [CASES[i].arguments() for i in (0, 3, 4, 6)]
    with config.patch({"cpp.simdlen": simdlen}), torch.no_grad():
        compiled = compile_and_run(run, calls)
    assert compiled.kinds == ["template"] * len(calls)
    for call, result in zip(calls, compiled.result):
        assert_close(result, expected(*call), result.dtype)


WRONG = {
    "expansion_weight must have shape": {1: torch.randn(12, 5, 1, 1)},
    "expansion_bias must have shape": {4: torch.randn(11)},
    "expansion_weight must have input's dtype": {1: torch.randn(12, 6, 1, 1).double()},
    "expansion_activation must be": {10: "prelu"},
    "depthwise_weight.shape\\[0\\] must be a multiple of input's 12 channels": {2: torch.randn(13, 1, 3, 3)},
    "the kernel does not fit": {8: [0, 0], 9: [9, 9]},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    call = list(Case(6, 12).arguments())
    for i, argument in WRONG[message].items():
        call[i] = argument
    with pytest.raises(RuntimeError, match=f"inverted_residual_conv2d: {message}"):
        inverted_residual_conv2d(*call)


def test_operator():
    torch.library.opcheck(inverted_residual_conv2d.overload, Case(6, 12).arguments())


def test_a_map_between_two_of_them_is_channels_last():
    """Of a contiguous image: the second reads its rows in place, and gives the result in the image's format."""
    call = Case(6, 12, layout="contiguous").arguments()
    with torch.no_grad():
        compiled = compile_and_run(lambda x: run([(run([(x, *call[1:])])[0], *call[1:])])[0], call[0])
    formats = re.findall(r"inductor_vision::depthwise_separable_conv2d<(\w+)>", compiled.source)
    assert formats == ["true", "false"]
    assert compiled.result.is_contiguous()
    first = expected(*call)
    assert_close(compiled.result, expected(first, *call[1:]), FP32)
