"""Which of Inductor's neighbours a template takes into its store, and where in them a place of its output is.

A template writes its output block by block, in *physical* order, and what is fused is computed for the places of the
block at hand. Sizes do not say which element of a neighbour belongs to a place: the transposed of a square is as large
as the square. The index of its store does: a neighbour that is stored where the template's own value would be stored,
and reads fused values only from there, is one loop with the template, whatever its shape. Nothing else is fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..inductor.codegen import CppScheduling, V, ir

# From a place in the output of a template, in physical order, to an index of a neighbour.
Reindexer = Callable[[Sequence[Any]], Sequence[Any]]


def reindexers(buffer: ir.Buffer, epilogue: Sequence[ir.IRNode]) -> list[Reindexer] | None:
    """For each node that is to be fused with a template, from places in the template's output to the node's indices.

    None if one of them cannot be expressed so.

    Args:
        buffer: the template's output, dense in physical order.
        epilogue: the nodes, in any order.
    """
    fused = {node.get_name() for node in (buffer, *epilogue)}
    found = [_reindexer(buffer, node) if _reads_where_it_writes(node, fused) else None for node in epilogue]
    return None if None in found else found  # type: ignore[return-value]  # no None is left


def only_converts(node: ir.ComputedBuffer, dtype: torch.dtype) -> bool:
    """Whether a node that is fused is what a template computes, in this dtype, or once converted to a lower one."""
    operations = node.data.inner_fn_opcount()
    lower = (torch.bfloat16, torch.float16) if dtype == torch.float32 else ()
    return (
        node.get_dtype() in (dtype, *lower) and operations.num_ops <= 2 and operations.used_ops <= {"load", "to_dtype"}
    )


def _reads_where_it_writes(node: ir.IRNode, fused: set[str]) -> bool:
    """Whether a node reads fused values at the very place in memory at which it writes its own."""
    if not isinstance(node, ir.ComputedBuffer) or type(node.data) is not ir.Pointwise:
        return False
    (write,) = node.get_read_writes().writes
    reads = [read for read in node.get_reads() if read.name in fused]
    return all(isinstance(read, type(write)) and read.index == write.index for read in reads)


def _reindexer(buffer: ir.Buffer, node: ir.ComputedBuffer) -> Reindexer | None:
    """Map a place in the buffer to the index of a node that has as many elements; None if the node is not dense."""
    same = V.graph.sizevars.statically_known_equals
    order = _dense_order(node.get_size(), node.get_stride())
    if order is None or not same(node.get_layout().offset, 0) or not same(node.get_numel(), buffer.get_numel()):
        return None
    size = node.get_size()
    try:
        reshape = ir.View.dynamic_reshape_indexer([size[d] for d in order], buffer.get_size())
    except GuardOnDataDependentSymNode:  # sizes that data decide, and no common factor to be seen
        return None

    def reindex(place: Sequence[Any]) -> Sequence[Any]:
        positions = dict(zip(order, reshape(place)))
        return [positions.get(d, 0) for d in range(len(size))]

    return reindex


def _dense_order(size: Sequence[Any], stride: Sequence[Any]) -> list[int] | None:
    """The dimensions of more than one element, slowest first; None if they leave gaps in memory, or overlap."""
    same = V.graph.sizevars.statically_known_equals
    left = [d for d in range(len(size)) if not same(size[d], 1)]
    order: list[int] = []
    expected: Any = 1
    while left:
        fastest = next((d for d in left if same(stride[d], expected)), None)
        if fastest is None:
            return None
        left.remove(fastest)
        order.insert(0, fastest)
        expected = expected * size[fastest]
    return order


def fuse_only_what_is_stored_alike(template: type) -> None:
    """Have Inductor ask this module too before it fuses something with a template of this class."""
    original = CppScheduling.can_fuse_vertical

    def can_fuse_vertical(self: CppScheduling, node1: Any, node2: Any) -> bool:
        if not original(self, node1, node2):
            return False
        buffer = node1.get_template_node() if node1.is_template() else None
        if not isinstance(getattr(buffer, "template", None), template):
            return True
        epilogue = [node.node for node in (*node1.get_nodes(), *node2.get_nodes()) if node.node is not buffer]
        return reindexers(buffer, epilogue) is not None

    CppScheduling.can_fuse_vertical = can_fuse_vertical
