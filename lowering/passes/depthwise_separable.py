"""A graph pass that finds depthwise-separable convolutions in models that were written without this package.

A depthwise convolution whose result goes, through a batch norm in eval mode and an activation or without, into a
pointwise convolution and nowhere else, becomes one call of ``depthwise_separable_conv2d``. If what the depthwise one
reads is made by another pointwise convolution, for it alone, the three become one call of ``inverted_residual_conv2d``,
unless gradients are wanted. Batch norms, that behind the last convolution too, become part of weights and biases: a few
nodes on vectors, which are computed at compile time where weights are constants. What follows stays in the graph;
Inductor fuses it into the kernel.

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
from ...ops.registry import OPS, accumulate_dtype
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
OP_WITH_EXPANSION = "inverted_residual_conv2d"


class FuseDepthwiseSeparable(GraphPass):
    """Replaces what it finds, and says of every depthwise convolution what became of it, and why."""

    def uuid(self) -> Any:
        """With all that decides what is done with a graph."""
        return f"{super().uuid()}-{cache_bytes()}-{multiplied_dtypes()}-{torch.get_num_threads()}"

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
class Layer:
    """A convolution, and the norm and activation behind it."""

    convolution: ConvolutionCall
    norm: NormCall | None
    activation: Activation | None = None

    @property
    def nodes(self) -> list[Node]:
        """In order."""
        norm = [] if self.norm is None else [self.norm.node]
        return [self.convolution.node, *norm, *(() if self.activation is None else self.activation.nodes)]

    @property
    def activation_name(self) -> str:
        return IDENTITY if self.activation is None else self.activation.name

    @property
    def slope(self) -> Node | None:
        """That of the activation, if it is a tensor."""
        return None if self.activation is None else self.activation.slope


@dataclasses.dataclass(frozen=True)
class Pair:
    """A depthwise convolution and the pointwise one that it goes into, of that only the norm; before them there may be
    an expansion, another pointwise convolution."""

    first: Layer
    last: Layer
    expansion: Layer | None = None
    apart: str = ""  # which expansion stays where it is, and why

    @property
    def depthwise(self) -> ConvolutionCall:
        return self.first.convolution

    @property
    def pointwise(self) -> ConvolutionCall:
        return self.last.convolution

    @property
    def layers(self) -> list[Layer]:
        return [layer for layer in (self.expansion, self.first, self.last) if layer is not None]

    @property
    def input(self) -> Node:
        return self.layers[0].convolution.input

    @property
    def nodes(self) -> list[Node]:
        """All that is replaced, in order."""
        return [node for layer in self.layers for node in layer.nodes]

    @property
    def slope(self) -> Node | None:
        """That of the activation between the two, if it is a tensor."""
        return self.first.slope

    @property
    def parameters(self) -> dict[str, Node]:
        """Weights, biases, statistics and slope, by what they are to the depthwise convolution."""
        parameters = {} if self.slope is None else {"its activation's slope": self.slope}
        owners = {"its": self.first, "the pointwise convolution's": self.last, "its expansion's": self.expansion}
        for owner, layer in owners.items():
            if layer is not None:
                parameters.update({f"{owner} {name}": node for name, node in layer.convolution.parameters.items()})
            if layer is not None and layer.norm is not None:
                of_norm = layer.norm.parameters.items()
                parameters.update({f"{owner} batch norm's {name}": node for name, node in of_norm})
        return parameters

    @property
    def tensors(self) -> dict[str, Node]:
        """What the operator takes, by name."""
        return {"its input": self.input, **self.parameters}

    @property
    def differentiable(self) -> bool:
        """Whether gradients may be wanted."""
        return bool(value_of(self.nodes[-1]).requires_grad)

    def __str__(self) -> str:
        before = "" if self.expansion is None else f"{self.expansion.convolution} and "
        return f"{before}{self.depthwise} with {self.pointwise}{self.apart}"


def find_pair(depthwise: ConvolutionCall) -> Pair | str:
    """The pair that a depthwise convolution begins, with the expansion if it can be taken in; or why there is none."""
    first = _find_layer(depthwise)
    if isinstance(first, str):
        return first
    node = first.nodes[-1]
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
    reason, apart = None, ""
    for expansion in dict.fromkeys((_find_expansion(depthwise), None)):  # what cannot be taken in stays where it is
        for norm in dict.fromkeys((pointwise_norm, None)):
            pair = Pair(first, Layer(pointwise, norm), expansion, apart)
            reason = next((reason for test in _TESTS if (reason := test(pair)) is not None), None)
            if reason is None:
                return pair
        apart = "" if expansion is None else f", without {expansion.convolution}: {reason}"
    return str(reason)


def _find_layer(convolution: ConvolutionCall) -> Layer | str:
    """A convolution with the norm and the activation behind it, which alone read what they are behind; or why it is
    none of a pair."""
    node = convolution.node
    follower = _only_user(node)
    norm = norm_of(follower, node)
    if norm is not None:
        if norm.training or norm.running_mean is None or norm.running_var is None:
            return "its batch norm is in training mode"
        node = norm.node
        follower = _only_user(node)
    activation = (None if follower is None else activation_of(follower)) or written_out_activation_of(node)
    return Layer(convolution, norm, activation)


_LONGEST = 6  # nodes of a norm and a written-out activation


def _find_expansion(depthwise: ConvolutionCall) -> Layer | None:
    """The pointwise convolution that makes the input of a depthwise one, for it alone."""
    node = depthwise.input
    for _ in range(_LONGEST):
        if convolution_of(node) is not None or not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
    convolution = convolution_of(node)
    layer = None if convolution is None or not convolution.is_pointwise else _find_layer(convolution)
    if not isinstance(layer, Layer) or layer.slope is not None:
        return None
    read_alone = layer.nodes[-1] is depthwise.input and _only_user(depthwise.input) is depthwise.node
    return layer if read_alone else None


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
    if value_of(pair.input).dim() != 4:
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
    """The pair is computed where its first convolution is: all it needs must be there, in the same mode."""
    graph, last = pair.depthwise.node.graph, pair.nodes[-1]
    computed = {node: name for name, node in pair.parameters.items() if not _movable(node)}
    for node in _after(pair.nodes[0]):
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
    if pair.expansion is not None:
        return "gradients are wanted, and the operator has none"
    weight, norm = pair.depthwise.weight, pair.first.norm
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

    An input that is changed in between is none: the pair is computed where its first convolution was.
    """
    tensors = pair.tensors if pair.differentiable else pair.parameters
    memory = {name: memory_of([node]) for name, node in tensors.items()}
    all_memory = set().union(*memory.values())
    nodes = set(pair.nodes)
    for node in _after(pair.nodes[0]):
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
    weights = [(layer.convolution.weight, layer.convolution.bias) for layer in pair.layers]
    values = [None if node is None else value_of(node) for node in _tensors(pair, pair.input, weights)]
    return refusal(OPS[_op(pair)], *values, *_numbers(pair))


def _op(pair: Pair) -> str:
    return OP if pair.expansion is None else OP_WITH_EXPANSION


def _tensors(pair: Pair, input: Node, weights: Sequence[tuple[Node, Node | None]]) -> list[Node | None]:
    """What the operator takes first; ``weights`` are weight and bias of each layer."""
    slope = [pair.slope] if pair.expansion is None else []
    return [input, *(weight for weight, _ in weights), *(bias for _, bias in weights), *slope]


def _numbers(pair: Pair) -> list[Any]:
    """What the operator takes behind its tensors."""
    names = [layer.activation_name for layer in pair.layers[:-1]]
    return [pair.depthwise.stride, _padding(pair.depthwise), pair.depthwise.dilation, *names]


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
    if pair.expansion is not None:
        return _test_gain_of_expansion(pair, sizes)
    # 1.05 to 1.5: with a stride less is saved, one hidden number for four that are read, and reading memory is all.
    bytes_read = math.prod(sizes[:4]) * input.element_size()
    if min(pair.depthwise.stride) > 1 and bytes_read >= 32 * cache:
        return f"with its stride most of the time goes into reading {bytes_read >> 20} MB of memory"
    return None


_MOST_REPEATED = 0.3  # of the rows


def _test_gain_of_expansion(pair: Pair, sizes: Sequence[int]) -> str | None:
    """Whether the three together were found to be faster, than the expansion by itself and the pair.

    Measured with AVX-512, 1 MB of second-level cache and two threads, in float32: the blocks of MobileNetV2 take 0.61
    of the time at 112 x 112, 0.7 to 0.9 at 56 to 14, where 0.03 to 0.14 of the rows are expanded by both threads, and
    0.98 at 7 x 7, where 0.29 are.
    """
    batch, _, height, width, *_ = sizes
    depthwise = pair.depthwise
    hidden, _, *kernel = value_of(depthwise.weight).shape
    reach = depthwise.dilation[0] * (kernel[0] - 1) + 1
    row = width * hidden * accumulate_dtype(value_of(pair.input).dtype).itemsize
    if reach * row > cache_bytes() // 2:
        return f"the {reach} rows of its input that are read at once do not stay in the cache"
    cuts = max(0, math.ceil(torch.get_num_threads() / max(1, batch)) - 1)  # within an image
    repeated = cuts * max(0, reach - depthwise.stride[0]) / height
    if repeated > _MOST_REPEATED:
        return f"{torch.get_num_threads()} threads would repeat {repeated:.0%} of the rows that are expanded"
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
    """Put the operator in the place of the first convolution, and take out what it stands for."""
    first, last = pair.nodes[0], pair.nodes[-1]
    graph, later = first.graph, set(_after(first))
    for parameter in pair.parameters.values():
        if parameter in later and parameter.op != "placeholder":
            first.prepend(parameter)
    with graph.inserting_before(first):
        input = pair.input
        memory_format = suggest_memory_format(value_of(pair.pointwise.node))
        if memory_format == torch.channels_last != suggest_memory_format(value_of(input)):
            # A channels_last weight makes a convolution's result channels_last, an operator's is as its input is.
            input = graph.call_method("contiguous", (input,), {"memory_format": memory_format})
        weights = [_fold(layer.convolution, layer.norm) for layer in pair.layers]
        arguments = (*_tensors(pair, input, weights), *_numbers(pair))
        out = graph.call_function(OPS[_op(pair)].overload, arguments)
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
