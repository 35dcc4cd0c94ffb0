"""Memory formats as Inductor sees them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from ..inductor.codegen import V, ir
from .sizes import depends_on_data

_RESHAPING = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)
# What freezing makes of convolutions, which is always channels_last, and what passes put there, which is faster so.
_CONVOLUTIONS = (
    "mkldnn._convolution",
    *(f"inductor_vision.{name}_conv2d" for name in ("winograd", "direct", "inverted_residual")),
)


def channels_last_strides(strides: Sequence[Any], size: Sequence[Any]) -> bool:
    """Whether the channels of a pixel are neighbours, and columns are not."""
    same = V.graph.sizevars.statically_known_equals
    return same(strides[1], 1) and not (same(strides[3], 1) and not same(size[3], 1))


def feeds_channels_last_convolution(node: torch.fx.Node) -> bool:
    """Whether the result of ``node`` reaches, directly or through other operators, a convolution that Inductor runs
    channels_last."""

    def is_one(user: torch.fx.Node) -> bool:
        if user.target is torch.ops.aten.convolution.default:
            return V.graph.layout_opt and not depends_on_data(user.meta["val"].shape[0])
        return str(user.target).startswith(_CONVOLUTIONS)

    seen, pending = set(), [node]
    while pending:
        for user in pending.pop().users:
            if is_one(user):
                return True
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def first_result(node: torch.fx.Node) -> torch.Tensor:
    """The result of ``node`` as a fake tensor; of several, the first."""
    result = node.meta["val"]
    return result[0] if isinstance(result, (tuple, list)) else result


def is_flattened(node: torch.fx.Node) -> bool:
    """Whether the result of ``node`` is reshaped at once, and its channels are no dimension then: for a linear layer,
    which has the values of a channel follow each other.

    Where other operators come first Inductor brings what they give into the order of eager mode.
    """
    size = first_result(node).shape

    def flattens(user: torch.fx.Node) -> bool:
        if user.target in (operator.getitem, torch.ops.aten.clone.default):
            return is_flattened(user)
        if _takes_pixels(user):
            return False
        shape = user.meta["val"].shape if user.target in _RESHAPING else size
        return len(shape) < 2 or not V.graph.sizevars.statically_known_equals(shape[1], size[1])

    return bool(node.users) and all(map(flattens, node.users))


def _takes_pixels(user: torch.fx.Node) -> bool:
    """Whether an operator brings channels to the end, as ``passes/flattened.py`` does it for a linear layer."""
    return user.target is torch.ops.aten.permute.default and user.args[1] == [0, 2, 3, 1]


def writes_channels_last(node: torch.fx.Node) -> bool:
    """Whether the result of ``node`` is best written channels_last: it is so in eager mode, or Inductor runs a
    convolution behind it channels_last, or it is read pixel by pixel. Not where it is flattened, which would be a copy
    of it."""
    if is_flattened(node):
        return False
    result = first_result(node)
    return (
        channels_last_strides(result.stride(), result.shape)
        or feeds_channels_last_convolution(node)
        or (bool(node.users) and all(map(_takes_pixels, node.users)))
    )


def layout_is_free(x: ir.TensorBox) -> bool:
    """Whether it is yet to be decided in which order x is written."""
    box = x.data
    if not isinstance(box, ir.StorageBox):
        return False
    return not isinstance(box.data, ir.Buffer) or isinstance(box.data.get_layout(), ir.FlexibleLayout)


def is_unwritten(x: ir.TensorBox) -> bool:
    """Whether x, or what it is a view of, is yet to be computed: into whatever order costs nothing."""
    node = x.data
    while isinstance(node, ir.BaseView):
        node = node.data
    return isinstance(node, ir.StorageBox) and not isinstance(node.data, ir.Buffer)


def realize_image(x: ir.TensorBox) -> ir.IRNode:
    """``x``, ``[B, C, H, W]``, realized with neighbouring channels or neighbouring columns.

    Where its layout is still free it becomes channels_last, which costs its producer nothing.
    """
    realize = ir.ExternKernel.realize_input
    if layout_is_free(x):
        return realize(ir.ExternKernel.require_channels_last(x))
    image = realize(x)
    strides = image.get_layout().stride
    if channels_last_strides(strides, image.get_size()) or V.graph.sizevars.statically_known_equals(strides[3], 1):
        return image
    return realize(ir.ExternKernel.require_contiguous(image))


def image_and_format(input: ir.TensorBox, node: torch.fx.Node) -> tuple[ir.IRNode, bool]:
    """The input, realized, and whether to write channels_last.

    If the input is channels_last by others' choice, so is the result: nothing is transposed in a network that Inductor
    lays out so.
    """
    chosen = not layout_is_free(input)
    image = realize_image(input)
    by_others = chosen and channels_last_strides(image.get_layout().stride, image.get_size())
    return image, by_others or writes_channels_last(node)
