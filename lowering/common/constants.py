"""Constants of a graph: what is computed of them at compile time."""

from __future__ import annotations

import contextlib
import contextvars
import operator
from collections.abc import Iterator
from typing import Any, cast

import torch

from ..inductor.codegen import V, config, ir

_may_grow: contextvars.ContextVar[bool] = contextvars.ContextVar("may_grow", default=True)


def may_grow() -> bool:
    """Whether a constant may be replaced by something larger that a kernel can make of it in each call, too."""
    return _may_grow.get()


@contextlib.contextmanager
def kept_small() -> Iterator[None]:
    """What is traced in this context makes no constant larger."""
    token = _may_grow.set(False)
    try:
        yield
    finally:
        _may_grow.reset(token)


def fold_constant(node: torch.fx.Node, value: ir.TensorBox) -> ir.TensorBox:
    """``value``, or what it amounts to if ``node`` depends on nothing but constants: computed now, once.

    Freezing folds such nodes itself, before a graph is looked up in the cache. Only graphs for AOTInductor, which have
    their weights as constants and are not cached, are folded here.
    """
    options = config.aot_inductor
    if not V.graph.aot_mode or options.use_runtime_constant_folding or not options.package_constants_in_so:
        return value
    constants = _constants()
    if node.op == "get_attr" or node not in constants:
        return value
    tensor = _evaluate(node, {})
    # It may be a view of what is forgotten, so it is copied, once if a layer is applied several times.
    alike = (other for other in _folded_tensors() if _same(other, tensor))
    node.meta[_FOLDED] = next(alike, None)
    if node.meta[_FOLDED] is None:
        node.meta[_FOLDED] = tensor.clone()
    _forget(constants)
    return V.graph.add_tensor_constant(node.meta[_FOLDED])


def realize_constant(position: int, value: ir.TensorBox | None) -> ir.IRNode | None:
    """An argument of the node that is lowered, realized; what is made of constants alone is one."""
    if value is None:
        return None
    argument = V.graph.current_node.args[position]
    assert isinstance(argument, torch.fx.Node)
    return ir.ExternKernel.realize_input(ir.ExternKernel.require_contiguous(fold_constant(argument, value)))


_FOLDED = "inductor_vision_folded"  # in a node's meta: the tensor that takes the node's place


def _constants() -> set[torch.fx.Node]:
    """The nodes that depend on constants alone."""
    found: set[torch.fx.Node] = set()
    for node in V.graph.graph.nodes:
        if node.op == "get_attr":
            constant = node.target not in V.graph.mutated_named_buffers
        else:
            inputs = node.all_input_nodes
            constant = node.op == "call_function" and not node.is_impure() and bool(inputs) and found.issuperset(inputs)
        if constant:
            found.add(node)
    return found


def _folded_tensors() -> list[torch.Tensor]:
    return [node.meta[_FOLDED] for node in V.graph.graph.nodes if _FOLDED in node.meta]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    alike = (a.device, a.dtype, a.size(), a.stride()) == (b.device, b.dtype, b.size(), b.stride())
    return alike and torch.equal(a, b)


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


def _forget(constants: set[torch.fx.Node]) -> None:
    """Leave out of the package the tensors that nothing reads any more but what was folded from them."""
    unread: set[torch.fx.Node] = set()
    for node in reversed(V.graph.graph.nodes):
        replaced = _FOLDED in node.meta and len(node.users) == 1
        if node in constants and (replaced or (len(node.users) > 0 and unread.issuperset(node.users))):
            unread.add(node)
    storages: dict[bool, set[int]] = {True: set(), False: set()}
    for node in V.graph.graph.nodes:
        if node.op == "get_attr" and isinstance(_tensor(node), torch.Tensor):
            storages[node in unread].add(_tensor(node).untyped_storage().data_ptr())
    for name, tensor in list(V.graph.constants.items()):
        if tensor.untyped_storage().data_ptr() in storages[True] - storages[False]:
            del V.graph.constants[name]
