"""Samples of winograd_conv2d calls and oracles, for the tests of what the operator means and of what it compiles to.

A :class:`Case` says what a call looks like; :func:`sample` makes its tensors, always the same ones. ``CASES`` are the
calls that every implementation is tested on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from hypothesis import assume, strategies as st
from inductor_vision.tests.support import convolution
from inductor_vision.tests.support.convolution import Pair, gradient_like as gradient_like  # for whoever makes samples
from inductor_vision.tests.support.layouts import LAYOUTS, arrange
from torch import Tensor
from torch.nn.modules.utils import _pair


@dataclasses.dataclass(frozen=True)
class Case:
    """What a call looks like.

    Attributes:
        layout: memory layout of ``input``, one of ``LAYOUTS``.
        weight_layout: ``"contiguous"``, ``"permuted"``, or ``"shared"``: one filter, expanded to all outputs.
    """

    kernel: ClassVar[tuple[int, int]] = (3, 3)
    stride: ClassVar[int] = 1
    dilation: ClassVar[int] = 1

    batch: int = 2
    channels: int = 5
    out_channels: int = 6
    size: tuple[int, int] = (7, 9)
    padding: Pair = (1, 1)
    tile: int = 4
    groups: int = 1
    bias: bool = True
    layout: str = "contiguous"
    weight_layout: str = "contiguous"

    @property
    def out_size(self) -> tuple[int, int]:
        return convolution.out_size(self)

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.out_channels, *self.out_size)


TENSORS = ("input", "weight", "bias")  # in the order of their gradients


class Sample(convolution.Sample):
    """One call: ``winograd_conv2d(*args, **kwargs)``.

    Attributes:
        args: the tensors, in the order of ``TENSORS``.
        kwargs: padding, tile, groups.
    """

    names = TENSORS

    @property
    def positional(self) -> tuple[Any, ...]:
        return (*self.args, list(_pair(self.kwargs["padding"])), self.kwargs["tile"])


def sample(case: str | Case, dtype: torch.dtype = torch.float32) -> Sample:
    """The call that a case, or the case of that name, describes. The values depend on the case alone."""
    name = case if isinstance(case, str) else "drawn"
    if isinstance(case, str):
        case = CASES[case]
    normal = convolution.normal_of(case, dtype)
    group_channels = case.channels // case.groups
    input = arrange(normal(case.batch, case.channels, *case.size), case.layout)
    weight = normal(case.out_channels, group_channels, *case.kernel) / math.sqrt(9 * group_channels)
    weight = convolution.arrange_weight(weight, case.weight_layout)
    bias = normal(case.out_channels)
    args = (input, weight, bias if case.bias else None)
    return Sample(name, case, args, {name: getattr(case, name) for name in ("padding", "tile", "groups")})


CASES = {
    "plain": Case(),
    "no_bias": Case(bias=False),
    "tile_2": Case(tile=2),
    "no_padding": Case(padding=0),
    "paddings": Case(padding=(0, 2)),
    "padding_beyond_the_kernel": Case(padding=(5, 4)),  # some pixels meet nothing but padding
    "padding_beyond_the_kernel_tile_2": Case(padding=(3, 7), tile=2),
    "channels_1_to_1": Case(channels=1, out_channels=1),
    "channels_3_to_17": Case(channels=3, out_channels=17),
    "channels_37_to_19": Case(channels=37, out_channels=19),
    "channels_64_to_40": Case(channels=64, out_channels=40, layout="channels_last"),
    "channels_300_to_130": Case(batch=1, channels=300, out_channels=130, size=(9, 6)),
    "groups_2": Case(channels=6, out_channels=10, groups=2),
    "groups_3_of_17": Case(channels=51, out_channels=51, groups=3, layout="channels_last", tile=2),
    "depthwise": Case(channels=19, out_channels=19, groups=19),
    "empty_batch": Case(batch=0),
    "batch_7": Case(batch=7, size=(4, 5)),
    "image_1x1": Case(size=(1, 1)),
    "image_1x40": Case(size=(1, 40)),
    "image_40x1": Case(size=(40, 1), tile=2),
    "image_4x4": Case(size=(4, 4)),
    "image_5x80": Case(batch=1, size=(5, 80), layout="channels_last"),
    "one_output_pixel": Case(size=(3, 3), padding=0),
    "many_tiles": Case(batch=1, channels=16, out_channels=18, size=(37, 66)),
    "many_tiles_channels_last": Case(batch=3, channels=17, out_channels=18, size=(37, 23), layout="channels_last"),
    **{f"input_{layout}": Case(layout=layout) for layout in LAYOUTS[1:]},
    "weight_permuted": Case(weight_layout="permuted"),
    "weight_shared": Case(weight_layout="shared"),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small case, valid by construction but for kernels that do not fit."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    case = Case(
        batch=draw(st.integers(0, 3)),
        channels=groups * draw(st.integers(1, 5)),
        out_channels=groups * draw(st.integers(1, 5)),
        size=(draw(st.integers(1, 14)), draw(st.integers(1, 14))),
        padding=(draw(st.integers(0, 5)), draw(st.integers(0, 5))),
        tile=draw(st.sampled_from([2, 4])),
        groups=groups,
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        weight_layout=draw(st.sampled_from(["contiguous", "permuted", "shared"])),
    )
    assume(min(case.out_size) > 0)
    return case


def _terms(case: Case) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], slice, int, int]]:
    """For each group and tap: the part of the output that the tap reaches from the image, the part of the image that it
    reads for that, the group's outputs, the tap."""
    group_channels, group_outputs = case.channels // case.groups, case.out_channels // case.groups
    for g, i, j in np.ndindex(case.groups, *case.kernel):
        outputs = slice(g * group_outputs, (g + 1) * group_outputs)
        to = [slice(None), outputs]
        source = [slice(None), slice(g * group_channels, (g + 1) * group_channels)]
        for tap, padding, size, out_size in zip((i, j), _pair(case.padding), case.size, case.out_size):
            first = max(0, padding - tap)
            end = max(first, min(out_size, size + padding - tap))
            to.append(slice(first, end))
            source.append(slice(first - padding + tap, end - padding + tap))
        yield tuple(to), tuple(source), outputs, i, j


@np.errstate(invalid="ignore")  # inf - inf, in samples that have them
def oracle(s: Sample) -> Tensor:
    """The call in float64, directly, one tap at a time; what falls on the padding is not visited."""
    x, filters = convolution.numbers(s.args[0]), convolution.numbers(s.args[1])
    out = np.zeros(s.case.out_shape)
    if s.args[2] is not None:
        out += convolution.numbers(s.args[2])[:, None, None]
    for to, source, outputs, i, j in _terms(s.case):
        out[to] += np.einsum("bcyx,oc->boyx", x[source], filters[outputs, :, i, j])
    return torch.from_numpy(out)


def gradient_oracle(s: Sample, grad: Tensor) -> dict[str, Tensor]:
    """The gradient of each tensor of the call in float64, likewise."""
    x, filters, g = convolution.numbers(s.args[0]), convolution.numbers(s.args[1]), convolution.numbers(grad)
    grad_input, grad_weight = np.zeros(x.shape), np.zeros(filters.shape)
    for to, source, outputs, i, j in _terms(s.case):
        grad_input[source] += np.einsum("boyx,oc->bcyx", g[to], filters[outputs, :, i, j])
        grad_weight[outputs, :, i, j] += np.einsum("boyx,bcyx->oc", g[to], x[source])
    gradients = {
        "input": torch.from_numpy(grad_input),
        "weight": torch.from_numpy(grad_weight),
        "bias": torch.from_numpy(g.sum((0, 2, 3))),
    }
    return {name: gradients[name] for name in s.tensors}


def spoilt(s: Sample) -> tuple[Tensor, Tensor]:
    """Outputs, ``[B, Ho, Wo]``, that a NaN or an infinity in the input must make NaN or infinite, as a direct
    convolution does, and those of the tiles that read it, which it may; of a call with one group."""
    bad = ~s.args[0].isfinite().all(1)
    must, may = (torch.zeros(s.case.batch, *s.case.out_size, dtype=torch.bool) for _ in range(2))
    padding, tile = _pair(s.case.padding), s.case.tile
    for b, y, x in bad.nonzero().tolist():
        ranges = []
        for place, before, size in zip((y, x), padding, s.case.out_size):
            last = place + before  # an output reads three pixels from its own place on
            direct = range(max(0, last - 2), min(size, last + 1))
            first_tile, last_tile = max(0, (last - tile - 1 + tile - 1) // tile), last // tile
            ranges.append((direct, range(first_tile * tile, min(size, (last_tile + 1) * tile))))
        for marked, which in ((must, 0), (may, 1)):
            rows, columns = (pair[which] for pair in ranges)
            marked[b, rows.start : max(rows.start, rows.stop), columns.start : max(columns.start, columns.stop)] = True
    return must, may
