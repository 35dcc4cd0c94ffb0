"""The kernels that may compute a model's stock convolutions: which of them each can take, and how long it takes.

Times are estimated. Each is a sum of what is multiplied, moved and called, at rates that were chosen by measurements,
for each width of vectors; ``python -m inductor_vision.perf.convolution_costs`` measures and fits them on a machine.
They need not be right by themselves: they are compared with one another, for one convolution.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.registry import OPS, accumulate_dtype
from ..common.machine import multiplied_dtypes, vector_bits
from ..common.registry import has_template
from ..common.winograd import count_tiles, worth_their_memory
from ..inductor.tables import config


@dataclasses.dataclass(frozen=True)
class Convolution:
    """What is known of a stock convolution. Dynamic sizes are those that it is compiled with.

    Attributes:
        batch: a number of images that data decide about is 1.
        size: of the result, height and width.
        constant: whether the weight is known when it is compiled.
        threads: how many compute it.
    """

    batch: int
    channels: int
    out_channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...] = (3, 3)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    transposed: bool = False
    groups: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    constant: bool = True
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)

    @property
    def channel_pairs(self) -> int:
        return self.channels * self.out_channels // self.groups

    @property
    def weight_bytes(self) -> int:
        return math.prod(self.kernel) * self.channel_pairs * self.dtype.itemsize

    def __str__(self) -> str:
        kernel, channels = _by(self.kernel), f"{self.channels} to {self.out_channels} channels"
        return f"{kernel}, {channels}, map {_by(self.size)}"


def _by(numbers: Sequence[int]) -> str:
    return " x ".join(map(str, numbers))


# Takes input, weight and bias of a convolution.
Program = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to compute a convolution.

    Attributes:
        name: for reports.
        program: in the convolution's place.
        seconds: what it is estimated to take.
        growth: how many bytes more a constant weight takes.
    """

    name: str
    program: Program
    seconds: float
    growth: int = 0


class ConvolutionKernel(abc.ABC):
    """Takes some convolutions, in one way or in several. What is equal is the same to Inductor's caches."""

    @abc.abstractmethod
    def refusal(self, convolution: Convolution) -> str | None:
        """Why it cannot take a convolution; None if it can."""

    @abc.abstractmethod
    def choices(self, convolution: Convolution) -> Sequence[Choice]:
        """The ways in which it computes a convolution that it can take."""


class Work(NamedTuple):
    """What a kernel does for a convolution, or the seconds that one of each takes. What threads share is divided by
    their number.

    Attributes:
        calls: of the kernel.
        multiplications: with the addition behind each.
        elements: of input and output, or of their transforms.
        weights: elements of the weight as the kernel has it; each thread reads all of them.
        transformed: elements of the weight that are transformed in the call.
    """

    calls: float
    multiplications: float
    elements: float
    weights: float
    transformed: float = 0.0

    def seconds(self, rates: Work) -> float:
        return sum(amount * rate for amount, rate in zip(self, rates))


# By the width of vectors, in float32, chosen by measurements on EPYCs of families 25 (AVX2) and 26 (AVX-512).
# In a model weights come from memory, whatever a benchmark of one layer finds in caches, and calls are not Dynamo's.
LIBRARY_RATES = {
    256: Work(calls=25e-6, multiplications=1 / 36e9, elements=0.05e-9, weights=0.25e-9),
    512: Work(calls=25e-6, multiplications=1 / 133e9, elements=0.06e-9, weights=0.1e-9),
}
WINOGRAD_RATES = {
    256: Work(calls=5e-6, multiplications=1 / 32e9, elements=0.36e-9, weights=0.25e-9, transformed=0.75e-9),
    512: Work(calls=5e-6, multiplications=1 / 123e9, elements=0.15e-9, weights=0.1e-9, transformed=0.11e-9),
}


def rates_here(by_width: dict[int, Work]) -> Work:
    """Those for the vectors that code is generated for."""
    return by_width[512 if vector_bits() == 512 else 256]


def library_work(convolution: Convolution) -> Work:
    """What oneDNN does for a convolution."""
    c = convolution
    multiplications = c.batch * math.prod(c.size) * math.prod(c.kernel) * c.channel_pairs
    elements = c.batch * math.prod(c.size) * (c.channels * math.prod(c.stride) + c.out_channels)
    return Work(1, multiplications / c.threads, elements / c.threads, math.prod(c.kernel) * c.channel_pairs)


def library_seconds(convolution: Convolution) -> float:
    """What oneDNN's convolution, which Inductor calls, is estimated to take."""
    return library_work(convolution).seconds(rates_here(LIBRARY_RATES))


_LINE = 16  # channels of a group are padded to a multiple of these


def winograd_work(convolution: Convolution, tile: int) -> Work:
    """What ``winograd_conv2d`` does for a convolution."""
    c, points = convolution, (tile + 2) ** 2
    tiles = count_tiles(c.batch, c.size, tile)
    inputs, outputs = (math.ceil(n // c.groups / _LINE) * _LINE * c.groups for n in (c.channels, c.out_channels))
    weights = points * (c.channels // c.groups) * outputs
    elements = tiles * points * (inputs + outputs)
    transformed = 0 if c.constant else weights / c.threads
    return Work(1, tiles * weights / c.threads, elements / c.threads, weights, transformed)


@dataclasses.dataclass(frozen=True)
class Winograd(ConvolutionKernel):
    """``winograd_conv2d`` with this tile."""

    tile: int

    def refusal(self, convolution: Convolution) -> str | None:
        c = convolution
        if not c.dtype.is_floating_point:
            return f"it is of {c.dtype}"
        if c.transposed:
            return "it is transposed"
        if c.kernel != (3, 3):
            return f"its kernel is {_by(c.kernel)}, not 3 x 3"
        if c.stride != (1, 1):
            return f"its stride is {_by(c.stride)}, not 1"
        if c.dilation != (1, 1):
            return f"its dilation is {_by(c.dilation)}, not 1"
        if not all(isinstance(n, int) for n in c.padding):
            return "its padding changes from call to call"
        if min(c.padding) < 0:
            return f"its padding is {_by(c.padding)}"
        if c.device != "cpu":
            return f"it is on {c.device}, and the kernel is for the CPU"
        if c.dtype == torch.float64:
            return "it is of float64, for which results would differ by more than the precision is chosen for"
        if c.dtype in multiplied_dtypes():
            return f"the processor multiplies {c.dtype} by itself, which oneDNN makes use of"
        if config.cpu_backend != "cpp" or not has_template(OPS["winograd_conv2d"]):
            return "winograd_conv2d has no kernel here"
        return None

    def choices(self, convolution: Convolution) -> Sequence[Choice]:
        rates = rates_here(WINOGRAD_RATES)
        name, padding = f"winograd_conv2d(tile={self.tile})", list(convolution.padding)
        seconds = winograd_work(convolution, self.tile).seconds(rates)
        in_the_call = winograd_work(dataclasses.replace(convolution, constant=False), self.tile).seconds(rates)

        def program(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return OPS["winograd_conv2d"](input, weight, bias, padding, self.tile)

        def small_program(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            from ..common.constants import kept_small

            with kept_small():
                return program(input, weight, bias)

        if not convolution.constant:
            return [Choice(name, program, in_the_call)]
        small = Choice(f"{name}, its weight transformed in each call", small_program, in_the_call)
        if not worth_their_memory(count_tiles(convolution.batch, convolution.size, self.tile)):
            return [small]
        transformed = (self.tile + 2) ** 2 * convolution.channel_pairs * accumulate_dtype(convolution.dtype).itemsize
        growth = transformed - convolution.weight_bytes
        return [small, Choice(name, program, seconds, growth)]
