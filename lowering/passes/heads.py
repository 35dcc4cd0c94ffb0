"""A graph pass that has small convolutions of one map computed as one.

Detectors have two heads on each map: scores and boxes, 3 and 12 channels, or 4 and 1. Each reads all of the map, and
computes vectors of channels that are mostly padding. With their constant weights one behind the other

    conv(x, w1), conv(x, w2) = conv(x, cat(w1, w2)).split(channels, dim=1)

it is read once. It runs on graphs of aten operators in which weights are constants: under freezing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from ...paths import record_path
from ..common.graph_pass import GraphPass, call
from ..inductor.tables import config
from .constants import constants_of
from .names import layer_of

OP = "convolution"

_aten = torch.ops.aten
_FEW_CHANNELS = 16  # those of a vector of AVX-512; where vectors are shorter, reading the map once is what is gained


class JoinHeads(GraphPass):
    """Joins convolutions that differ in nothing but their few filters."""

    def __call__(self, graph: Graph) -> None:
        if not config.freezing or torch.is_grad_enabled():
            return  # weights are not constants
        try:
            constants = constants_of(graph)
            heads: dict[Any, list[Node]] = {}
            for conv in graph.find_nodes(op="call_function", target=_aten.convolution.default):
                if _is_small(conv, constants):
                    heads.setdefault(_what_is_common(conv), []).append(conv)
            joined = [convolutions for convolutions in heads.values() if len(convolutions) > 1]
            for convolutions in joined:
                _join(convolutions)
            if joined:
                _let_views_copy(graph)
        except Exception as error:  # of whatever kind: after each replacement the graph is one that compiles
            record_path(OP, "left alone", f"the graph could not be looked at: {type(error).__name__}: {error}")
        graph.eliminate_dead_code()


def _is_small(conv: Node, constants: set[Node]) -> bool:
    arguments: Any = conv.args
    input, weight, bias, _, _, _, transposed, _, groups = arguments
    if transposed or groups != 1 or input in constants or not {weight, bias} <= constants | {None}:
        return False
    return conv.meta["val"].shape[1] <= _FEW_CHANNELS and _is_read_by_value(conv)


def _is_read_by_value(node: Node) -> bool:
    """Whether nobody sees how a result lies in memory, which a part of another one does not alone.

    What is returned must have memory of its own, and a copy of it the strides that it would have had.
    """
    for user in node.users:
        if not isinstance(user.target, torch._ops.OpOverload) or user.target.namespace not in ("aten", "prims"):
            return False
        copies = user.target is _aten.clone.default and user.kwargs.get("memory_format") is None
        if copies or user.target in (_aten.as_strided.default, _aten.as_strided_scatter.default):
            return False
        if user.target.is_view and not _is_read_by_value(user):
            return False
    return True


def _what_is_common(conv: Node) -> tuple[Any, ...]:
    """Input, size of the kernel, whether there is a bias, and stride, padding and so on."""
    arguments: Any = conv.args
    input, weight, bias, *geometry = arguments
    return (input, tuple(weight.meta["val"].shape[2:]), bias is None, *map(str, geometry))


def _join(convolutions: list[Node]) -> None:
    """Put parts of one convolution in the place of all of them."""
    first = convolutions[0]
    parameters: list[Any] = list(zip(*(conv.args[1:3] for conv in convolutions)))
    weights, biases = parameters
    with first.graph.inserting_before(first):
        for parameter in (*weights, *biases):
            _compute_before(first, parameter)
        bias = None if None in biases else call(_aten.cat.default, list(biases))
        weight = call(_aten.cat.default, list(weights))
        joined = call(first.target, first.args[0], weight, bias, *first.args[3:])
        joined.meta = {**first.meta, **joined.meta}  # of which layer it is
        begin, parts = 0, []
        for conv in convolutions:
            end = begin + conv.meta["val"].shape[1]
            parts.append(call(_aten.slice.Tensor, joined, 1, begin, end))
            begin = end
    record_path(OP, "fused", f"{_names(convolutions)} as one, {begin} channels")
    for conv, part in zip(convolutions, parts):
        conv.replace_all_uses_with(part)


def _let_views_copy(graph: Graph) -> None:
    """Parts cannot be viewed in all ways in which what they stand for could. Freezing does the same a little later."""
    for view in graph.find_nodes(op="call_function", target=_aten.view.default):
        view.target = _aten.reshape.default


def _compute_before(place: Node, constant: Node | None) -> None:
    """Have a constant, and what it is made of, stand before a node."""
    if constant is None or constant < place:
        return
    for source in constant.all_input_nodes:
        _compute_before(place, source)
    place.prepend(constant)


def _names(convolutions: Iterable[Node]) -> str:
    """``rpn.head.cls_logits (3 channels), rpn.head.bbox_pred (12 channels)``"""
    return ", ".join(
        f"{layer_of(conv)[0] or 'a convolution'} ({conv.meta['val'].shape[1]} channels)" for conv in convolutions
    )
