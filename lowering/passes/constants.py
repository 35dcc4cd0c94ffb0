"""Which values of a graph of aten operators are known when it is compiled."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..inductor.tables import config


def constants_of(graph: Graph) -> set[Node]:
    """The nodes whose values are known when the graph is compiled: under freezing, and in exported programs."""
    frozen = _frozen_inputs(graph) if config.freezing and not torch.is_grad_enabled() else set()
    packages = config.aot_inductor
    foldable = config.freezing or packages.use_runtime_constant_folding or packages.package_constants_in_so
    constants: set[Node] = set()
    for node in graph.nodes:
        if node.op == "call_function":
            pure = isinstance(node.target, torch._ops.OpOverload) and not (
                node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags
            )
            constant = pure and bool(node.all_input_nodes) and constants.issuperset(node.all_input_nodes)
        else:
            attribute = node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor)
            constant = node in frozen or (attribute and foldable)
        if constant:
            constants.add(node)
    return constants


def _frozen_inputs(graph: Graph) -> set[Node]:
    """The inputs that freezing replaces by constants: parameters, which come first, but those that are changed.

    A subgraph has inputs of its own. If one were mistaken for a parameter, what follows from it would be computed at
    every call.
    """
    context = torch._guards.TracingContext.try_get()
    inputs = graph.find_nodes(op="placeholder")
    if context is None or context.fw_metadata is None or context.params_flat_unwrap_subclasses is None:
        return set()
    infos = context.fw_metadata.input_info
    if len(inputs) != len(infos):
        return set()
    returned = {output.base_idx for output in context.fw_metadata.output_info}
    parameters = enumerate(zip(inputs, infos, context.params_flat_unwrap_subclasses))
    return {
        node
        for i, (node, info, parameter) in parameters
        if isinstance(parameter, Tensor) and not info.mutates_data and i not in returned
    }
