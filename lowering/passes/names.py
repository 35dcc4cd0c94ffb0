"""The nodes of graphs as a user knows them: operators with their arguments, and the layers that call them."""

from __future__ import annotations

import inspect
import itertools
import re
from typing import Any

import torch
from torch.fx import Node
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves


def name_of(node: Node) -> str:
    """``torch.nn.functional.interpolate(scale_factor=2) in neck``: no tensors, and nothing that is None."""
    if node.op == "placeholder":
        return f"the input {node.target}"
    path, _ = layer_of(node)
    name = f"{_target(node)}({', '.join(_arguments(node))})"
    return f"{name} in {path}" if path else name


def layer_of(node: Node) -> tuple[str, str]:
    """The path of the innermost module that calls an operator, and its class; "" of the model itself, or if unknown. Of
    an operator that computes gradients, that of the forward pass."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    path, kind = list(stack.values())[-1] if stack else ("", "")
    path = re.sub(r"^L\['(self|fn)'\]\.?", "", path)  # the model; fn is one of a class of torch
    path = re.sub(r"^[LG]\['(\w+)'\]", r"\1", path)  # of a model in a variable
    return path, kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__


def _target(node: Node) -> str:
    if node.op == "call_method":
        return f"torch.Tensor.{node.target}"
    target: Any = node.target
    name = resolve_name(target)
    if name is None:
        parts = getattr(target, "__module__", None), getattr(target, "__name__", target)
        name = ".".join(str(part) for part in parts if part)
    return str(name).replace("_operator.", "operator.").replace("builtins.", "")


def _arguments(node: Node) -> list[str]:
    arguments = [*itertools.zip_longest(parameters_of(node.target)[: len(node.args)], node.args), *node.kwargs.items()]
    return [
        repr(value) if name is None else f"{name}={value!r}"
        for name, value in arguments
        if value is not None and not any(isinstance(leaf, Node) for leaf in tree_leaves(value))
    ]


def parameters_of(target: Any) -> list[str]:
    """Names of what is given by position; none where they are not known, as of functions that are written in C++."""
    if isinstance(target, torch._ops.OpOverload):
        return [argument.name for argument in target._schema.arguments]
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # no function, or one without a signature
        return []
    return [parameter.name for parameter in parameters if parameter.kind == parameter.POSITIONAL_OR_KEYWORD]
