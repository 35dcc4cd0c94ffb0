"""A graph pass that has linear layers read maps in the order in which convolutions write them.

Under freezing a convolution's result is channels_last. A linear layer behind it wants channel after channel, for which
``flatten`` copies the map. If the layer's weight is a constant, its columns are brought into the map's order instead:

    linear(x.flatten(1), w) = linear(pixels(x), pixels(w.unflatten(1, x.shape[1:])))
    pixels(x) = x.permute(0, 2, 3, 1).flatten(1)

It runs on graphs of aten operators in which weights are constants: under freezing.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ...paths import record_path
from ..common.graph_pass import GraphPass, call
from ..inductor.tables import config
from .constants import constants_of
from .names import layer_of

OP = "linear"

_aten, _prims = torch.ops.aten, torch.ops.prims
_PRODUCTS: dict[Any, int] = {_aten.mm.default: 0, _aten.addmm.default: 1}  # and which argument the weight follows
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)

# What is channels_last if what it is made of is.
_KEEP_ORDER = {
    *(_aten.relu.default, _aten.clamp_min.default, _aten.clamp_max.default, _aten.clamp.default, _aten.sigmoid.default),
    *(_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _prims.convert_element_type.default),
    *(_aten.max_pool2d_with_indices.default, _prims._low_memory_max_pool_with_offsets.default, operator.getitem),
    *(_aten.avg_pool2d.default, _aten._adaptive_avg_pool2d.default, _aten.clone.default),
}


class FlattenAsItLies(GraphPass):
    """Permutes weights of linear layers in place of the maps that they read."""

    def __call__(self, graph: Graph) -> None:
        if not config.freezing or torch.is_grad_enabled():
            return  # weights are not constants
        if not (config.layout_optimization and torch.backends.mkldnn.is_available()):
            return  # convolutions are not made channels_last
        try:
            constants, maps = constants_of(graph), _maps_of_convolutions(graph)
            for flat in [node for node in graph.nodes if node.target in _VIEWS]:
                _flatten_as_it_lies(flat, maps, constants)
        except Exception as error:  # of whatever kind: after each replacement the graph is one that compiles
            record_path(OP, "left alone", f"the graph could not be looked at: {type(error).__name__}: {error}")
        graph.eliminate_dead_code()


def _maps_of_convolutions(graph: Graph) -> set[Node]:
    """The results of convolutions, and what is made of them in their order."""
    maps: set[Node] = set()
    for node in graph.nodes:
        if _is_convolution(node) or (
            node.target in _KEEP_ORDER and any(argument in maps for argument in node.all_input_nodes)
        ):
            maps.add(node)
    return maps


def _is_convolution(node: Node) -> bool:
    """A stock one, or what computes it in its place: the pass that decides about that may have run before."""
    return node.target is _aten.convolution.default or any(
        f"{kernel}_prepacked" in str(node.target) for kernel in ("winograd_conv2d", "direct_conv2d")
    )


def _flatten_as_it_lies(flat: Node, maps: set[Node], constants: set[Node]) -> None:
    """Have the linear layers behind a flattened map take its pixels one after the other, if they are all there is."""
    x: Any = flat.args[0]
    if x not in maps or not isinstance(x.meta.get("val"), Tensor):
        return
    _, *sizes = x.meta["val"].shape
    if len(sizes) != 3 or not all(isinstance(size, int) for size in sizes):
        return
    channels, height, width = sizes
    if channels == 1 or height * width == 1 or flat.meta["val"].shape[1:] != (channels * height * width,):
        return
    products = list(flat.users)
    if not products or not all(_is_linear(product, flat, constants) for product in products):
        return
    if x.target is _aten.clone.default:  # into the order of channels
        x = x.args[0]
    with flat.graph.inserting_before(flat):
        pixels = call(_aten.permute.default, x, [0, 2, 3, 1])
        rows = call(_aten.reshape.default, pixels, flat.args[1])
    for product in products:
        place = _PRODUCTS[product.target] + 1
        weight: Any = product.args[place]
        outputs = weight.meta["val"].shape[1]
        with flat.graph.inserting_before(product):
            columns = call(_aten.permute.default, weight, [1, 0])
            columns = call(_aten.reshape.default, columns, [outputs, channels, height, width])
            columns = call(_aten.permute.default, columns, [0, 2, 3, 1])
            columns = call(_aten.reshape.default, columns, [outputs, channels * height * width])
            weight = call(_aten.permute.default, columns, [1, 0])
        product.update_arg(place - 1, rows)
        product.update_arg(place, weight)
        what = f"{layer_of(product)[0] or 'a linear layer'} ({channels} x {height} x {width} to {outputs})"
        record_path(OP, "fused", f"{what} takes a channels_last map")


def _is_linear(user: Node, flat: Node, constants: set[Node]) -> bool:
    place = _PRODUCTS.get(user.target)
    return (
        place is not None
        and user.args[place] is flat
        and user.args[place + 1] in constants
        and _is_read_once(user.args[place + 1])
    )


def _is_read_once(weight: Any) -> bool:
    """Whether nothing else needs a constant in its own order, which would be a second one beside it."""
    while weight.op == "call_function":
        if len(weight.users) > 1:
            return False
        (weight,) = weight.all_input_nodes
    return len(weight.users) == 1
