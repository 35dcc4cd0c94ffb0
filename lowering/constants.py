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
    chain: list[torch.fx.Node] = []
    if node.op == "get_attr" or not _is_constant(node, chain):
        return value
    folded = V.graph.add_tensor_constant(_evaluate(node, {}).clone())  # it may be a view of what is forgotten
    if all(len(link.users) == 1 for link in chain):
        _forget([link for link in chain if link.op == "get_attr"])
    return folded


def _is_constant(node: torch.fx.Node, chain: list[torch.fx.Node]) -> bool:
    """Whether it depends on constants alone; ``chain`` gets all that it depends on, and itself."""
    chain.append(node)
    if node.op == "get_attr":
        return node.target not in V.graph.mutated_named_buffers
    if node.op != "call_function" or node.is_impure() or not node.all_input_nodes:
        return False
    return all(_is_constant(argument, chain) for argument in node.all_input_nodes)


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
