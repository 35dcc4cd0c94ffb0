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
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from ...ops.convolution import FLOAT_DTYPES
from ...ops.depthwise_separable_conv2d import IDENTITY
from ...ops.registry import OPS
from ...paths import record_path
from ..common.graph_pass import GraphPass
from ..common.machine import cache_bytes, multiplied_dtypes
from ..common.registry import refusal
from ..common.sizes import likely
from .calls import (
    Activation,
    ConvolutionCall,
    NormCall,
    activation_of,
    convolution_of,
    has_unknown_parameters,
    norm_of,
    value_of,
    written_out_activation_of,
)
from .changes import changed_by, memory_of
from .names import name_of

OP = "depthwise_separable_conv2d"


class FuseDepthwiseSeparable(GraphPass):
    """Replaces what it finds, and says of every depthwise convolution what became of it, and why."""

    def uuid(self) -> Any:
        """With all that decides what is done with a graph."""
        return f"{super().uuid()}-{cache_bytes()}-{multiplied_dtypes()}"

    def __call__(self, graph: Graph) -> None:
        candidates = [node for node in graph.nodes if (call := convolution_of(node)) and call.is_depthwise]
        for node in candidates:
            depthwise = convolution_of(node)  # again: its input may have been replaced
            assert depthwise is not None
            try:
                found = find_pair(depthwise)
            except Exception as error:  # of whatever kind: the graph is untouched, and compiles without the pass
                found = f"it could not be looked at: {type(error).__name__}: {error}"
            if isinstance(found, str):
                record_path(OP, "left alone", f"{depthwise}: {found}")
            else:
                replace(found)
                record_path(OP, "fused", str(found))


# Finding


@dataclasses.dataclass(frozen=True)
class Pair:
    """A depthwise convolution and the pointwise one that it goes into, with what is between and the norm behind."""

    depthwise: ConvolutionCall
    depthwise_norm: NormCall | None
    activation: Activation | None
    pointwise: ConvolutionCall
    pointwise_norm: NormCall | None

    @property
    def norms(self) -> list[NormCall]:
        return [norm for norm in (self.depthwise_norm, self.pointwise_norm) if norm is not None]

    @property
    def nodes(self) -> list[Node]:
        """All that is replaced, in order."""
        between = [] if self.depthwise_norm is None else [self.depthwise_norm.node]
        between += [] if self.activation is None else self.activation.nodes
        behind = [] if self.pointwise_norm is None else [self.pointwise_norm.node]
        return [self.depthwise.node, *between, self.pointwise.node, *behind]

    @property
    def slope(self) -> Node | None:
        """That of the activation, if it is a tensor."""
        return None if self.activation is None else self.activation.slope

    @property
    def parameters(self) -> dict[str, Node]:
        """Weights, biases, statistics and slope, by what they are to the depthwise convolution."""
        parameters = {} if self.slope is None else {"its activation's slope": self.slope}
        for owner, convolution, norm in (
            ("its", self.depthwise, self.depthwise_norm),
            ("the pointwise convolution's", self.pointwise, self.pointwise_norm),
        ):
            parameters.update({f"{owner} {name}": node for name, node in convolution.parameters.items()})
            if norm is not None:
                parameters.update({f"{owner} batch norm's {name}": node for name, node in norm.parameters.items()})
        return parameters

    @property
    def tensors(self) -> dict[str, Node]:
        """What the operator takes, by name."""
        return {"its input": self.depthwise.input, **self.parameters}

    @property
    def differentiable(self) -> bool:
        """Whether gradients may be wanted."""
        return bool(value_of(self.nodes[-1]).requires_grad)

    def __str__(self) -> str:
        return f"{self.depthwise} with {self.pointwise}"


def find_pair(depthwise: ConvolutionCall) -> Pair | str:
    """The pair that a depthwise convolution begins, or why there is none."""
    node = depthwise.node
    follower = _only_user(node)
    norm = norm_of(follower, node)
    if norm is not None:
        if norm.training or norm.running_mean is None or norm.running_var is None:
            return "its batch norm is in training mode"
        node = norm.node
        follower = _only_user(node)
    activation = (None if follower is None else activation_of(follower)) or written_out_activation_of(node)
    if activation is not None:
        node = activation.nodes[-1]
        follower = _only_user(node)
    if follower is None:
        return f"its result is not only the input of a pointwise convolution, but {_uses(node)}"
    if has_unknown_parameters(follower):
        return f"it is followed by {_name(follower)}, whose parameters are not known when it is compiled"
    pointwise = convolution_of(follower)
    if pointwise is None or pointwise.input is not node:
        return f"it is followed by {_name(follower)}, not by a pointwise convolution"
    if not pointwise.is_pointwise:
        return f"it is followed by {pointwise}, which is not a plain 1 x 1 convolution"
    pointwise_norm = norm_of(_only_user(pointwise.node), pointwise.node)
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


_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)


def _name(node: Node) -> str:
    return str(convolution_of(node) or name_of(node))


def _uses(node: Node) -> str:
    users = [_name(user) for user in node.users if user.op != "output"]
    uses = [f"that of {', '.join(users)}"] if users else []
    return ", and ".join([*uses, *(["a result"] if len(users) < len(node.users) else [])])


def _test_tensors(pair: Pair) -> str | None:
    tensors = {name: node for name, node in pair.tensors.items() if not name.endswith(" eps")}
    tensors |= {"its result": pair.depthwise.node, "the pointwise convolution's result": pair.pointwise.node}
    for name, node in {**tensors, "the last batch norm's result": pair.nodes[-1]}.items():
        value = value_of(node)
        if type(value) not in _PLAIN:
            return f"{name} is a {type(value).__name__}, not a plain tensor"
        if value.device.type != "cpu":
            return f"{name} is on {value.device}, and the kernel is for the CPU"
        if value.dtype not in FLOAT_DTYPES:
            return f"{name} is of {value.dtype}"
    if value_of(pair.depthwise.input).dim() != 4:
        return "its input has no batch"
    if pair.slope is not None and (slopes := tuple(value_of(pair.slope).shape)) != (1,):
        return f"its activation has slopes of shape {slopes}; the kernel takes one for all channels, of shape (1,)"
    return None


def _test_geometry(pair: Pair) -> str | None:
    a = pair.depthwise
    if any(isinstance(number, Node) for number in (*a.stride, *a.padding, *a.dilation)):
        return "its stride, padding or dilation is not known when it is compiled"
    return None if _padding(a) is not None else "it pads one side more than the other"


def _padding(convolution: ConvolutionCall) -> tuple[Any, ...] | None:
    """The padding in numbers; None if the sides differ."""
    if convolution.padding == "valid":
        return (0, 0)
    if convolution.padding != "same":
        return tuple(convolution.padding)
    reach = [d * (int(k) - 1) for d, k in zip(convolution.dilation, value_of(convolution.weight).shape[2:])]
    return None if any(r % 2 for r in reach) else tuple(r // 2 for r in reach)


# Nodes that change how those behind them are computed. A pair is not looked for across one.
_CHANGES_OF_MODE = (
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "_enter_inference_mode",
    "_exit_inference_mode",
)


def _test_surroundings(pair: Pair) -> str | None:
    """The pair is computed where the depthwise convolution is: all it needs must be there, in the same mode."""
    graph, last = pair.depthwise.node.graph, pair.nodes[-1]
    computed = {node: name for name, node in pair.parameters.items() if not _movable(node)}
    for node in _after(pair.depthwise.node):
        if node in computed:
            return f"{computed[node]} is computed after it"
        if getattr(node.target, "__name__", "") in _CHANGES_OF_MODE:
            return f"between it and {pair.pointwise} is {_name(node)}"
        if node is last:
            break
    if any("functorch" in (getattr(node.target, "__module__", None) or "") for node in graph.nodes):
        return "the graph transforms functions (torch.func)"
    return None


def _test_gradients(pair: Pair) -> str | None:
    """For gradients the operator saves all that it takes, which must not be changed then.

    A convolution saves its input and weight if it has gradients at all. Where the depthwise one does, who changes them
    gets the same error with the pair and without it.
    """
    if not pair.differentiable:
        return None
    weight, norm = pair.depthwise.weight, pair.depthwise_norm
    trained = [node for node in pair.depthwise.tensors[1:] + (norm.tensors if norm else []) if _is_trained(node)]
    if trained and weight not in trained:
        return "gradients are wanted of its bias or batch norm, but not of its weight"
    if not trained and not _is_trained(pair.depthwise.input):
        return f"gradients are wanted of {pair.pointwise}, but not of it: it would not save its input for them"
    memory = memory_of(pair.tensors.values())
    for node in pair.depthwise.node.graph.find_nodes(op="placeholder"):
        # AOTAutograd cannot save one. It sees plain tensors, as does Dynamo but for the type.
        if _is_subclass(node.type) and memory & memory_of([node]):
            return f"gradients are wanted, and {name_of(node)} is a {node.type.__name__}, not a plain tensor"
    return None


def _is_trained(node: Node) -> bool:
    return bool(value_of(node).requires_grad)


def _is_subclass(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Tensor) and kind not in _PLAIN


def _test_changes(pair: Pair) -> str | None:
    """No parameter may be changed in place before all of the pair was computed, and nothing that is saved thereafter.

    An input that is changed in between is none: the pair is computed where the depthwise convolution was.
    """
    tensors = pair.tensors if pair.differentiable else pair.parameters
    memory = {name: memory_of([node]) for name, node in tensors.items()}
    all_memory = set().union(*memory.values())
    nodes = set(pair.nodes)
    for node in _after(pair.depthwise.node):
        if node is pair.nodes[-1] and not pair.differentiable:
            break
        changed = set() if node in nodes else changed_by(node, all_memory)
        if changed:
            names = [name for name, of_it in memory.items() if of_it & changed]
            return f"{' and '.join(names)} may be changed in place after it, by {_name(node)}"
    return None


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
    tensors = depthwise.input, depthwise.weight, pointwise.weight, depthwise.bias, pointwise.bias, pair.slope
    values = (None if tensor is None else value_of(tensor) for tensor in tensors)
    activation = IDENTITY if pair.activation is None else pair.activation.name
    return refusal(OPS[OP], *values, depthwise.stride, _padding(depthwise), depthwise.dilation, activation)


_TILE = 96  # pixels, see Separable.blocking


def _test_gain(pair: Pair) -> str | None:
    """Whether it was found to be faster, in a network that Inductor lays out channels_last.

    Measured against two frozen convolutions in float32, with AVX2 and a second-level cache of 512 KB: the layers of
    MobileNets V1 to V3, with one image and with eight, take 0.55 to 1.03 of the time, but for those named below.
    """
    input, out = value_of(pair.depthwise.input), value_of(pair.pointwise.node)
    weight, cache = value_of(pair.pointwise.weight), cache_bytes()
    if out.dtype in multiplied_dtypes():
        return f"the processor multiplies {out.dtype} by itself, which oneDNN makes use of"
    sizes = [size for size in map(likely, (*input.shape, *out.shape)) if size is not None]
    if len(sizes) < 8:
        return None
    # 1.03 to 1.12: the pointwise weight does not stay in the cache, and each of many tiles reads it anew.
    pixels = math.prod(sizes[4:]) // out.shape[1]
    if weight.numel() * out.element_size() >= 2 * cache and pixels >= 4 * _TILE:
        return "its pointwise weight is too large to be read for each tile of pixels"
    # 1.05 to 1.5: with a stride less is saved, one hidden number for four that are read, and reading memory is all.
    bytes_read = math.prod(sizes[:4]) * input.element_size()
    if min(pair.depthwise.stride) > 1 and bytes_read >= 32 * cache:
        return f"with its stride most of the time goes into reading {bytes_read >> 20} MB of memory"
    return None


_TESTS: Sequence[Callable[[Pair], str | None]] = (
    _test_tensors,
    _test_geometry,
    _test_surroundings,
    _test_gradients,
    _test_changes,
    _test_template,
    _test_gain,
)


# Replacing


def replace(pair: Pair) -> None:
    """Put the operator in the place of the depthwise convolution, and take out what it stands for."""
    graph, first, last = pair.depthwise.node.graph, pair.depthwise.node, pair.nodes[-1]
    later = set(_after(first))
    for parameter in pair.parameters.values():
        if parameter in later and parameter.op != "placeholder":
            first.prepend(parameter)
    with graph.inserting_before(first):
        input = pair.depthwise.input
        memory_format = suggest_memory_format(value_of(pair.pointwise.node))
        if memory_format == torch.channels_last != suggest_memory_format(value_of(input)):
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
            pair.slope,
            pair.depthwise.stride,
            _padding(pair.depthwise),
            pair.depthwise.dilation,
            IDENTITY if pair.activation is None else pair.activation.name,
        )
        out = graph.call_function(OPS[OP].overload, arguments)
    out.meta = dict(last.meta)
    last.replace_all_uses_with(out)
    for node in reversed(pair.nodes):
        graph.erase_node(node)


def _fold(convolution: ConvolutionCall, norm: NormCall | None) -> tuple[Node, Node | None]:
    """Weight and bias with the batch norm in them."""
    weight, bias = convolution.weight, convolution.bias
    if norm is None:
        return weight, bias
    call, dtype = weight.graph.call_function, value_of(weight).dtype
    scale = call(torch.rsqrt, (call(torch.add, (norm.running_var, norm.eps)),))  # [K]
    if norm.weight is not None:
        scale = call(torch.mul, (scale, norm.weight))
    weight = call(torch.mul, (weight, call(torch.reshape, (scale, (-1, 1, 1, 1)))))
    shift = call(torch.neg, (norm.running_mean,)) if bias is None else call(torch.sub, (bias, norm.running_mean))
    bias = call(torch.mul, (shift, scale))
    if norm.bias is not None:
        bias = call(torch.add, (bias, norm.bias))
    if any(value_of(tensor).dtype != dtype for tensor in norm.tensors):  # float32 statistics of a bfloat16 model
        weight, bias = (weight.graph.call_method("to", (tensor, dtype)) for tensor in (weight, bias))
    return weight, bias
