"""Convolutions, batch norms and activations in graphs: the same for each form that a call may have.

Graphs of Dynamo consist of functions and methods of torch, those of ``torch.export`` of aten operators; both of them in
place or not, with arguments by position or by name.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from ...ops.depthwise_separable_conv2d import ACTIVATIONS, IDENTITY, PRELU, SELU, format_activation
from ...ops.registry import pair
from .names import layer_of, parameters_of

_aten = torch.ops.aten


def _parameters(names: str, **defaults: Any) -> dict[str, Any]:
    return {name: defaults.get(name) for name in names.split()}


_CONVOLUTION = _parameters(
    "input weight bias stride padding dilation groups", stride=1, padding=0, dilation=1, groups=1
)

_CONVOLUTIONS = (torch.conv2d, F.conv2d, _aten.conv2d.default, _aten.conv2d.padding)

_NORM = _parameters("input weight bias running_mean running_var training momentum eps cudnn_enabled", eps=1e-5)

_NORMS = {
    F.batch_norm: _parameters(
        "input running_mean running_var weight bias training momentum eps", training=False, eps=1e-5
    ),
    torch.batch_norm: _NORM,
    _aten.batch_norm.default: _NORM,
}


def _forms(name: str) -> Iterator[Any]:
    """What calls a function of this name: functions and methods of torch and operators of aten, in place or not."""
    for form in (name, f"{name}_"):
        yield form  # of a method
        yield from (getattr(module, form, None) for module in (F, torch, torch._C._nn))
        if hasattr(_aten, form):
            yield getattr(_aten, form).default


_ACTIVATIONS = {form: name for name in ACTIVATIONS if name != IDENTITY for form in _forms(name) if form is not None}

# Arguments of aten's operators that are no parameters of ours, and what they are by themselves.
_NEUTRAL = {"approximate": "none", "scale": 1, "input_scale": 1}


def _bind(node: Node, parameters: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**parameters, **dict(zip(parameters, node.args)), **node.kwargs}


def value_of(node: Any) -> Any:
    """The tensor that a node has for a value, a fake one."""
    for key in ("example_value", "val"):
        if key in node.meta:
            return node.meta[key]
    if node.op == "get_attr" and node.graph.owning_module is not None:
        return operator.attrgetter(node.target)(node.graph.owning_module)
    return None


@dataclasses.dataclass(frozen=True)
class ConvolutionCall:
    """A call of conv2d; the tensors are nodes."""

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    stride: tuple[Any, ...]
    padding: tuple[Any, ...] | str
    dilation: tuple[Any, ...]
    groups: int

    @property
    def tensors(self) -> list[Node]:
        return [tensor for tensor in (self.input, self.weight, self.bias) if tensor is not None]

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and value_of(self.weight).shape[1] == 1 and value_of(self.input).shape[-3] == self.groups

    @property
    def is_pointwise(self) -> bool:
        kernel = tuple(value_of(self.weight).shape[2:])
        padded = not isinstance(self.padding, str) and any(self.padding)  # a 1 x 1 kernel has no "same" to pad for
        return kernel == (1, 1) and self.stride == (1, 1) and not padded and self.groups == 1

    @property
    def parameters(self) -> dict[str, Node]:
        return {"weight": self.weight, **({} if self.bias is None else {"bias": self.bias})}

    def __str__(self) -> str:
        """``features.0 (3 x 3, 8 channels)``; a call that is not a layer's is ``conv2d in features``."""
        path, kind = layer_of(self.node)
        name = path if kind == "Conv2d" else f"conv2d in {path}" if path else "conv2d"
        channels, _, *kernel = value_of(self.weight).shape
        return f"{name} ({' x '.join(map(str, kernel))}, {channels} channels)"


def convolution_of(node: Node) -> ConvolutionCall | None:
    if node.op != "call_function" or node.target not in _CONVOLUTIONS:
        return None
    a = _bind(node, _CONVOLUTION)
    if any(not isinstance(value_of(tensor), Tensor) for tensor in (a["input"], a["weight"])):
        return None
    if not isinstance(a["groups"], int):  # not known when it is compiled
        return None
    for name in ("stride", "padding", "dilation"):
        if not isinstance(a[name], str):
            numbers = pair(name, a[name])
            a[name] = numbers * 2 if len(numbers) == 1 else numbers  # [2] is as good as [2, 2]
    return ConvolutionCall(node, **a)


@dataclasses.dataclass(frozen=True)
class NormCall:
    """A call of batch_norm; the tensors are nodes."""

    node: Node
    running_mean: Node | None
    running_var: Node | None
    weight: Node | None
    bias: Node | None
    training: bool
    eps: float | Node  # a node where all numbers are dynamic

    @property
    def tensors(self) -> list[Node]:
        tensors = self.running_mean, self.running_var, self.weight, self.bias
        return [tensor for tensor in tensors if tensor is not None]

    @property
    def parameters(self) -> dict[str, Node]:
        """The nodes among its parameters, by name; epsilon may be one."""
        names = "running_mean", "running_var", "weight", "bias", "eps"
        return {name: node for name in names if isinstance(node := getattr(self, name), Node)}


def norm_of(node: Node | None, input: Node) -> NormCall | None:
    if node is None or node.op != "call_function" or node.target not in _NORMS:
        return None
    a = _bind(node, _NORMS[node.target])
    if a["input"] is not input:
        return None
    return NormCall(node, *(a[field.name] for field in dataclasses.fields(NormCall)[1:]))


def statistics_of(node: Node) -> list[Node] | None:
    """The running statistics that a batch norm changes, none in eval mode; None of what is no batch norm."""
    if "batch_norm" not in str(getattr(node.target, "__name__", node.target)):
        return None
    if node.target not in _NORMS:
        return node.all_input_nodes  # those that only torch itself calls
    a = _bind(node, _NORMS[node.target])
    return [tensor for tensor in (a["running_mean"], a["running_var"]) if tensor is not None] if a["training"] else []


def _constant(node: Node) -> Tensor | None:
    """The value in an exported program, which has its parameters as attributes."""
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    value = operator.attrgetter(str(node.target))(node.graph.owning_module)
    from ..inductor.tables import V

    trained = value.requires_grad and torch.is_grad_enabled() and not V.aot_compilation  # then it is no constant
    return None if trained or isinstance(value, FakeTensor) else value.detach()


def has_unknown_parameters(node: Node) -> bool:
    """Whether it is an activation, but with numbers that a graph is given. A slope that is a tensor is none."""
    parameters = [*node.args[1:], *(value for name, value in node.kwargs.items() if name not in ("input", "out"))]
    return _ACTIVATIONS.get(node.target, PRELU) != PRELU and any(isinstance(value, Node) for value in parameters)


@dataclasses.dataclass(frozen=True)
class Activation:
    """A call of an activation, or the calls that one is written out in.

    Attributes:
        nodes: in their order; the last has the result.
        name: as the operator is given it, with numbers.
        slope: a tensor, of prelu; the others have None.
    """

    nodes: tuple[Node, ...]
    name: str
    slope: Node | None = None


def activation_of(node: Node) -> Activation | None:
    """None of what is none, or has parameters that are not known; of prelu, whether it has one slope is not asked."""
    if node.op not in ("call_function", "call_method"):
        return None
    if _ACTIVATIONS.get(node.target) == PRELU:
        slope = _bind(node, _parameters("input weight"))["weight"]
        constant = _constant(slope)
        if constant is None or constant.numel() != 1:
            return Activation((node,), PRELU, slope)
        return Activation((node,), format_activation("leaky_relu", {"negative_slope": constant.item()}))
    name = _activation_name(node)
    return None if name is None else Activation((node,), name)


def _activation_name(node: Node) -> str | None:
    """The name of an activation with its parameters, which are numbers; None if there is none, or one is a tensor."""
    name = _ACTIVATIONS.get(node.target)
    if name is None or len(node.all_input_nodes) != 1:  # with `out`, a tensor that others may read
        return None
    defaults = ACTIVATIONS[name].parameters
    names = parameters_of(node.target)[1:] or list(defaults)  # functions in C++ say nothing
    given = {**defaults, **_NEUTRAL, **dict(zip(names, node.args[1:])), **node.kwargs}
    parameters: dict[str, Any] = {key: given[key] for key in defaults}
    if len(node.args) > 1 + len(names) or any(isinstance(value, Node) for value in parameters.values()):
        return None
    special = {key: given[key] for key, value in _NEUTRAL.items() if given[key] != value}
    if special:
        return _special_case(name, parameters, special)
    return "relu6" if (name, parameters) == _RELU6 else format_activation(name, parameters)


_RELU6 = ("hardtanh", {"min_val": 0, "max_val": 6})


def _special_case(name: str, parameters: dict[str, Any], special: dict[str, Any]) -> str | None:
    """An aten operator by its name in torch, or in our table; ``special`` are other arguments."""
    if (name, special) == ("gelu", {"approximate": "tanh"}):
        return "gelu_tanh"
    alpha = parameters.get("alpha")
    if (name, alpha, special) == ("elu", SELU[0], {"scale": SELU[1]}):
        return "selu"
    if name == "elu" and alpha and special == {"input_scale": 1 / alpha}:
        return format_activation("celu", parameters)
    return None


# Functions and methods of torch, and operators of Python and aten, by what they compute.
_ARITHMETIC = {
    torch.abs: "abs",
    "abs": "abs",
    _aten.abs.default: "abs",
    **{
        form: name
        for name, of_python in (("add", operator.add), ("mul", operator.mul), ("div", operator.truediv))
        for form in (of_python, name, getattr(torch, name), getattr(_aten, name).Tensor)
    },
}

# Activations as they are written out; sums and products have the longer operand first.
_WRITTEN_OUT = {
    ("mul", ("sigmoid", "x"), "x"): "silu",
    ("div", ("relu6", ("add", "x", 3)), 6): "hardsigmoid",
    ("mul", ("hardsigmoid", "x"), "x"): "hardswish",
    ("div", ("mul", ("relu6", ("add", "x", 3)), "x"), 6): "hardswish",
    ("div", "x", ("add", ("abs", "x"), 1)): "softsign",
}


def written_out_activation_of(input: Node) -> Activation | None:
    """The activation that the users of a node compute together, as ``x * sigmoid(x)``."""
    expressions: dict[Node, Any] = {input: "x"}
    for _ in range(4):  # calls that the longest consists of
        users = [user for node in expressions for user in node.users if user not in expressions]
        node = next((user for user in users if expressions.keys() >= set(user.all_input_nodes)), None)
        expression = None if node is None else _expression_of(node, expressions)
        if node is None or expression is None:
            return None
        name = _WRITTEN_OUT.get(expression)
        all_users = {user for other in expressions for user in other.users}
        expressions[node] = expression if name is None else (name, "x")
        if name is not None and all_users <= expressions.keys():
            return Activation(tuple(expressions)[1:], name)
    return None


def _expression_of(node: Node, expressions: dict[Node, Any]) -> Any:
    """What a node computes of ``"x"``; None if that cannot be part of an activation."""
    operation = None if node.op == "call_module" else _ARITHMETIC.get(node.target)  # whose target is a path
    if operation is None:
        activation = activation_of(node)
        if activation is None or activation.slope is not None or _changes_what_others_read(node):
            return None
        return activation.name, expressions[node.all_input_nodes[0]]
    operands = [expressions[value] if isinstance(value, Node) else value for value in node.args]
    if node.kwargs or not all(isinstance(operand, (str, tuple, int, float)) for operand in operands):
        return None
    if operation in ("add", "mul"):
        operands.sort(key=lambda operand: (not isinstance(operand, tuple), not isinstance(operand, str)))
    return operation, *operands


def _changes_what_others_read(node: Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    inplace = any(value is True for value in (*node.args, *node.kwargs.values()))
    in_place = name.endswith("_") or inplace or node.kwargs.get("out") is not None
    return in_place and len(node.all_input_nodes[0].users) > 1
