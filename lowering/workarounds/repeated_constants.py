"""Freezing deletes constants that are still read.

The fault, seen in torch 2.13: after folding, Inductor deletes the tensor of each node that nothing uses any more. An
exported program may have several nodes for one tensor, and of these some are used: "references nonexistent attribute".

The way around: they become one node before anything is folded.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from ..common.graph_pass import GraphPass
from ..inductor.tables import config


class MergeConstants(GraphPass):
    """Leaves one node of those that have the same tensor for a value."""

    def __call__(self, graph: Graph) -> None:
        if not config.freezing:
            return
        first: dict[Any, Node] = {}
        for node in graph.find_nodes(op="get_attr"):
            if first.setdefault(node.target, node) is not node:
                node.replace_all_uses_with(first[node.target])
                graph.erase_node(node)
