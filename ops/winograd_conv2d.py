"""Convolution with 3 x 3 kernels by Winograd's minimal filtering: Lavin and Gray, https://arxiv.org/abs/1509.09308."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .convolution import check_convolution, check_dtypes, check_gradient, empty_output
from .gradients import Gradient
from .registry import accumulate_dtype, check, define_op, is_proxy, not_scriptable, pair, record_call
from .transforms import as_one_batch

KERNEL = 3  # height and width of the kernels that are served


@not_scriptable
def winograd_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int | Sequence[int] | Literal["same", "valid"] = 1,
    tile: int = 4,
    groups: int = 1,
) -> Tensor:
    r"""Convolve with 3 x 3 kernels, stride 1 and dilation 1, by Winograd's algorithm F(m x m, 3 x 3), m = ``tile``.

    .. math::
        \text{out}[b, o, p, q] = \text{bias}[o] + \sum_{c, i, j} \text{weight}[o, c, i, j] \cdot
            \text{input}[b, c](p - \text{padding} + i, q - \text{padding} + j)

    The result is that of :func:`torch.nn.functional.conv2d`, up to rounding. Each tile of m x m pixels of the output is

    .. math:: A^T \Big[ \sum_c (G\, \text{weight}[o, c]\, G^T) \odot (B^T\, \text{input}[b, c, \text{tile}]\, B) \Big] A

    with (m + 2) x (m + 2) multiplications for each pair of channels, in place of 9 m x m: a quarter for m = 4. Pixels
    outside the image count as zero. Sums of numbers that nearly cancel cost accuracy: in float32 the largest error is
    about 3e-6 of the largest value. A NaN or an infinity makes all outputs that a direct convolution would make so NaN
    or infinite, and may do this to every output of the tiles that read it; it reaches no other.

    Args:
        input: ``[B, C, H, W]``, float32, float64, bfloat16 or float16; the low precisions are computed in float32.
        weight: ``[O, C // groups, 3, 3]``.
        bias: ``[O]``.
        padding: rows and columns of zeros at each side, one number or one for each of height and width; "same" is 1
            and "valid" is 0.
        tile: 4 for F(4 x 4, 3 x 3), or 2 for F(2 x 2, 3 x 3), which is slower and more accurate.
        groups: number of equal groups that input and output channels are split into, as in :class:`torch.nn.Conv2d`.

    Returns:
        ``[B, O, H + 2 * padding - 2, W + 2 * padding - 2]``, in the memory format of ``input``.

    Raises:
        ValueError: ``padding`` is another word than "same" and "valid".
        RuntimeError: shapes, dtypes or devices are not compatible, or there is no such tile. The message says what
            was expected.
    """
    if is_proxy(input, weight):
        return record_call(winograd_conv2d, **locals())
    if weight.dim() == 4 and input.dim() == 4:  # the operator's groups follow from the shapes
        channels, group_channels = int(input.shape[1]), int(weight.shape[1])
        check(
            "winograd_conv2d",
            groups > 0 and group_channels * groups == channels,
            f"weight.shape[1] must be input's channels / groups = {channels} / {groups}, got {group_channels}",
        )
    words = {"same": KERNEL // 2, "valid": 0}
    number: Any = words.get(padding, padding) if isinstance(padding, str) else padding
    return _op(input, weight, bias, pair("padding", number), tile)


class Arguments(NamedTuple):
    """What the operator takes, in its order."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    padding: Sequence[int]
    tile: int

    @property
    def groups(self) -> int:
        return int(self.input.shape[1]) // int(self.weight.shape[1])


def check_arguments(arguments: Arguments) -> tuple[int, int]:
    """Raise RuntimeError unless the arguments are compatible; return the output's height and width."""
    input, weight, bias, padding, tile = arguments
    require = functools.partial(check, "winograd_conv2d")

    for name, tensor in (("input", input), ("weight", weight)):
        require(tensor.dim() == 4, f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
    check_dtypes("winograd_conv2d", input, {"weight": weight, "bias": bias})
    require(
        tuple(weight.shape[2:]) == (KERNEL, KERNEL),
        f"weight must have kernels of {KERNEL} x {KERNEL}, got shape {tuple(weight.shape)}",
    )
    require(tile in ALGORITHMS, f"tile must be {' or '.join(map(str, ALGORITHMS))}, got {tile}")
    return check_convolution("winograd_conv2d", input, weight, bias, (1, 1), padding, (1, 1))


@dataclasses.dataclass(frozen=True)
class Algorithm:
    r"""Winograd's algorithm F(m, 3): m outputs of a filter of 3 taps, from m + 2 inputs and as many multiplications.

    A polynomial product is computed by the values of both factors at m + 1 points and at infinity (Toom-Cook); the
    filter is the transpose of that. With :math:`M(x) = \prod_i (x - p_i)` over the points,

    * row i of :math:`B^T` has the coefficients of :math:`M(x) / (x - p_i)`, and the last row those of :math:`M(x)`;
    * row i of :math:`G` is :math:`(1, p_i, p_i^2) / M'(p_i)`, and the last one is :math:`(0, 0, 1)`;
    * column i of :math:`A^T` is :math:`(1, p_i, \dots, p_i^{m-1})`, and the last one is :math:`(0, \dots, 0, 1)`.

    Any points give the same result but for rounding. Lavin and Gray have 0, 1, -1, 2, -2 for m = 4. Errors are least
    where powers and differences of the points are all near 1: :mod:`tests.ops.test_winograd_conv2d` compares. All
    entries of B and A are exact in float32.
    """

    points: tuple[float, ...]

    @property
    def input_transform(self) -> list[list[float]]:
        """:math:`B^T`."""
        rows = [[*_product([q for q in self.points if q != p]), 0.0] for p in self.points]
        return [*rows, _product(self.points)]

    @property
    def weight_transform(self) -> list[list[float]]:
        """:math:`G`."""
        rows = []
        for p in self.points:
            derivative = 1.0
            for q in self.points:
                derivative *= p - q if q != p else 1.0
            rows.append([p**i / derivative for i in range(KERNEL)])
        return [*rows, [0.0] * (KERNEL - 1) + [1.0]]

    @property
    def output_transform(self) -> list[list[float]]:
        """:math:`A^T`."""
        tile = len(self.points) - 1
        return [[*(p**i for p in self.points), float(i == tile - 1)] for i in range(tile)]


def _product(roots: Sequence[float]) -> list[float]:
    """The coefficients of the polynomial with these roots, that of the lowest power first."""
    coefficients = [1.0]
    for root in roots:
        coefficients = [high - root * low for high, low in zip([0.0, *coefficients], [*coefficients, 0.0])]
    return coefficients


# By tile. That 0 comes first and the others in pairs of opposite sign is known to lowering/cpp/winograd_conv2d.h.
ALGORITHMS = {2: Algorithm((0.0, 1.0, -1.0)), 4: Algorithm((0.0, 5 / 8, -5 / 8, 3 / 2, -3 / 2))}


def transform_weight(weight: Tensor, tile: int) -> Tensor:
    """U = G weight G^T for ``weight``, ``[O, Cg, 3, 3]``: ``[m + 2, m + 2, O, Cg]``."""
    transform = weight.new_tensor(ALGORITHMS[tile].weight_transform)  # [m + 2, 3]
    return torch.einsum("xi,yj,ocij->xyoc", transform, transform, weight)


def rotated(weight: Tensor, groups: int) -> Tensor:
    """The weight of the convolution that is the gradient of the input: ``[C, O // groups, 3, 3]``."""
    by_group = weight.flip(2, 3).unflatten(0, (groups, -1))  # [G, Og, Cg, 3, 3]
    return by_group.transpose(1, 2).flatten(0, 1)


def convolve(input: Tensor, transformed: Tensor, padding: Sequence[int], size: Sequence[int], tile: int) -> Tensor:
    """Convolve with a weight from :func:`transform_weight`.

    Args:
        padding: of height and width; it may be negative.
        size: height and width of the output.

    Returns:
        ``[B, O, *size]``.
    """
    algorithm, alpha = ALGORITHMS[tile], tile + KERNEL - 1
    rows, columns = ((n + tile - 1) // tile for n in size)  # of tiles
    groups = input.shape[1] // transformed.shape[3]
    below, right = (
        n * tile + KERNEL - 1 - length - before for n, length, before in zip((rows, columns), input.shape[2:], padding)
    )
    padded = F.pad(input, (padding[1], right, padding[0], below))
    tiles = padded.unfold(2, alpha, tile).unfold(3, alpha, tile)  # [B, C, rows, columns, m + 2, m + 2]

    input_transform = input.new_tensor(algorithm.input_transform)  # [m + 2, m + 2]
    output_transform = input.new_tensor(algorithm.output_transform)  # [m, m + 2]
    tiles = torch.einsum("xi,bcrsij->xbcrsj", input_transform, tiles)
    values = torch.einsum("yj,xbcrsj->xybcrs", input_transform, tiles)  # V = B^T tile B
    values = values.unflatten(3, (groups, -1))  # [m + 2, m + 2, B, G, Cg, rows, columns]
    weights = transformed.unflatten(2, (groups, -1))  # [m + 2, m + 2, G, Og, Cg]
    products = torch.einsum("xygoc,xybgcrs->xybgors", weights, values)
    products = torch.einsum("px,xybgors->pybgors", output_transform, products)
    out = torch.einsum("qy,pybgors->bgorpsq", output_transform, products)  # A^T products A
    return out.reshape(input.shape[0], transformed.shape[2], rows * tile, columns * tile)[:, :, : size[0], : size[1]]


def _fake(*args: Any) -> Tensor:
    arguments = Arguments(*args)
    return empty_output(arguments.input, arguments.weight.shape[0], check_arguments(arguments))


def add_bias(out: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """The convolution's result, with the dtype and memory format of the input, ``like``."""
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None, None]
    return out.to(like.dtype).contiguous(memory_format=suggest_memory_format(like))


def _decomposition(*args: Any) -> Tensor:
    input, weight, bias, padding, tile = arguments = Arguments(*args)
    size, dtype = check_arguments(arguments), accumulate_dtype(input.dtype)
    out = convolve(input.to(dtype), transform_weight(weight.to(dtype), tile), padding, size, tile)
    return add_bias(out, bias, input)


def _check_backward(op: str, grad: Tensor, **arguments: Any) -> None:
    call = Arguments(**arguments)
    check_gradient(op, grad, call.input, (call.input.shape[0], call.weight.shape[0], *check_arguments(call)))


def gradient_padding(padding: Sequence[int]) -> list[int]:
    """The padding of the convolution that is the gradient of the input; it may be negative."""
    return [KERNEL - 1 - n for n in padding]


def sums(grad: Tensor, call: Arguments, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of weight and bias, by aten: sums over all pixels, for which few tiles are no gain."""
    dtype = accumulate_dtype(call.input.dtype)
    _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad.to(dtype),
        call.input.to(dtype),
        call.weight.to(dtype),
        [call.weight.shape[0]],
        [1, 1],
        call.padding,
        [1, 1],
        False,
        [0, 0],
        call.groups,
        [False, *wanted],
    )
    return grad_weight, grad_bias


def _backward(grad: Tensor, *args: Any, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias."""
    call = Arguments(*args)
    grad_input = None
    if wanted[0]:
        dtype = accumulate_dtype(grad.dtype)
        transformed = transform_weight(rotated(call.weight.to(dtype), call.groups), call.tile)
        padding = gradient_padding(call.padding)
        grad_input = convolve(grad.to(dtype), transformed, padding, call.input.shape[2:], call.tile)
    grad_weight, grad_bias = sums(grad, call, wanted[1:]) if any(wanted[1:]) else (None, None)
    return grad_input, grad_weight, grad_bias


_op = define_op(
    "winograd_conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] padding, int tile) -> Tensor",
    decomposition=_decomposition,
    fake=_fake,
    gradient=Gradient(_backward, of="input, weight, bias", check=_check_backward),
    autocast="lower",  # as autocast runs a convolution
    fold=as_one_batch("input"),
)
