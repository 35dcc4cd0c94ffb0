"""Samples of patch_conv2d calls and oracles, for the tests of what the operator means and of what it compiles to.

A :class:`Case` says what a call looks like; :func:`sample` makes its tensors, always the same ones. ``CASES`` are the
calls that every implementation is tested on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from hypothesis import assume, strategies as st
from inductor_vision.tests.support import convolution
from inductor_vision.tests.support.convolution import Pair, gradient_like as gradient_like  # for whoever makes samples
from torch import Tensor
from torch.nn.modules.utils import _pair

# The order of [B, N, C, H, W] in memory, slowest dimension first.
_ORDERS = {
    "patches_first": (0, 1, 2, 3, 4),
    "channels_first": (0, 2, 1, 3, 4),
    "channels_last": (0, 1, 3, 4, 2),
    "transposed": (0, 1, 2, 4, 3),
    "patches_last": (0, 2, 3, 4, 1),
    "images_inside": (1, 0, 2, 3, 4),
}
LAYOUTS = (*_ORDERS, *(f"sliced_{order}" for order in _ORDERS), "stepped", "expanded")


def arrange(values: Tensor, layout: str) -> Tensor:
    """A tensor of these [B, N, C, H, W] values in a memory layout ("expanded": of the first patch's values).

    In the gaps of the sliced and stepped ones there is NaN.
    """
    if layout == "expanded":
        return values[:, :1].contiguous().expand(values.shape)
    sizes = list(values.shape)
    if layout == "stepped":
        view = values.new_full([*sizes[:4], 2 * sizes[4]], math.nan)[..., ::2]
        return view.copy_(values)
    order = _ORDERS[layout.removeprefix("sliced_")]
    gaps = (0, 2, 3, 1, 4) if layout.startswith("sliced_") else (0, 0, 0, 0, 0)
    room = values.new_full([sizes[d] + gaps[d] for d in order], math.nan).permute(*(order.index(d) for d in range(5)))
    view = room[tuple(slice(gap // 2, gap // 2 + size) for gap, size in zip(gaps, sizes))]
    return view.copy_(values)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a call looks like.

    Attributes:
        batch: None: the input is [N, C, H, W].
        layout: memory layout of ``input``, one of ``LAYOUTS``.
        weight_layout: ``"contiguous"``, ``"permuted"``, or ``"shared"``: one filter, expanded to all outputs.
    """

    batch: int | None = 2
    patches: int = 5
    channels: int = 5
    out_channels: int = 6
    size: tuple[int, int] = (4, 5)
    kernel: tuple[int, int] = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = True
    layout: str = "patches_first"
    weight_layout: str = "contiguous"

    @property
    def out_size(self) -> tuple[int, int]:
        return convolution.out_size(self)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the operator's result, which always has a batch."""
        return (1 if self.batch is None else self.batch, self.patches, self.out_channels, *self.out_size)


TENSORS = ("input", "weight", "bias")  # in the order of their gradients


class Sample(convolution.Sample):
    """One call: ``patch_conv2d(*args, **kwargs)``.

    Attributes:
        args: the tensors, in the order of ``TENSORS``.
        kwargs: stride, padding, dilation, groups.
    """

    names = TENSORS

    @property
    def positional(self) -> tuple[Any, ...]:
        """With a batch."""
        input, *others = self.args
        return (input.unsqueeze(0) if self.case.batch is None else input, *others, *self.geometry)


def sample(case: str | Case, dtype: torch.dtype = torch.float32) -> Sample:
    """The call that a case, or the case of that name, describes. The values depend on the case alone."""
    name = case if isinstance(case, str) else "drawn"
    if isinstance(case, str):
        case = CASES[case]
    normal = convolution.normal_of(case, dtype)
    group_channels = case.channels // case.groups
    input = arrange(normal(*case.out_shape[:2], case.channels, *case.size), case.layout)
    weight = normal(case.out_channels, group_channels, *case.kernel)
    weight = weight / math.sqrt(group_channels * math.prod(case.kernel))
    weight = convolution.arrange_weight(weight, case.weight_layout)
    bias = normal(case.out_channels)
    args = (input.squeeze(0) if case.batch is None else input, weight, bias if case.bias else None)
    kwargs = {name: getattr(case, name) for name in ("stride", "padding", "dilation", "groups")}
    return Sample(name, case, args, kwargs)


CASES = {
    "plain": Case(),
    "no_bias": Case(bias=False),
    "numbers": Case(size=(6, 5), stride=2, padding=2, dilation=2),
    "stride": Case(stride=(2, 1)),
    "stride_3x4": Case(size=(7, 9), stride=(3, 4), padding=(2, 0)),
    "stride_beyond_the_kernel": Case(size=(7, 9), kernel=(1, 2), stride=(3, 4), padding=0),
    "no_padding": Case(padding=(0, 0)),
    "padding": Case(padding=(0, 3)),
    "padding_beyond_the_kernel": Case(padding=(5, 4)),  # some pixels meet nothing but padding
    "padding_beyond_the_kernel_strided": Case(padding=(8, 7), stride=(3, 2), dilation=(1, 2)),
    "dilation": Case(dilation=(3, 2), padding=(3, 2)),
    "dilation_beyond_the_patch": Case(size=(3, 4), dilation=5, padding=5),
    "stride_padding_dilation": Case(stride=(1, 2), padding=(3, 1), dilation=(2, 1)),
    "kernel_1x1": Case(kernel=(1, 1), padding=0),
    "kernel_1x1_padded": Case(kernel=(1, 1), padding=1),
    "kernel_2x2": Case(kernel=(2, 2), padding=(0, 1)),
    "kernel_5x5": Case(kernel=(5, 5), padding=2),
    "kernel_3x2": Case(kernel=(3, 2), padding=(1, 0)),
    "kernel_1x4": Case(kernel=(1, 4), padding=(0, 2)),
    "kernel_4x1": Case(kernel=(4, 1), padding=(2, 0), stride=(2, 1)),
    "kernel_beyond_the_patch": Case(size=(2, 3), kernel=(5, 5), padding=2),
    "channels_1_to_1": Case(channels=1, out_channels=1),
    "channels_1_to_37": Case(channels=1, out_channels=37),
    "channels_3_to_17": Case(channels=3, out_channels=17),
    "channels_17_to_3": Case(channels=17, out_channels=3),
    "channels_37_to_19": Case(channels=37, out_channels=19),
    "channels_64_to_40": Case(channels=64, out_channels=40, size=(3, 4)),
    "channels_3_to_130": Case(channels=3, out_channels=130, size=(3, 2)),
    "channels_700": Case(batch=1, channels=700, out_channels=17, size=(8, 8)),
    "groups_2": Case(channels=6, out_channels=10, groups=2),
    "groups_4_of_16": Case(channels=20, out_channels=64, groups=4),
    "groups_3_of_17": Case(channels=9, out_channels=51, groups=3, layout="channels_last"),
    "groups_of_one_channel": Case(channels=3, out_channels=48, groups=3),
    "groups_of_one_output": Case(channels=20, out_channels=4, groups=4),
    "depthwise": Case(channels=19, out_channels=19, groups=19),
    "depthwise_multiplier": Case(channels=6, out_channels=18, groups=6),
    "empty_batch": Case(batch=0),
    "no_patches": Case(patches=0),
    "no_patches_channels_last": Case(patches=0, layout="channels_last"),
    "no_patches_unbatched": Case(batch=None, patches=0),
    **{f"patches_{n}": Case(batch=1, patches=n) for n in (1, 6, 7, 13)},
    "batch_3_of_7": Case(batch=3, patches=7, layout="channels_first"),
    "batch_7_of_1": Case(batch=7, patches=1),
    "patch_1x1": Case(size=(1, 1)),
    "patch_1x7": Case(size=(1, 7)),
    "patch_7x1": Case(size=(7, 1)),
    "patch_4x4": Case(size=(4, 4)),
    "patch_8x8": Case(size=(8, 8), layout="channels_last"),
    "patch_17x13": Case(batch=1, patches=7, channels=3, size=(17, 13)),
    "one_output_pixel": Case(size=(3, 3), padding=0),
    **{f"input_{layout}": Case(layout=layout) for layout in LAYOUTS[1:]},
    "channels_first_strided": Case(channels=17, stride=2, layout="channels_first"),
    "channels_last_strided": Case(channels=17, stride=2, layout="channels_last"),
    "channels_1_channels_last": Case(channels=1, layout="channels_last"),
    **{f"unbatched_{layout}": Case(batch=None, patches=7, layout=layout) for layout in list(_ORDERS)[:3]},
    "weight_permuted": Case(weight_layout="permuted"),
    "weight_shared": Case(weight_layout="shared"),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small case, valid by construction but for kernels that do not fit."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    groups = draw(st.sampled_from([1, 1, 2, 3, 4]))
    case = Case(
        batch=draw(st.sampled_from([None, 0, 1, 2, 3])),
        patches=draw(st.integers(0, 7)),
        channels=groups * draw(st.integers(1, 5)),
        out_channels=groups * draw(st.integers(1, 5)),
        size=pair(1, 7),
        kernel=pair(1, 4),
        stride=pair(1, 3),
        padding=pair(0, 6),
        dilation=pair(1, 3),
        groups=groups,
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        weight_layout=draw(st.sampled_from(["contiguous", "permuted", "shared"])),
    )
    assume(min(case.out_size) > 0)
    return case


def _terms(case: Case) -> Iterator[tuple[slice, slice, int, int, int, int, int, int]]:
    """For each group, output pixel and tap that meets a pixel of the patch: the group's outputs and inputs, the output
    pixel, the pixel of the patch, the tap."""
    group_channels, group_outputs = case.channels // case.groups, case.out_channels // case.groups
    (stride_y, stride_x), (padding_y, padding_x), (dilation_y, dilation_x) = map(
        _pair, (case.stride, case.padding, case.dilation)
    )
    for g, p, q, i, j in np.ndindex(case.groups, *case.out_size, *case.kernel):
        row, column = p * stride_y - padding_y + i * dilation_y, q * stride_x - padding_x + j * dilation_x
        if 0 <= row < case.size[0] and 0 <= column < case.size[1]:
            outputs = slice(g * group_outputs, (g + 1) * group_outputs)
            inputs = slice(g * group_channels, (g + 1) * group_channels)
            yield outputs, inputs, p, q, row, column, i, j


@np.errstate(invalid="ignore")  # inf - inf and 0 * inf, in samples that have them
def oracle(s: Sample) -> Tensor:
    """The call in float64, one term of the sum at a time, for all patches; what falls on the padding is not visited."""
    x, filters = convolution.numbers(s.positional[0]), convolution.numbers(s.args[1])
    out = np.zeros(s.case.out_shape)
    if s.args[2] is not None:
        out += convolution.numbers(s.args[2])[:, None, None]
    for outputs, inputs, p, q, row, column, i, j in _terms(s.case):
        out[:, :, outputs, p, q] += np.einsum("bnc,oc->bno", x[:, :, inputs, row, column], filters[outputs, :, i, j])
    result = torch.from_numpy(out)
    return result.squeeze(0) if s.case.batch is None else result


@np.errstate(invalid="ignore")
def gradient_oracle(s: Sample, grad: Tensor) -> dict[str, Tensor]:
    """The gradient of each tensor of the call in float64, likewise; ``grad`` has the operator's shape."""
    x, filters, g = convolution.numbers(s.positional[0]), convolution.numbers(s.args[1]), convolution.numbers(grad)
    grad_input, grad_weight = np.zeros(x.shape), np.zeros(filters.shape)
    for outputs, inputs, p, q, row, column, i, j in _terms(s.case):
        of_pixel = g[:, :, outputs, p, q]
        grad_input[:, :, inputs, row, column] += np.einsum("bno,oc->bnc", of_pixel, filters[outputs, :, i, j])
        grad_weight[outputs, :, i, j] += np.einsum("bno,bnc->oc", of_pixel, x[:, :, inputs, row, column])
    gradients = {
        "input": torch.from_numpy(grad_input).reshape(s.args[0].shape),
        "weight": torch.from_numpy(grad_weight),
        "bias": torch.from_numpy(g.sum((0, 1, 3, 4))),
    }
    return {name: gradients[name] for name in s.tensors}
