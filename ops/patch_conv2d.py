"""Convolution of many small patches, each padded with zeros at its own border."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import check_convolution, check_dtypes, check_gradient
from .gradients import Gradient
from .registry import (
    accumulate_dtype,
    check,
    define_op,
    is_proxy,
    not_scriptable,
    pair,
    record_call,
)
from .transforms import as_one_batch


@not_scriptable
def patch_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Convolve many small patches, such as windows of an image or regions of interest, with one filter bank.

    .. math::
        \text{out}[b, n, o, p, q] = \text{bias}[o] + \sum_{c, i, j} \text{weight}[o, c, i, j] \cdot
            \text{input}[b, n, c](p \cdot \text{stride} - \text{padding} + i \cdot \text{dilation}, \dots)

    Pixels outside a patch count as zero: patches do not see each other. The result is that of
    :func:`torch.nn.functional.conv2d` on ``input.flatten(0, 1)``. Compiled code skips the products with the padding,
    which are 31 % of all for patches of 4 x 4 and a 3 x 3 kernel.

    Args:
        input: ``[B, N, C, H, W]``, N patches of each of B images, or ``[N, C, H, W]``; float32, float64, bfloat16 or
            float16, of which the last two are computed in float32. It may lie in memory as ``[B, N, C, H, W]``,
            ``[B, C, N, H, W]`` or ``[B, N, H, W, C]``; it is copied in none of these cases.
        weight: ``[O, C // groups, kH, kW]``.
        bias: ``[O]``.
        stride, padding, dilation: one number, or one for each of height and width.
        groups: number of equal groups that input and output channels are split into, as in
            :class:`torch.nn.Conv2d`.

    Returns:
        ``[B, N, O, Ho, Wo]`` (or ``[N, O, Ho, Wo]``), with the dimensions in the same order in memory as in ``input``;
        :math:`H_o = \lfloor (H + 2\,\text{padding} - \text{dilation}\,(kH - 1) - 1) / \text{stride} \rfloor + 1`.

    Raises:
        ValueError: ``padding`` is a string.
        RuntimeError: shapes, dtypes or devices are not compatible. The message says what was expected.
    """
    if is_proxy(input, weight):
        return record_call(patch_conv2d, **locals())
    if weight.dim() == 4 and input.dim() >= 4:  # the operator's groups follow from the shapes
        channels, group_channels = int(input.shape[-3]), int(weight.shape[1])
        if groups <= 0 or group_channels * groups != channels:
            raise RuntimeError(
                "patch_conv2d: weight.shape[1] must be input's channels / groups = "
                f"{channels} / {groups}, got {group_channels}"
            )
    unbatched = input.dim() == 4
    geometry = pair("stride", stride), pair("padding", padding), pair("dilation", dilation)
    out = _op(input.unsqueeze(0) if unbatched else input, weight, bias, *geometry)
    return out.squeeze(0) if unbatched else out


@not_scriptable
class PatchConv2d(nn.Conv2d):
    """Module with the weight and bias of :func:`patch_conv2d`, for inputs ``[B, N, C, H, W]`` or ``[N, C, H, W]``.

    It takes the arguments of :class:`torch.nn.Conv2d`, has the same parameters, and loads the state of one.

    Raises:
        ValueError: ``padding_mode`` is not ``"zeros"``, or ``padding`` is a string.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {padding_mode!r}")
        super().__init__(
            in_channels,
            out_channels,
            pair("kernel_size", kernel_size),
            pair("stride", stride),
            pair("padding", padding),
            pair("dilation", dilation),
            groups,
            bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Call :func:`patch_conv2d`, which describes the arguments."""
        geometry = self.stride, self.padding, self.dilation
        # To mypy nn.Conv2d's padding may be a word, which __init__ refuses.
        return patch_conv2d(input, self.weight, self.bias, *geometry, self.groups)  # type: ignore[arg-type]


class Arguments(NamedTuple):
    """What the operator takes, in its order."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    @property
    def groups(self) -> int:
        return int(self.input.shape[2]) // int(self.weight.shape[1])


# The dimensions of patches in the order in which they are in memory, slowest first.
PATCHES_FIRST, CHANNELS_FIRST, CHANNELS_LAST = (0, 1, 2, 3, 4), (0, 2, 1, 3, 4), (0, 1, 3, 4, 2)


def memory_order(patches: Tensor) -> tuple[int, ...]:
    """The order that is nearest to that of ``[B, N, C, H, W]`` patches in memory; it says how results are to lie."""
    from torch.fx.experimental.symbolic_shapes import (
        guard_or_false,
    )  # not above: it imports sympy, which takes its time

    _, by_patch, by_channel, _, by_column = patches.stride()
    if guard_or_false(by_channel == 1) and guard_or_false(by_column > 1):
        return CHANNELS_LAST
    return CHANNELS_FIRST if guard_or_false(by_channel > by_patch) else PATCHES_FIRST


def arranged(patches: Tensor, order: Sequence[int]) -> Tensor:
    """The patches, made dense and in this order in memory."""
    return patches.permute(*order).contiguous().permute(*_inverse(order))


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(d) for d in range(5)]


def empty_patches(input: Tensor, channels: int, size: Sequence[int], order: Sequence[int] | None = None) -> Tensor:
    """Patches of so many channels and this size, as many as ``input`` has and in memory in its order or another."""
    order = order or memory_order(input)
    shape = [*input.shape[:2], channels, *size]
    return input.new_empty([shape[d] for d in order]).permute(*_inverse(order))


def check_arguments(arguments: Arguments) -> tuple[int, int]:
    """Raise RuntimeError unless the arguments are compatible; return the output's height and width."""
    input, weight, bias, stride, padding, dilation = arguments
    require = functools.partial(check, "patch_conv2d")

    require(input.dim() == 5, f"input must have 5 dimensions, or 4 without a batch, got shape {tuple(input.shape)}")
    require(weight.dim() == 4, f"weight must have 4 dimensions, got shape {tuple(weight.shape)}")
    check_dtypes("patch_conv2d", input, {"weight": weight, "bias": bias})
    return check_convolution("patch_conv2d", input, weight, bias, stride, padding, dilation)


def _fake(*args: Any) -> Tensor:
    arguments = Arguments(*args)
    return empty_patches(arguments.input, int(arguments.weight.shape[0]), check_arguments(arguments))


def _decomposition(*args: Any) -> Tensor:
    input, weight, bias, stride, padding, dilation = arguments = Arguments(*args)
    out_size, dtype = check_arguments(arguments), accumulate_dtype(input.dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    # [B * N, O, Ho, Wo]
    out = F.conv2d(input.to(dtype).flatten(0, 1), weight, bias, stride, padding, dilation, arguments.groups)
    out = out.reshape(*input.shape[:2], weight.shape[0], *out_size)  # [B, N, O, Ho, Wo]
    return arranged(out.to(input.dtype), memory_order(input))


def _check_backward(op: str, grad: Tensor, **arguments: Any) -> None:
    call = Arguments(**arguments)
    shape = (*call.input.shape[:2], int(call.weight.shape[0]), *check_arguments(call))
    check_gradient(op, grad, call.input, shape)


def _backward(grad: Tensor, *args: Any, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias."""
    input, weight, _bias, stride, padding, dilation = arguments = Arguments(*args)
    if not any(wanted):
        return None, None, None
    dtype = accumulate_dtype(input.dtype)
    return torch.ops.aten.convolution_backward(
        grad.to(dtype).flatten(0, 1),
        input.to(dtype).flatten(0, 1),
        weight.to(dtype),
        [weight.shape[0]],
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        arguments.groups,
        wanted,
    )


def _arrange_gradient(gradient: Tensor, tensor: Tensor) -> Tensor:
    return arranged(gradient, memory_order(tensor)) if tensor.dim() == 5 else gradient.contiguous()


_op = define_op(
    "patch_conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation) "
    "-> Tensor",
    decomposition=_decomposition,
    fake=_fake,
    gradient=Gradient(_backward, of="input, weight, bias", check=_check_backward, arrange=_arrange_gradient),
    autocast="lower",  # as autocast runs a convolution
    fold=as_one_batch("input"),
)
