"""Constants of a graph that is compiled ahead of time."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch

from .inductor import V, config, ir


def fold_constant(node: torch.fx.Node, value: ir.TensorBox) -> ir.TensorBox:
    """``value``, or what it amounts to if ``node`` depends on nothing but constants: computed now, once.

    Freezing folds such nodes itself, before a graph is looked up in the cache. Only graphs for AOTInductor, which have
    their weights as constants and are not cached, are folded here.
    """
    options = config.aot_inductor
    if not V.graph.aot_mode or options.use_runtime_constant_folding or not options.package_constants_in_so:
        return value
    chain: dict[torch.fx.Node, bool] = {}
    if node.op == "get_attr" or not _is_constant(node, chain):
        return value
    folded = V.graph.add_tensor_constant(_shared(_evaluate(node, {})))
    node.meta[_FOLDED] = len(node.users) == 1
    _forget([link for link in chain if link.op == "get_attr" and _is_gone(link)])
    return folded


_FOLDED = "inductor_vision_folded"  # in a node's meta: nothing reads its value, but what was folded from it


def _is_gone(node: torch.fx.Node) -> bool:
    """Whether nothing is left in the graph that reads it."""
    return node.meta.get(_FOLDED, False) or (len(node.users) > 0 and all(map(_is_gone, node.users)))


def _is_constant(node: torch.fx.Node, known: dict[torch.fx.Node, bool]) -> bool:
    """Whether it depends on constants alone; ``known`` gets the answer for all that it depends on, and itself."""
    if node not in known:
        if node.op == "get_attr":
            known[node] = node.target not in V.graph.mutated_named_buffers
        else:
            pure = node.op == "call_function" and not node.is_impure() and bool(node.all_input_nodes)
            known[node] = pure and all(_is_constant(argument, known) for argument in node.all_input_nodes)
    return known[node]


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    """A constant of the graph that equals it, as where a layer is applied twice, or a copy: it may be a view of what is
    forgotten."""
    for other in V.graph.constants.values():
        alike = other.dtype == tensor.dtype and other.size() == tensor.size() and other.stride() == tensor.stride()
        if alike and torch.equal(other, tensor):
            return other
    return tensor.clone()


def _tensor(node: torch.fx.Node) -> torch.Tensor:
    return operator.attrgetter(str(node.target))(V.graph.module)


def _evaluate(node: torch.fx.Node, known: dict[torch.fx.Node, Any]) -> Any:
    if node not in known:
        if node.op == "get_attr":
            known[node] = _tensor(node)
        else:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda argument: _evaluate(argument, known))
            known[node] = cast("torch._ops.OpOverload", node.target)(*args, **kwargs)
    return known[node]


def _forget(nodes: list[torch.fx.Node]) -> None:
    """Leave out of the package the tensors of constants that nothing else uses."""
    others = [n for n in V.graph.graph.nodes if n.op == "get_attr" and n not in nodes]
    used = {_tensor(n).untyped_storage().data_ptr() for n in others if isinstance(_tensor(n), torch.Tensor)}
    folded = {_tensor(n).untyped_storage().data_ptr() for n in nodes} - used
    for name, tensor in list(V.graph.constants.items()):
        if tensor.untyped_storage().data_ptr() in folded:
            del V.graph.constants[name]
