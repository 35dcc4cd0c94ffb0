"""What the nodes of a graph change in place, where the graph is not functional yet.

Graphs of Dynamo write to memory in many ways: methods and functions with an underscore or ``inplace=True``, ``out=``,
items that are set, weights that an embedding renormalizes. They are not told by their names: a node is run with fake
tensors, and the schemas of the aten operators that it consists of say what is written to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node, map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .calls import statistics_of, value_of


def memory_of(nodes: Iterable[Node]) -> set[int]:
    """The memory of the tensors that nodes have for values; views have it in common."""
    return set().union(*(_memory(value_of(node)) for node in nodes))


def _memory(values: Any) -> set[int]:
    return {
        value.untyped_storage()._cdata
        for value in tree_leaves(values)
        if isinstance(value, Tensor) and value.layout == torch.strided  # others have several, or none
    }


def changed_by(node: Node, memory: set[int]) -> set[int]:
    """What a node writes to, of some memory; where that cannot be found out, all of it that the node is given."""
    given = memory & memory_of(node.all_input_nodes)
    if not given or node.op not in ("call_function", "call_method", "call_module"):
        return set()
    statistics = statistics_of(node)
    if statistics is not None:  # to which batch norms write, whatever their schemas say
        return memory & memory_of(statistics)
    if node.op == "call_module":
        return given
    if isinstance(node.target, HigherOrderOperator):
        return given if _may_change_operands(node) else set()
    return given & memory_of(_written(node))


def _may_change_operands(node: Node) -> bool:
    """Whether an operator that takes graphs, as a checkpoint does, is given one that changes its arguments."""
    subgraphs = [value for value in map(value_of, node.all_input_nodes) if isinstance(value, GraphModule)]
    for subgraph in subgraphs:
        inputs = subgraph.graph.find_nodes(op="placeholder")
        memory = memory_of(inputs)
        unknown = any(value_of(input) is None for input in inputs)
        if unknown or any(changed_by(inner, memory) for inner in subgraph.graph.nodes):
            return True
    return not subgraphs


class _Writes(TorchDispatchMode):
    """Collects the memory that operators write to."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: set[int] = set()

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = {**dict(zip((argument.name for argument in func._schema.arguments), args)), **(kwargs or {})}
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.memory |= _memory(values.get(argument.name))
        return func(*args, **(kwargs or {}))


def _written(node: Node) -> list[Node]:
    """Found by running the node with tensors that are as those it is given; all of them if it cannot be run."""
    values = {argument: value_of(argument) for argument in node.all_input_nodes}
    mode = detect_fake_mode(list(values.values())) or FakeTensorMode()

    def copied(value: Any) -> Any:
        return tree_map_only(
            Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device), value
        )

    try:
        with contextlib.ExitStack() as contexts:
            if mode.shape_env is not None:  # which must not learn of it
                contexts.enter_context(mode.shape_env.suppress_guards())
                contexts.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
            contexts.enter_context(torch.no_grad())
            contexts.enter_context(mode)
            copies = {argument: copied(value) for argument, value in values.items()}
            args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
            writes = contexts.enter_context(_Writes())
            if node.op == "call_method":
                getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.target(*args, **kwargs)  # type: ignore[operator]  # a function
    except Exception:  # whatever it is that this function does not take
        return list(values)
    return [argument for argument, copy in copies.items() if _memory(copy) & writes.memory]
