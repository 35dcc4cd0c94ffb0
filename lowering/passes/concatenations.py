"""A graph pass that takes the parts of a concatenation from where they are.

torchvision's detectors concatenate what their heads compute on all levels of a pyramid, and split it by levels again
before they look for detections: a copy of all scores, tens of millions of them. Inductor leaves it out where sizes are
constants; in packages for images of any size they are not.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..common.graph_pass import GraphPass

_aten = torch.ops.aten


class SkipConcatenations(GraphPass):
    """Replaces the parts into which a concatenation is split, where they are what it was made of.

    It runs late, on graphs of aten operators that change nothing in place but inputs, at their end. A graph that does
    is left alone: a part of a concatenation is a copy, which must not see the change.
    """

    def __call__(self, graph: Graph) -> None:
        if any(_changes(node) for node in graph.nodes):
            return
        for split in graph.find_nodes(op="call_function", target=_aten.split_with_sizes.default):
            parts = _parts_of(*split.args)
            if parts is None:
                continue
            for part in list(split.users):
                if not _is_returned(part):
                    part.replace_all_uses_with(parts[part.args[1]])
                    graph.erase_node(part)
            for unused in (split, split.args[0]):
                if not unused.users:
                    graph.erase_node(unused)


def _changes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _parts_of(whole: Node, sizes: list[Any], dim: int = 0) -> list[Node] | None:
    """What the whole was concatenated of, if these are the parts of these sizes."""
    if whole.target is not _aten.cat.default:
        return None
    parts: Any = whole.args[0]
    along: Any = whole.args[1] if len(whole.args) > 1 else 0
    result, values = whole.meta["val"], [part.meta["val"] for part in parts]
    if len(parts) != len(sizes) or (along - dim) % result.dim():
        return None
    if any(value.dtype != result.dtype or value.dim() != result.dim() for value in values):
        return None
    same = all(statically_known_true(value.shape[dim] == _value(size)) for value, size in zip(values, sizes))
    return parts if same else None


def _value(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, Node) else size


def _is_returned(node: Node) -> bool:
    """Whether the memory of a node is part of what the graph returns: that must be no other tensor's."""
    return any(user.op == "output" or (_is_view(user) and _is_returned(user)) for user in node.users)


def _is_view(node: Node) -> bool:
    return node.target is operator.getitem or getattr(node.target, "is_view", False)
