"""A graph pass that finds depthwise-separable convolutions in models that were written without this package.

A depthwise convolution whose result goes, through a batch norm in eval mode and an activation or without, into a
pointwise convolution and nowhere else, becomes one call of ``depthwise_separable_conv2d``. Batch norms, that behind the
pointwise convolution too, become part of weights and biases: a few nodes on vectors, which are computed at compile time
where weights are constants. What follows stays in the graph; Inductor fuses it into the kernel.

It runs on the graphs that Inductor gets, before gradients are derived: those of Dynamo, of functions of torch, and
those of ``torch.export``, of aten operators.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.nn.modules.utils import _pair

from ..ops.convolution import FLOAT_DTYPES
from ..ops.depthwise_separable_conv2d import IDENTITY
from ..ops.registry import OPS
from ..paths import record_path
from .registry import refusal

_aten = torch.ops.aten
OP = "depthwise_separable_conv2d"


class FuseDepthwiseSeparable(CustomGraphPass):
    """Replaces what it finds, and says of every depthwise convolution what became of it, and why."""

    def __init__(self, version: Any) -> None:
        self.version = version

    def uuid(self) -> Any:
        """Part of the key of Inductor's caches."""
        return f"{type(self).__name__}-{self.version}"

    def __call__(self, graph: Graph) -> None:
        candidates = [node for node in graph.nodes if (call := _convolution(node)) and call.is_depthwise]
        for node in candidates:
            depthwise = _convolution(node)  # again: its input may have been replaced
            assert depthwise is not None
            found = find_pair(depthwise)
            if isinstance(found, str):
                record_path(OP, "left alone", f"{depthwise}: {found}")
            else:
                replace(found)
                record_path(OP, "fused", str(found))


# What nodes say


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

# What computes an activation; the first argument is its input, others must be as given here, where given.
_ACTIVATIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "relu": (
        (F.relu, torch.relu, torch.relu_, "relu", "relu_", _aten.relu.default, _aten.relu_.default),
        {},
    ),
    "relu6": (
        (
            F.relu6,
            F.hardtanh,
            F.hardtanh_,
            _aten.relu6.default,
            _aten.relu6_.default,
            _aten.hardtanh.default,
            _aten.hardtanh_.default,
        ),
        {"min_val": 0, "max_val": 6},
    ),
    "leaky_relu": (
        (F.leaky_relu, F.leaky_relu_, _aten.leaky_relu.default, _aten.leaky_relu_.default),
        {"negative_slope": 0.01},
    ),
    "hardsigmoid": ((F.hardsigmoid, _aten.hardsigmoid.default, _aten.hardsigmoid_.default), {}),
    "hardswish": ((F.hardswish, _aten.hardswish.default, _aten.hardswish_.default), {}),
    "silu": ((F.silu, _aten.silu.default, _aten.silu_.default), {}),
    "gelu": ((F.gelu, _aten.gelu.default, _aten.gelu_.default), {"approximate": "none"}),
}
_NAMES = {target: name for name, (targets, _) in _ACTIVATIONS.items() for target in targets}

# Nodes that change how those behind them are computed. A pair is not looked for across one.
_CHANGES_OF_MODE = (
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "_enter_inference_mode",
    "_exit_inference_mode",
)


def _bind(node: Node, parameters: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**parameters, **dict(zip(parameters, node.args)), **node.kwargs}


def _value(node: Any) -> Any:
    """The tensor that a node has for a value, a fake one."""
    for key in ("example_value", "val"):
        if key in node.meta:
            return node.meta[key]
    if node.op == "get_attr" and node.graph.owning_module is not None:
        return operator.attrgetter(node.target)(node.graph.owning_module)
    return None


@dataclasses.dataclass(frozen=True)
class Convolution:
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
        return self.groups > 1 and _value(self.weight).shape[1] == 1 and _value(self.input).shape[-3] == self.groups

    @property
    def is_pointwise(self) -> bool:
        kernel = tuple(_value(self.weight).shape[2:])
        padded = not isinstance(self.padding, str) and any(self.padding)  # a 1 x 1 kernel has no "same" to pad for
        return kernel == (1, 1) and self.stride == (1, 1) and not padded and self.groups == 1

    def __str__(self) -> str:
        channels, _, *kernel = _value(self.weight).shape
        return f"{self.node} ({' x '.join(map(str, kernel))}, {channels} channels)"


def _convolution(node: Node) -> Convolution | None:
    if node.op != "call_function" or node.target not in _CONVOLUTIONS:
        return None
    a = _bind(node, _CONVOLUTION)
    if any(not isinstance(_value(tensor), Tensor) for tensor in (a["input"], a["weight"])):
        return None
    if not isinstance(a["groups"], int):  # not known when it is compiled
        return None
    if not isinstance(a["padding"], str):
        a["padding"] = tuple(_pair(a["padding"]))
    for name in ("stride", "dilation"):
        a[name] = tuple(_pair(a[name]))
    return Convolution(node, **a)


@dataclasses.dataclass(frozen=True)
class Norm:
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
    def parameters(self) -> list[Node]:
        return [*self.tensors, *([self.eps] if isinstance(self.eps, Node) else [])]


def _norm(node: Node | None, input: Node) -> Norm | None:
    if node is None or node.op != "call_function" or node.target not in _NORMS:
        return None
    a = _bind(node, _NORMS[node.target])
    if a["input"] is not input:
        return None
    return Norm(node, *(a[field.name] for field in dataclasses.fields(Norm)[1:]))


def _activation(node: Node | None) -> str | None:
    if node is None or node.op not in ("call_function", "call_method") or node.target not in _NAMES:
        return None
    name = _NAMES[node.target]
    wanted = _ACTIVATIONS[name][1]
    if node.target in (F.relu6, _aten.relu6.default, _aten.relu6_.default):
        wanted = {}
    # The limits of hardtanh are -1 and 1 unless they are given; other defaults are what is wanted.
    defaults = {"min_val": -1, "max_val": 1} if name == "relu6" else wanted
    given = {**defaults, **dict(zip(wanted, node.args[1:])), **node.kwargs}
    return name if all(given[key] == value for key, value in wanted.items()) else None


# Finding


@dataclasses.dataclass(frozen=True)
class Pair:
    """A depthwise convolution and the pointwise one that it goes into, with what is between and the norm behind."""

    depthwise: Convolution
    depthwise_norm: Norm | None
    activation: Node | None
    pointwise: Convolution
    pointwise_norm: Norm | None

    @property
    def norms(self) -> list[Norm]:
        return [norm for norm in (self.depthwise_norm, self.pointwise_norm) if norm is not None]

    @property
    def nodes(self) -> list[Node]:
        """All that is replaced, in order."""
        parts = self.depthwise, self.depthwise_norm, self.activation, self.pointwise, self.pointwise_norm
        return [part if isinstance(part, Node) else part.node for part in parts if part is not None]

    @property
    def parameters(self) -> list[Node]:
        """Weights, biases and statistics."""
        convolutions = self.depthwise.tensors[1:] + self.pointwise.tensors[1:]
        return convolutions + [parameter for norm in self.norms for parameter in norm.parameters]

    def __str__(self) -> str:
        return f"{self.depthwise} with {self.pointwise}"


def find_pair(depthwise: Convolution) -> Pair | str:
    """The pair that a depthwise convolution begins, or why there is none."""
    node, activation = depthwise.node, None
    follower = _only_user(node)
    norm = _norm(follower, node)
    if norm is not None:
        if norm.training or norm.running_mean is None or norm.running_var is None:
            return "its batch norm is in training mode"
        node = norm.node
        follower = _only_user(node)
    if follower is not None and _activation(follower) is not None:
        node = activation = follower
        follower = _only_user(node)
    if follower is None:
        return f"its result is not only the input of a pointwise convolution, but of {', '.join(map(str, node.users))}"
    pointwise = _convolution(follower)
    if pointwise is None or pointwise.input is not node:
        return f"it is followed by {follower}, not by a pointwise convolution"
    if not pointwise.is_pointwise:
        return f"{pointwise} is not a plain 1 x 1 convolution"
    pointwise_norm = _norm(_only_user(pointwise.node), pointwise.node)
    if pointwise_norm is not None and (pointwise_norm.training or pointwise_norm.running_mean is None):
        pointwise_norm = None  # stays where it is
    reason = None
    for last in dict.fromkeys((pointwise_norm, None)):  # a norm that cannot be taken in stays where it is
        pair = Pair(depthwise, norm, activation, pointwise, last)
        reason = next((reason for test in _TESTS if (reason := test(pair)) is not None), None)
        if reason is None:
            return pair
    return str(reason)


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def _test_tensors(pair: Pair) -> str | None:
    convolutions = pair.depthwise, pair.pointwise
    nodes = [node for convolution in convolutions for node in (*convolution.tensors, convolution.node)]
    nodes += [tensor for norm in pair.norms for tensor in norm.tensors]
    values = [_value(node) for node in nodes]
    for node, value in zip(nodes, values):
        if type(value) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor):
            return f"{node} is not a plain tensor"
        if value.device.type != "cpu":
            return f"{node} is on {value.device}, and the kernel is for the CPU"
        if value.dtype not in FLOAT_DTYPES:
            return f"{node} is of {value.dtype}"
    if _value(pair.depthwise.input).dim() != 4:
        return "its input has no batch"
    return None


def _test_geometry(pair: Pair) -> str | None:
    a = pair.depthwise
    if any(isinstance(number, Node) for number in (*a.stride, *a.padding, *a.dilation)):
        return "its stride, padding or dilation is not known when it is compiled"
    return None if _padding(a) is not None else "it pads one side more than the other"


def _padding(convolution: Convolution) -> tuple[Any, ...] | None:
    """In numbers; None if the sides differ."""
    if convolution.padding == "valid":
        return (0, 0)
    if convolution.padding != "same":
        return tuple(convolution.padding)
    reach = [d * (int(k) - 1) for d, k in zip(convolution.dilation, _value(convolution.weight).shape[2:])]
    return None if any(r % 2 for r in reach) else tuple(r // 2 for r in reach)


def _test_surroundings(pair: Pair) -> str | None:
    """The pair is computed where the depthwise convolution is: all it needs must be there, in the same mode."""
    graph, nodes = pair.depthwise.node.graph, pair.nodes
    computed = {node for node in pair.parameters if not _movable(node)}
    memory = {_storage(node) for node in pair.parameters} - {None}
    for node in _after(pair.depthwise.node):
        if node in computed:
            return f"{node} is computed after it"
        if getattr(node.target, "__name__", "") in _CHANGES_OF_MODE:
            return f"{node} lies between it and {nodes[-1]}"
        if node not in nodes and any(_storage(used) in memory for used in node.all_input_nodes):
            return f"{node} uses its weights before {nodes[-1]}, and might change them"
        if node is nodes[-1]:
            break
    if any("functorch" in (getattr(node.target, "__module__", None) or "") for node in graph.nodes):
        return "the graph transforms functions (torch.func)"
    return None


def _storage(node: Node) -> int | None:
    """Tells whether tensors share memory."""
    value = _value(node)
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _movable(node: Node) -> bool:
    """Whether it can be anywhere in the graph: an input, or a number that is one."""
    if node.op == "call_method" and node.target == "item":
        (node,) = node.all_input_nodes
    return node.op in ("placeholder", "get_attr")


def _after(node: Node) -> Iterator[Node]:
    node = node.next
    while node.op != "root":
        yield node
        node = node.next


def _test_template(pair: Pair) -> str | None:
    """Without the kernel there is nothing to be gained."""
    depthwise, pointwise = pair.depthwise, pair.pointwise
    tensors = depthwise.input, depthwise.weight, pointwise.weight, depthwise.bias, pointwise.bias
    values = (None if tensor is None else _value(tensor) for tensor in tensors)
    activation = IDENTITY if pair.activation is None else _activation(pair.activation)
    return refusal(OPS[OP], *values, depthwise.stride, _padding(depthwise), depthwise.dilation, activation)


_TESTS: Sequence[Callable[[Pair], str | None]] = (_test_tensors, _test_geometry, _test_surroundings, _test_template)


# Replacing


def replace(pair: Pair) -> None:
    """Put the operator in the place of the depthwise convolution, and take out what it stands for."""
    graph, first, last = pair.depthwise.node.graph, pair.depthwise.node, pair.nodes[-1]
    later = set(_after(first))
    for parameter in pair.parameters:
        if parameter in later and parameter.op != "placeholder":
            first.prepend(parameter)
    with graph.inserting_before(first):
        input = pair.depthwise.input
        memory_format = suggest_memory_format(_value(pair.pointwise.node))
        if memory_format == torch.channels_last != suggest_memory_format(_value(input)):
            # A channels_last weight makes a convolution's result channels_last, an operator's is as its input is.
            input = graph.call_method("contiguous", (input,), {"memory_format": memory_format})
        depthwise_weight, depthwise_bias = _fold(pair.depthwise, pair.depthwise_norm)
        pointwise_weight, pointwise_bias = _fold(pair.pointwise, pair.pointwise_norm)
        arguments = (
            input,
            depthwise_weight,
            pointwise_weight,
            depthwise_bias,
            pointwise_bias,
            pair.depthwise.stride,
            _padding(pair.depthwise),
            pair.depthwise.dilation,
            IDENTITY if pair.activation is None else _activation(pair.activation),
        )
        out = graph.call_function(OPS[OP].overload, arguments)
    out.meta = dict(last.meta)
    last.replace_all_uses_with(out)
    for node in reversed(pair.nodes):
        graph.erase_node(node)


def _fold(convolution: Convolution, norm: Norm | None) -> tuple[Node, Node | None]:
    """Weight and bias with the batch norm in them."""
    weight, bias = convolution.weight, convolution.bias
    if norm is None:
        return weight, bias
    call, dtype = weight.graph.call_function, _value(weight).dtype
    scale = call(torch.rsqrt, (call(torch.add, (norm.running_var, norm.eps)),))  # [K]
    if norm.weight is not None:
        scale = call(torch.mul, (scale, norm.weight))
    weight = call(torch.mul, (weight, call(torch.reshape, (scale, (-1, 1, 1, 1)))))
    shift = call(torch.neg, (norm.running_mean,)) if bias is None else call(torch.sub, (bias, norm.running_mean))
    bias = call(torch.mul, (shift, scale))
    if norm.bias is not None:
        bias = call(torch.add, (bias, norm.bias))
    if any(_value(tensor).dtype != dtype for tensor in norm.tensors):  # float32 statistics of a bfloat16 model
        weight, bias = (weight.graph.call_method("to", (tensor, dtype)) for tensor in (weight, bias))
    return weight, bias
