"""Samples of deform_conv2d calls and an oracle, for the tests of what the operator means and of what it compiles to.

A :class:`Case` says what a call looks like; :func:`sample` makes its tensors, always the same ones. ``CASES`` are the
calls that every implementation is tested on, ``HOSTILE`` those whose offsets are NaN, infinite or huge.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import assume, strategies as st
from inductor_vision import DeformConv2d
from inductor_vision.tests.support import convolution
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.convolution import Pair, gradient_like as gradient_like  # for whoever makes samples
from inductor_vision.tests.support.layouts import LAYOUTS, arrange
from torch import Tensor, nn
from torch.nn.modules.utils import _pair


@dataclasses.dataclass(frozen=True)
class Case:
    """What a call looks like.

    Attributes:
        layout: memory layout of ``input``, one of ``LAYOUTS``.
        offset_layout: that of ``offset`` and ``mask``.
        weight_layout: ``"contiguous"``, ``"permuted"``, or ``"shared"``: one kernel, expanded to all channels.
        offsets: where taps land, one of ``OFFSETS``.
    """

    batch: int = 2
    channels: int = 8
    out_channels: int = 6
    size: tuple[int, int] = (7, 9)
    kernel: tuple[int, int] = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    mask: bool = True
    bias: bool = True
    layout: str = "contiguous"
    offset_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    offsets: str = "random"

    @property
    def out_size(self) -> tuple[int, int]:
        return convolution.out_size(self)


TENSORS = ("input", "offset", "weight", "bias", "mask")  # in the order of their gradients


class Sample(convolution.Sample):
    """One call: ``deform_conv2d(*args, **kwargs)``.

    Attributes:
        args: input, offset, weight, bias.
        kwargs: stride, padding, dilation, mask.
    """

    names = TENSORS

    @property
    def positional(self) -> tuple[Any, ...]:
        return (*self.args, *self.geometry, self.kwargs["mask"])


OFFSETS = ("random", "integers", "borders", "far", "smooth", "hostile")


def _undisplaced(case: Case, axis: int) -> Tensor:
    """The coordinate that each tap samples without an offset, for rows (axis 0) or columns: [kH, kW, Ho, Wo]."""
    stride, padding, dilation = (_pair(p)[axis] for p in (case.stride, case.padding, case.dilation))
    tap = torch.arange(case.kernel[axis], dtype=torch.float64) * dilation - padding
    pixel = torch.arange(case.out_size[axis], dtype=torch.float64) * stride
    coordinate = tap[:, None] + pixel
    return (coordinate[:, None, :, None] if axis == 0 else coordinate[None, :, None, :]).expand(
        *case.kernel, *case.out_size
    )


def _offsets(case: Case, generator: torch.Generator) -> Tensor:
    shape = (case.batch, case.offset_groups, *case.kernel, 2, *case.out_size)

    def pick(values: list[float], shape: tuple[int, ...] = shape) -> Tensor:
        chosen = torch.randint(len(values), shape, generator=generator)
        return torch.tensor(values, dtype=torch.float64)[chosen]

    if case.offsets == "integers":
        offset = torch.randint(-3, 4, shape, generator=generator).double()
    elif case.offsets == "borders":
        axes = []
        for axis, length in enumerate(case.size):
            inside = [0, 0.25, length - 1, length - 0.5]
            at_the_border = [-2, -1, -0.5, 2**-10 - 1, length - 2**-10, length, length + 1]
            land = pick(inside + at_the_border, shape[:4] + shape[5:])
            axes.append(land - _undisplaced(case, axis))
        offset = torch.stack(axes, dim=4)
    else:
        offset = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        if case.offsets == "smooth":  # no sample within 0.1 of a kink of the interpolation
            offset = offset.floor() + 0.1 + 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64)
        elif case.offsets == "far":
            offset = offset * pick([1, 1, 10, 1e4])
        elif case.offsets == "hostile":
            sizes = [1e30, 1e18, 2.0**31, 2.0**32, 2.0**33, 2.0**63, 2.0**64, math.inf]
            hostile = pick([math.nan, *sizes, *(-size for size in sizes)])
            offset = torch.where(torch.rand(shape, generator=generator) < 0.3, hostile, offset)
        elif case.offsets != "random":
            raise ValueError(f"no offsets {case.offsets!r}; there are: {', '.join(OFFSETS)}")
    return offset.flatten(1, 4)  # [B, 2 * G * K, Ho, Wo]


def sample(case: str | Case, dtype: torch.dtype = torch.float32) -> Sample:
    """The call that a case, or the case of that name, describes. The values depend on the case alone."""
    name = case if isinstance(case, str) else "drawn"
    if isinstance(case, str):
        case = CASES[case] if case in CASES else HOSTILE[case]
    generator = convolution.generator_of(case)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    taps = math.prod(case.kernel)
    group_channels = case.channels // case.groups
    input = normal(case.batch, case.channels, *case.size)
    offset = _offsets(case, generator)
    mask = torch.sigmoid(2 * normal(case.batch, case.offset_groups * taps, *case.out_size))
    weight = normal(case.out_channels, group_channels, *case.kernel) / math.sqrt(group_channels * taps)
    bias = normal(case.out_channels)
    args = (
        arrange(input.to(dtype), case.layout),
        arrange(offset.to(dtype), case.offset_layout),
        convolution.arrange_weight(weight.to(dtype), case.weight_layout),
        bias.to(dtype) if case.bias else None,
    )
    kwargs = {
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "mask": arrange(mask.to(dtype), case.offset_layout) if case.mask else None,
    }
    return Sample(name, case, args, kwargs)


def as_torchvision(s: Sample) -> list[Any]:
    """The arguments of torch.ops.torchvision.deform_conv2d that its Python wrapper makes of a call."""
    input, offset, weight, bias = s.args
    mask = s.kwargs["mask"]
    geometry = [number for pair in s.positional[4:7] for number in pair]
    groups = input.shape[1] // weight.shape[1]
    offset_groups = offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])
    return [
        input,
        weight,
        offset,
        input.new_zeros(input.shape[0], 1) if mask is None else mask,
        input.new_zeros(weight.shape[0]) if bias is None else bias,
        *geometry,
        groups,
        offset_groups,
        mask is not None,
    ]


def samples(dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
    """The samples of all ``CASES``."""
    return (sample(name, dtype) for name in CASES)


def _depthwise(channels: int, **changes: Any) -> Case:
    return Case(channels=channels, out_channels=channels, groups=channels, **changes)


CASES = {
    "mask_bias": Case(),
    "mask": Case(bias=False),
    "bias": Case(mask=False),
    "neither": Case(mask=False, bias=False),
    "numbers": Case(stride=2, padding=2, dilation=2),
    "stride": Case(stride=(2, 1)),
    "stride_3x4": Case(stride=(3, 4), padding=(2, 0), mask=False),
    "no_padding": Case(padding=(0, 0)),
    "padding": Case(padding=(0, 3)),
    "dilation": Case(dilation=(3, 2), padding=(2, 3)),
    "stride_padding_dilation": Case(stride=(1, 2), padding=(3, 1), dilation=(2, 1)),
    "kernel_1x1": Case(kernel=(1, 1), padding=0),
    "kernel_5x5": Case(kernel=(5, 5), padding=2),
    "kernel_3x2": Case(kernel=(3, 2), padding=(1, 0)),
    "kernel_1x4": Case(kernel=(1, 4), padding=(0, 2), mask=False),
    "channels_1_to_5": Case(channels=1, out_channels=5),
    "channels_3": Case(channels=3, out_channels=16),
    "channels_3_to_1": Case(channels=3, out_channels=1),
    "channels_37": Case(channels=37, out_channels=19),
    "channels_64": Case(channels=64, out_channels=40, size=(5, 6)),
    "channels_520": Case(channels=520, out_channels=5, size=(4, 3), kernel=(2, 2), padding=(0, 1)),
    "out_channels_130": Case(channels=4, out_channels=130, size=(4, 5)),
    "groups_2": Case(channels=12, out_channels=10, groups=2),
    "groups_8": Case(channels=24, out_channels=16, groups=8),
    "groups_of_one_output": Case(channels=20, out_channels=4, groups=4),
    "groups_of_two_channels": Case(channels=30, out_channels=45, groups=15),
    "groups_of_150_channels": Case(channels=600, out_channels=8, groups=4, size=(3, 4), kernel=(1, 2), padding=0),
    "depthwise": _depthwise(16),
    "depthwise_1": _depthwise(1),
    "depthwise_37": _depthwise(37),
    "depthwise_520": _depthwise(520, size=(3, 4)),
    "depthwise_multiplier": Case(channels=6, out_channels=18, groups=6),
    "shared": _depthwise(24, weight_layout="shared"),
    "shared_37": _depthwise(37, weight_layout="shared", mask=False, bias=False),
    "shared_channels_last": _depthwise(40, weight_layout="shared", layout="channels_last"),
    "offset_groups_2": Case(offset_groups=2),
    "offset_groups_4": Case(channels=20, offset_groups=4),
    "offset_groups_of_37": Case(channels=74, offset_groups=2, mask=False),
    "offset_groups_inside_groups": Case(channels=16, groups=2, offset_groups=4),
    "groups_inside_offset_groups": Case(channels=32, out_channels=24, groups=8, offset_groups=2),
    "groups_across_offset_groups": Case(channels=24, groups=3, offset_groups=2),
    "offset_groups_across_groups": Case(channels=24, groups=2, offset_groups=3),
    "offset_groups_of_130": Case(channels=520, offset_groups=4, size=(3, 3), kernel=(2, 1), padding=(1, 0)),
    "depthwise_offset_groups": _depthwise(36, offset_groups=4),
    "depthwise_every_channel_its_offsets": _depthwise(6, offset_groups=6),
    "shared_offset_groups": _depthwise(20, weight_layout="shared", offset_groups=2),
    "multiplier_offset_groups": Case(channels=6, out_channels=12, groups=6, offset_groups=3),
    "empty_batch": Case(batch=0),
    "empty_batch_depthwise": _depthwise(8, batch=0),
    "batch_1": Case(batch=1),
    "batch_5": Case(batch=5, size=(3, 4)),
    "one_output_pixel": Case(size=(3, 3), padding=0),
    "one_input_pixel": Case(size=(1, 1)),
    "one_row": Case(size=(1, 23)),
    "one_column": Case(size=(23, 1)),
    "wide": Case(batch=1, channels=5, size=(3, 67)),
    "tall": Case(batch=1, channels=5, size=(67, 3)),
    "depthwise_wide": _depthwise(5, batch=1, size=(5, 67)),
    "integers": Case(offsets="integers"),
    "borders": Case(offsets="borders"),
    "borders_depthwise": _depthwise(16, offsets="borders"),
    "borders_one_pixel": Case(size=(1, 1), offsets="borders"),
    "borders_strided": Case(offsets="borders", stride=(2, 3), dilation=(2, 1)),
    "far": Case(offsets="far"),
    **{f"input_{layout}": Case(layout=layout) for layout in LAYOUTS[1:]},
    **{f"depthwise_{layout}": _depthwise(18, layout=layout) for layout in LAYOUTS[1:]},
    **{f"offset_{layout}": Case(offset_layout=layout) for layout in LAYOUTS[1:]},
    # As many pixels as a vector has lanes, and the last lies where it would lie if all were neighbours.
    "offset_transposed_4x4": Case(size=(4, 4), offset_layout="transposed"),
    "offset_transposed_4x2": Case(size=(4, 2), offset_layout="transposed"),
    "offset_images_in_rows_2x2": Case(size=(2, 2), offset_layout="images_in_rows"),
    "all_channels_last": Case(channels=37, layout="channels_last", offset_layout="channels_last"),
    "groups_channels_last": Case(channels=24, out_channels=16, groups=8, layout="channels_last"),
    "weight_permuted": Case(weight_layout="permuted"),
    "depthwise_weight_permuted": _depthwise(18, weight_layout="permuted"),
}

HOSTILE = {
    "hostile": Case(offsets="hostile"),
    "hostile_no_mask": Case(offsets="hostile", mask=False, stride=(2, 1), padding=(2, 1)),
    "hostile_channels_last": Case(channels=37, offsets="hostile", layout="channels_last"),
    "hostile_depthwise": _depthwise(20, offsets="hostile"),
    "hostile_shared": _depthwise(20, offsets="hostile", weight_layout="shared"),
    "hostile_offset_groups": Case(channels=16, groups=2, offset_groups=4, offsets="hostile"),
    "hostile_one_pixel": Case(size=(1, 1), offsets="hostile"),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small case, valid by construction but for kernels that do not fit."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    groups = draw(st.sampled_from([1, 1, 2, 3, 4, 8]))
    offset_groups = draw(st.sampled_from([1, 1, 2, 3, 4]))
    channels = math.lcm(groups, offset_groups) * draw(st.integers(1, 5))
    group_outputs = draw(st.integers(1, 5))
    weight_layouts = ["contiguous", "permuted"]
    if draw(st.booleans()):
        groups, group_outputs = channels, draw(st.sampled_from([1, 1, 2]))
        weight_layouts.append("shared")
    case = Case(
        batch=draw(st.integers(0, 3)),
        channels=channels,
        out_channels=groups * group_outputs,
        size=pair(1, 8),
        kernel=pair(1, 4),
        stride=pair(1, 3),
        padding=pair(0, 3),
        dilation=pair(1, 3),
        groups=groups,
        offset_groups=offset_groups,
        mask=draw(st.booleans()),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        offset_layout=draw(st.sampled_from(LAYOUTS)),
        weight_layout=draw(st.sampled_from(weight_layouts)),
        offsets=draw(st.sampled_from(["random", "integers", "borders", "far"])),
    )
    assume(min(case.out_size) > 0)
    return case


@np.errstate(invalid="ignore")  # 0 * inf, in samples that have it
def oracle(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """deform_conv2d in float64 as the papers put it, one sample of one output pixel at a time."""
    x, displacement, filters = (t.detach().double().numpy() for t in (input, offset, weight))
    modulation = None if mask is None else mask.detach().double().numpy()
    images, channels, height, width = x.shape
    out_channels, group_channels, kernel_height, kernel_width = filters.shape
    groups = channels // group_channels
    group_outputs = out_channels // groups
    taps = kernel_height * kernel_width
    offset_groups = displacement.shape[1] // (2 * taps)
    per_offset_group = channels // offset_groups
    out_height, out_width = displacement.shape[2:]
    (stride_y, stride_x), (padding_y, padding_x), (dilation_y, dilation_x) = map(_pair, (stride, padding, dilation))

    out = np.zeros((images, out_channels, out_height, out_width))
    for b, p, q in np.ndindex(images, out_height, out_width):
        sampled = np.zeros((channels, kernel_height, kernel_width))
        for g, i, j in np.ndindex(offset_groups, kernel_height, kernel_width):
            tap = (g * kernel_height + i) * kernel_width + j
            row = p * stride_y - padding_y + i * dilation_y + displacement[b, 2 * tap, p, q]
            column = q * stride_x - padding_x + j * dilation_x + displacement[b, 2 * tap + 1, p, q]
            of_group = slice(g * per_offset_group, (g + 1) * per_offset_group)
            value = np.zeros(per_offset_group)
            if -1 < row < height and -1 < column < width:
                for r in (math.floor(row), math.floor(row) + 1):
                    for c in (math.floor(column), math.floor(column) + 1):
                        if 0 <= r < height and 0 <= c < width:
                            value += (1 - abs(row - r)) * (1 - abs(column - c)) * x[b, of_group, r, c]
            if modulation is not None:
                value = value * modulation[b, tap, p, q]
            sampled[of_group, i, j] = value
        for o in range(out_channels):
            first = o // group_outputs * group_channels
            out[b, o, p, q] = (filters[o] * sampled[first : first + group_channels]).sum()
    if bias is not None:
        out += bias.detach().double().numpy()[:, None, None]
    return torch.from_numpy(out)


class TwoConvolutions(nn.Module):
    """A dense convolution with neighbours, and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = DeformConv2d(16, 16, 3, padding=1)
        self.depthwise = DeformConv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.dense(x, offset, mask).relu() + x, self.depthwise(x, offset, mask)

    def reference(self, x: Tensor, offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        dense, depthwise = (
            oracle(x, offset, conv.weight, conv.bias, padding=1, mask=mask) for conv in (self.dense, self.depthwise)
        )
        return dense.relu() + x.double(), depthwise

    def assert_right(self, results: Sequence[Tensor], call: Sequence[Tensor]) -> None:
        for result, expected in zip(results, self.reference(*call)):
            assert_close(result, expected, torch.float32, f"{tuple(call[0].shape)}")

    @staticmethod
    def call(batch: int, *size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Its arguments."""
        s = sample(Case(batch=batch, channels=16, out_channels=16, size=size))
        return s.args[0], s.args[1], s.kwargs["mask"]
