"""A graph pass that has convolutions compute the affine maps behind them, of each channel by constants.

Such are batch norms in eval mode, torchvision's ``FrozenBatchNorm2d``, scales and shifts of one's own:

    a * conv(x, w, b) + c = conv(x, a * w, a * b + c)

Inductor does so where all is of one dtype. In low precision it often does not: under autocast a cast stands between a
convolution and its norm. The norm is then a loop over the convolution's result, and the activation and the residual
behind it are too. Here casts in between are part of the map. New weights are computed in float64, from what weights
and norms were before they were rounded, and rounded once.

For the same reason casts behind a convolution are moved behind its residual and its activation, where what these give
is rounded anyway: Inductor then has the convolution compute both before it rounds.

It runs on graphs of aten operators in which weights are constants: under freezing.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, map_arg

from ...paths import record_path
from ..common.graph_pass import GraphPass, call
from ..inductor.tables import config
from .constants import constants_of
from .names import layer_of

OP = "convolution"

_aten, _prims = torch.ops.aten, torch.ops.prims
_CAST = _prims.convert_element_type.default
_MAPS = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.neg.default)

# The dtypes that a map may be computed in, by that of the convolution. Products of weights and scales leave the range
# of float16, and float64 would lose what it is there for.
_DTYPES = {
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float32: (torch.bfloat16, torch.float32),
    torch.float64: (torch.float64,),
}


class FoldAffineMaps(GraphPass):
    """Changes weights and biases, and says of every convolution before an affine map what became of it, and why."""

    def __call__(self, graph: Graph) -> None:
        if not config.freezing or torch.is_grad_enabled():
            return  # weights are not constants
        try:
            constants, rounded = constants_of(graph), rounded_later(graph)
            for conv in graph.find_nodes(op="call_function", target=_aten.convolution.default):
                fold_maps(conv, constants, rounded)
            rounded = rounded_later(graph)  # anew, with what is in the place of the maps
            for node in list(graph.nodes):
                _cast_later(node, rounded)
        except Exception as error:  # of whatever kind: after each replacement the graph is one that compiles
            record_path(OP, "left alone", f"the graph could not be looked at: {type(error).__name__}: {error}")
        graph.eliminate_dead_code()


def fold_maps(conv: Node, constants: set[Node], rounded: set[Node]) -> Node:
    """Fold the maps behind a convolution, if there are any, and report it; the convolution as it is then."""
    steps = list(_steps(conv, constants))
    if all(step.node.target is _CAST for step in steps):
        return conv
    reason = _why_not(conv, steps[-1].node, constants, rounded)
    folded = conv if reason is not None else _fold(conv, steps)
    record_path(OP, *_outcome(conv, steps, reason))
    return folded


def _outcome(conv: Node, steps: list[_Step], reason: str | None) -> tuple[str, str]:
    """``layer1.0.conv1 (3 x 3, 64 channels) with sub, mul, add``, and what became of it."""
    weight: Any = conv.args[1]
    kernel = " x ".join(map(str, weight.meta["val"].shape[2:]))
    operators: list[Any] = [step.node.target for step in steps if step.node.target is not _CAST]
    maps = ", ".join(operator.__name__.partition(".")[0] for operator in operators)
    what = f"{layer_of(conv)[0] or 'a convolution'} ({kernel}, {conv.meta['val'].shape[1]} channels) with {maps}"
    return ("fused", what) if reason is None else ("left alone", f"{what}: {reason}")


# What is done with a value before it is rounded, and leaves the error of its rounding as it is, relative to the result.
_KEEP_ROUNDING = {
    *(_aten.add.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.neg.default, _aten.relu.default),
    *(_aten.exp.default, _aten.log1p.default, _aten.sigmoid.default, _aten.tanh.default, _aten.erf.default),
    *(_aten.clamp_min.default, _aten.clamp_max.default, _aten.clamp.default, _aten.hardtanh.default),
    *(_aten.minimum.default, _aten.maximum.default, _aten.where.self, _aten.gt.Scalar),
    *(_aten.mean.dim, _aten._adaptive_avg_pool2d.default, _aten.avg_pool2d.default),
    *(_aten.max_pool2d_with_indices.default, _prims._low_memory_max_pool_with_offsets.default, operator.getitem),
    *(_aten.view.default, _aten.reshape.default, _aten.squeeze.dims, _aten.permute.default, _aten.clone.default),
    *(_aten.cat.default, _aten.split_with_sizes.default, _aten.slice.Tensor),
}


def rounded_later(graph: Graph) -> set[Node]:
    """The values that are rounded to a low precision wherever they go, sooner or later."""
    rounded: set[Node] = set()

    def rounds(user: Node) -> bool:
        return _is_low(user) or (user in rounded and user.target in _KEEP_ROUNDING)

    for node in reversed(graph.nodes):
        if node.users and all(map(rounds, node.users)):
            rounded.add(node)
    return rounded


def _is_low(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


# Finding


@dataclasses.dataclass(frozen=True)
class _Step:
    """An operator on a convolution's result that is an affine map of each channel, or a cast.

    Attributes:
        node: computes it.
        other: what it adds, multiplies by and so on: a constant or a number.
        reversed: ``other`` comes first.
    """

    node: Node
    other: Any = None
    reversed: bool = False


def _steps(conv: Node, constants: set[Node]) -> Iterator[_Step]:
    """The maps that follow a convolution, one after the other, and are all that becomes of its result."""
    node = conv
    while len(node.users) == 1:
        (user,) = node.users
        step = _step(user, node, conv, constants)
        if step is None:
            return
        yield step
        node = user


def _step(user: Node, node: Node, conv: Node, constants: set[Node]) -> _Step | None:
    value, result = user.meta.get("val"), conv.meta["val"]
    if not isinstance(value, Tensor) or value.dtype not in _DTYPES.get(result.dtype, ()):
        return None
    if user.target is _CAST or user.target is _aten.neg.default:
        return _Step(user)
    if user.target not in _MAPS or len(user.args) != 2 or isinstance(user.kwargs.get("alpha"), Node):
        return None
    reversed = user.args[1] is node
    other = user.args[0 if reversed else 1]
    if user.target is _aten.div.Tensor and (reversed or other == 0):
        return None
    if any(follower.target is _aten.clamp_min.default for follower in user.users) and other == 3:
        return None  # relu6(x + 3) / 6, a hardsigmoid, which Inductor has the convolution compute
    return _Step(user, other, reversed) if _is_of_channels(other, result, constants) else None


def _is_of_channels(value: Any, result: Tensor, constants: set[Node]) -> bool:
    """Whether it is a number, or a constant with one number for each channel of the result, or for all."""
    if not isinstance(value, Node):
        return isinstance(value, (int, float))
    if value not in constants or not isinstance(value.meta.get("val"), Tensor):
        return False
    shape = value.meta["val"].shape
    channels = ([1] * (result.dim() - len(shape)) + list(shape))[1]
    return len(shape) <= result.dim() and value.meta["val"].numel() == channels and channels in (1, result.shape[1])


def _why_not(conv: Node, last: Node, constants: set[Node], rounded: set[Node]) -> str | None:
    """The reason why a convolution cannot have other weights, and what the last map gives, if there is one."""
    weight, bias = conv.args[1:3]
    if weight not in constants:
        return "its weight is not a constant"
    if bias is not None and bias not in constants:
        return "its bias is not a constant"
    if conv.args[0] in constants:
        return "it is a constant"
    if _is_low(conv) and not _is_low(last) and last not in rounded:
        return f"the result is wanted in {last.meta['val'].dtype}, and a convolution gives {conv.meta['val'].dtype}"
    return None


# Folding

_Value = Any  # a number, or a node whose value is a vector of float64, of one number or one for each channel


def _fold(conv: Node, steps: list[_Step]) -> Node:
    """Put a convolution of other weights, which is returned, in the place of the last step, and of all before it."""
    result, last = conv.meta["val"], steps[-1].node
    arguments: Any = conv.args
    input, weight, bias, stride, padding, dilation, transposed, output_padding, groups = arguments
    with conv.graph.inserting_before(last):  # all constants are there
        scale: _Value = 1.0
        shift: _Value = _in_float64(bias) if isinstance(bias, Node) else 0.0
        for step in steps:
            scale, shift = _then(step, scale, shift)
        weight, channels = _in_float64(weight), result.shape[1]
        if bias is not None or shift != 0.0:
            # A number for each channel. Inductor computes no constants of nothing but numbers, such as aten.full.
            some = call(_aten.slice.Tensor, call(_aten.reshape.default, weight, [-1]), 0, 0, channels)
            shift = _plus(call(_aten.zeros_like.default, some), shift)
            bias = call(_CAST, shift, result.dtype)
        if isinstance(scale, Node) and scale.meta["val"].numel() == channels:
            inputs, *_ = shape = list(weight.meta["val"].shape)
            kernel = [1] * (len(shape) - 2)
            if transposed:  # [inputs, outputs of a group, ...]
                scale = call(_aten.reshape.default, scale, [groups, 1, -1])
                scale = call(_aten.expand.default, scale, [groups, inputs // groups, shape[1]])
                scale = call(_aten.reshape.default, scale, [*shape[:2], *kernel])
            else:
                scale = call(_aten.reshape.default, scale, [-1, 1, *kernel])
        weight = call(_CAST, _times(weight, scale), result.dtype)
        folded = call(conv.target, input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
        folded.meta = {**conv.meta, **folded.meta}  # of which layer it is
        out = folded
        if last.meta["val"].dtype != result.dtype:
            out = call(_CAST, folded, last.meta["val"].dtype)
    last.replace_all_uses_with(out)
    return folded


def _then(step: _Step, scale: _Value, shift: _Value) -> tuple[_Value, _Value]:
    """Scale and shift of the maps so far, and then this one."""
    op, other = step.node.target, step.other
    if isinstance(other, Node):
        other = call(_aten.reshape.default, _in_float64(other), [-1])
    factor: _Value = 1.0
    summand: _Value = 0.0
    if op in (_aten.add.Tensor, _aten.sub.Tensor):  # the second operand is multiplied
        alpha: Any = step.node.kwargs.get("alpha", 1)
        alpha = alpha * (1.0 if op is _aten.add.Tensor else -1.0)
        factor, summand = (alpha, other) if step.reversed else (1.0, _times(other, alpha))
    elif op is _aten.mul.Tensor:
        factor = other
    elif op is _aten.div.Tensor:
        factor = call(_aten.reciprocal.default, other) if isinstance(other, Node) else 1 / other
    elif op is _aten.neg.default:
        factor = -1.0
    return _times(scale, factor), _plus(_times(shift, factor), summand)


# How parameters become factors and summands: computed again in float64, they are rounded once, with the weight.
_ARITHMETIC = {
    *_MAPS,
    *(_aten.sqrt.default, _aten.rsqrt.default, _aten.reciprocal.default, _aten.pow.Tensor_Scalar),
    *(_aten.view.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.permute.default, _aten.expand.default),
}


# Casts between these round, and do nothing else.
_ROUNDED = {torch.bfloat16, torch.float16, torch.float32, torch.float64}


def _in_float64(node: Node) -> Node:
    """A constant's value, computed in float64 from what was not rounded yet."""
    if node.target is _CAST and {node.meta["val"].dtype, node.args[0].meta["val"].dtype} <= _ROUNDED:  # type: ignore[union-attr]
        return _in_float64(node.args[0])  # type: ignore[arg-type]  # what is cast is a node
    if node.target in _ARITHMETIC and node.meta["val"].is_floating_point():
        args = map_arg(node.args, _in_float64)
        return call(node.target, *args, **node.kwargs)
    return call(_CAST, node, torch.float64)


def _times(left: _Value, right: _Value) -> _Value:
    return _commuting(_aten.mul.Tensor, operator.mul, left, right)


def _plus(left: _Value, right: _Value) -> _Value:
    return _commuting(_aten.add.Tensor, operator.add, left, right)


def _commuting(op: Any, of_numbers: Callable[[float, float], float], left: _Value, right: _Value) -> _Value:
    if isinstance(left, Node):
        return call(op, left, right)
    return call(op, right, left) if isinstance(right, Node) else of_numbers(left, right)


# Casts


def _cast_later(node: Node, rounded: set[Node]) -> None:
    """Move a cast to float32 from before an activation, or the sum with a residual, to behind it.

    An activation gives the same before a cast and behind it. A sum is rounded then: it is left alone unless it is
    rounded to bfloat16 anyway, wherever it goes, and at once for the convolution that comes next.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or node.kwargs:
        return
    if node.target is _aten.relu.default:
        operands = [_uncast(node.args[0])]
        computed = operands[0] is not None and operands[0].target in (_aten.convolution.default, _aten.add.Tensor)
    elif node.target is _aten.add.Tensor and node in rounded and any(map(_is_rounded, (node, *_activations(node)))):
        operands = [_uncast(argument) or _rounded(argument, node) for argument in node.args]
        computed = any(operand is not None and operand.target is _aten.convolution.default for operand in operands)
    else:
        return
    if not computed or not all(operands):
        return
    with node.graph.inserting_before(node):
        out = call(_CAST, call(node.target, *operands), torch.float32)
    node.replace_all_uses_with(out)


def _uncast(argument: Any) -> Node | None:
    """What a value is in bfloat16, exactly."""
    if not isinstance(argument, Node):
        return None
    source = argument.args[0] if argument.target is _CAST else argument
    return source if isinstance(source, Node) and _is_bfloat16(source) else None


def _rounded(argument: Any, before: Node) -> Node | None:
    """What a value is rounded to in bfloat16, computed already."""
    users = argument.users if isinstance(argument, Node) else ()
    return next((user for user in users if user.target is _CAST and _is_bfloat16(user) and user < before), None)


def _is_rounded(node: Node) -> bool:
    return any(user.target is _CAST and _is_bfloat16(user) for user in node.users)


def _activations(node: Node) -> Iterator[Node]:
    return (user for user in node.users if user.target is _aten.relu.default)


def _is_bfloat16(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16
