"""Passes over graphs, as Inductor's settings take them."""

from __future__ import annotations

from typing import Any

from torch.fx import Node, map_arg

from ..inductor.tables import custom_graph_pass


class GraphPass(custom_graph_pass.CustomGraphPass):
    """A pass that is known to Inductor's caches by its name and a version."""

    def __init__(self, version: Any) -> None:
        self.version = version

    def uuid(self) -> Any:
        """Part of the key of Inductor's caches."""
        return f"{type(self).__name__}-{self.version}"


def call(op: Any, *args: Any, **kwargs: Any) -> Node:
    """A new node, where its graph inserts nodes, with the value that Inductor's passes want to see."""
    graphs = []

    def value(node: Node) -> Any:
        graphs.append(node.graph)
        return node.meta["val"]

    values, named_values = map_arg((args, kwargs), value)
    node = graphs[0].call_function(op, args, kwargs)
    node.meta["val"] = op(*values, **named_values)
    return node
