"""The direct convolution as one of the kernels that may compute a model's stock convolutions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor

from ...ops.registry import OPS, accumulate_dtype
from ..common.machine import multiplied_dtypes, vector_bits
from ..common.registry import has_template
from ..inductor.tables import config
from .convolution_kernels import Choice, Convolution, ConvolutionKernel, Work, rates_here

# As WINOGRAD_RATES. A call is a loop beside the others: a team of threads is woken, or not even that.
DENSE_RATES = {
    256: Work(calls=3e-6, multiplications=1 / 36e9, elements=0.07e-9, weights=0.25e-9, transformed=0.4e-9),
    512: Work(calls=3e-6, multiplications=1 / 133e9, elements=0.08e-9, weights=0.1e-9, transformed=0.25e-9),
}
DEPTHWISE_RATES = {
    256: Work(calls=3e-6, multiplications=1 / 30e9, elements=0.08e-9, weights=0.25e-9),
    512: Work(calls=3e-6, multiplications=1 / 106e9, elements=0.1e-9, weights=0.1e-9),
}

_FEW_CHANNELS = 8  # of these each number is copied by itself, of more as many at once


def direct_work(convolution: Convolution) -> Work:
    """What ``direct_conv2d`` does for a convolution; what it transforms are the rows that it copies."""
    c, taps = convolution, math.prod(convolution.kernel)
    pixels = c.batch * math.prod(c.size)
    multiplications = pixels * taps * c.channel_pairs
    elements = pixels * (c.channels * math.prod(c.stride) + c.out_channels)
    copied = 0.0
    if (c.groups == 1 and any(c.padding)) or c.dtype != accumulate_dtype(c.dtype):
        copied = pixels * c.kernel[0] * c.stride[1] * c.channels
        copied /= 1 if c.channels < _FEW_CHANNELS else _FEW_CHANNELS
    shared = multiplications / c.threads, elements / c.threads
    return Work(1, *shared, taps * c.channel_pairs, copied / c.threads)


@dataclasses.dataclass(frozen=True)
class DirectConvolution(ConvolutionKernel):
    """``direct_conv2d``, for weights that are constants: they are packed once."""

    def refusal(self, convolution: Convolution) -> str | None:
        c = convolution
        if len(c.kernel) != 2:
            return "it is not two-dimensional"
        if not c.dtype.is_floating_point:
            return f"it is of {c.dtype}"
        if c.transposed:
            return "it is transposed"
        if not c.constant:
            return "its weight is not a constant"
        if c.groups > 1 and not self.depthwise(c):
            return f"it has {c.groups} groups of more than a channel"
        if c.groups == 1 and c.kernel[1] > 1 and c.dilation[1] != 1:
            return "its kernel is dilated"
        if not all(isinstance(n, int) for n in c.padding):
            return "its padding changes from call to call"
        if c.device != "cpu":
            return f"it is on {c.device}, and the kernel is for the CPU"
        if c.dtype in multiplied_dtypes():
            return f"the processor multiplies {c.dtype} by itself, which oneDNN makes use of"
        if vector_bits() < 256:
            return f"vectors of {vector_bits()} bits were not measured, and oneDNN finds those of the processor itself"
        if config.cpu_backend != "cpp" or not has_template(OPS["direct_conv2d"]):
            return "direct_conv2d has no kernel here"
        return None

    @staticmethod
    def depthwise(convolution: Convolution) -> bool:
        """Whether each channel is convolved by itself, with one filter."""
        c = convolution
        return c.groups > 1 and c.groups == c.channels == c.out_channels

    def choices(self, convolution: Convolution) -> Sequence[Choice]:
        c = convolution
        rates = DEPTHWISE_RATES if self.depthwise(c) else DENSE_RATES
        geometry = list(c.stride), list(c.padding), list(c.dilation)

        def program(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return OPS["direct_conv2d"](input, weight, bias, *geometry)

        seconds = direct_work(c).seconds(rates_here(rates))
        return [Choice("direct_conv2d", program, seconds)]
