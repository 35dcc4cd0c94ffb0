"""A graph pass that has kernels of this package compute a model's stock convolutions, where these are faster.

It runs on graphs of aten operators, before Inductor has parted forward and backward passes, or taken weights for
constants and packed them. There functions, modules and methods are one operator, padding is in numbers, casts stand
where autocast makes them, and nothing is changed in place. The gradient by the input is a convolution like others.

What kernels there are, what each can take and what it costs is in ``convolution_kernels.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._prims_common import suggest_memory_format
from torch.fx import Graph, Node, map_arg
from torch.fx.experimental.proxy_tensor import make_fx

from ...ops.winograd_conv2d import rotated
from ...paths import record_path
from ..common.graph_pass import GraphPass
from ..common.machine import level, multiplied_dtypes, vector_bits
from ..common.sizes import likely
from ..inductor.tables import config, select_decomp_table
from .affine_maps import fold_maps, rounded_later
from .constants import constants_of
from .convolution_kernels import Choice, Convolution, ConvolutionKernel, Program, library_seconds
from .names import layer_of

OP = "conv2d"

_aten = torch.ops.aten


class ChooseConvolutions(GraphPass):
    """Puts kernels in the place of convolutions, and says of every convolution what became of it, and why."""

    def __init__(self, version: Any, kernels: Sequence[ConvolutionKernel], growth: float) -> None:
        """
        Args:
            kernels: what there is to choose from beside oneDNN's.
            growth: by how much of their size constants may grow.
        """
        super().__init__(version)
        self.kernels = tuple(kernels)
        self.growth = growth

    def uuid(self) -> Any:
        """With all that decides what is done with a graph."""
        machine = f"{vector_bits()}-{multiplied_dtypes()}-{torch.get_num_threads()}"
        return f"{super().uuid()}-{self.kernels}-{self.growth}-{machine}"

    def __call__(self, graph: Graph) -> None:
        constants, rounded = constants_of(graph), rounded_later(graph)
        room = self.growth * sum(_bytes(node) for node in constants if node.op != "call_function")
        sites = [*_forward(graph, constants), *_gradients(graph)]
        inserted: dict[Any, Node] = {}
        for site, decision in zip(sites, _decide(sites, self.kernels, room)):
            if isinstance(decision, Choice):
                if site.constant and not site.gradient:  # Inductor folds no norm into a kernel that is not its own
                    site = dataclasses.replace(site, node=fold_maps(site.node, constants, rounded))
                _replace(site, decision.program, inserted)
                record_path(OP, "replaced", f"{site} by {decision.name}")
            else:
                record_path(OP, "left alone", f"{site}: {decision}")
        graph.eliminate_dead_code()


def _bytes(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.itemsize if isinstance(value, Tensor) else 0


# Finding


@dataclasses.dataclass(frozen=True)
class Site:
    """A convolution in a graph.

    Attributes:
        node: computes it; if it is the gradient of an input, that of weight and bias too.
        gradient: whether it is one.
        constant: whether its weight is known when the graph is compiled.
    """

    node: Node
    gradient: bool
    constant: bool

    @property
    def input(self) -> Any:
        return self.node.args[0]

    @property
    def weight(self) -> Any:
        return self.node.args[2 if self.gradient else 1]

    @property
    def convolution(self) -> Convolution | None:
        """What kernels are told of it; None where data decide about the size of the map."""
        of_node: Any = self.node.args
        stride, padding, dilation, transposed, _, groups = of_node[4:10] if self.gradient else of_node[3:9]
        result = of_node[1].meta["val"] if self.gradient else self.node.meta["val"]
        kernel = tuple(int(n) for n in self.weight.meta["val"].shape[2:])
        if self.gradient:
            padding = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding)]
        size = [n for n in map(likely, result.shape[2:]) if n is not None]
        if len(size) < result.dim() - 2:
            return None
        return Convolution(
            batch=likely(result.shape[0]) or 1,
            channels=int(self.input.meta["val"].shape[1]),
            out_channels=int(result.shape[1]),
            size=tuple(size),
            kernel=kernel,
            stride=tuple(stride),
            padding=tuple(padding),
            dilation=tuple(dilation),
            transposed=transposed,
            groups=groups,
            dtype=result.dtype,
            device=result.device.type,
            constant=self.constant,
        )

    def __str__(self) -> str:
        layer = layer_of(self.node)[0] or "a convolution"
        what = f"the gradient of the input of {layer}" if self.gradient else layer
        return f"{what} ({self.convolution or 'a map of unknown size'})"


def _forward(graph: Graph, constants: set[Node]) -> Iterator[Site]:
    for node in graph.find_nodes(op="call_function", target=_aten.convolution.default):
        yield Site(node, gradient=False, constant=node.args[1] in constants)


def _gradients(graph: Graph) -> Iterator[Site]:
    for node in graph.find_nodes(op="call_function", target=_aten.convolution_backward.default):
        if node.args[-1][0]:
            yield Site(node, gradient=True, constant=False)


# Choosing

_LEAST_GAIN = 0.05  # of the time; less may be the error of an estimate


def _decide(sites: Sequence[Site], kernels: Sequence[ConvolutionKernel], room: float) -> list[Choice | str]:
    """For each convolution what computes it, or why it is left alone.

    What takes memory gets it in the order of time saved for each byte. Convolutions of one weight share its copy.

    Args:
        room: how many bytes constants may grow by.
    """
    decisions: list[Choice | str] = []
    saved = [0.0] * len(sites)
    growing: dict[tuple[Node, str], list[tuple[int, Choice, float]]] = defaultdict(list)
    for i, site in enumerate(sites):
        faster, reason = _faster(site.convolution, kernels)
        decisions.append(reason)
        for choice, seconds in faster.items():
            if choice.growth:
                growing[site.weight, choice.name].append((i, choice, seconds))
            elif seconds > saved[i]:
                decisions[i], saved[i] = choice, seconds

    def saved_by_byte(uses: list[tuple[int, Choice, float]]) -> float:
        return sum(seconds - saved[i] for i, _, seconds in uses) / uses[0][1].growth

    for uses in sorted(growing.values(), key=saved_by_byte, reverse=True):
        uses = [use for use in uses if use[2] > saved[use[0]]]
        growth = uses[0][1].growth if uses else 0
        for i, choice, seconds in uses:
            if growth <= room:
                decisions[i], saved[i] = choice, seconds
            elif isinstance(decisions[i], str):
                decisions[i] = (
                    f"{choice.name} would make the constants {growth / 1e6:.1f} MB larger, for which there is no room"
                )
        room -= growth if growth <= room else 0
    return decisions


def _faster(convolution: Convolution | None, kernels: Sequence[ConvolutionKernel]) -> tuple[dict[Choice, float], str]:
    """The ways to compute it that are faster than oneDNN's, and by how many seconds; and why others are not taken."""
    if convolution is None:
        return {}, "what is faster depends on the size"
    usual, reasons = library_seconds(convolution), []
    faster: dict[Choice, float] = {}
    candidates: list[Choice] = []
    for kernel in kernels:
        reason = kernel.refusal(convolution)
        if reason is not None:
            reasons.append(reason)
            continue
        choices = kernel.choices(convolution)
        candidates += choices
        faster |= {choice: usual - choice.seconds for choice in choices if choice.seconds < (1 - _LEAST_GAIN) * usual}
        best = min(choices, key=lambda choice: choice.seconds)
        reasons.append(f"{best.name} is estimated to take {best.seconds / usual:.2f} of the time")
    if candidates and config.max_autotune and level() is None:  # what is measured here says nothing of other machines
        return _measured(convolution, candidates, faster)
    return faster, "; ".join(dict.fromkeys(reasons))


def _measured(
    convolution: Convolution, candidates: Sequence[Choice], faster: dict[Choice, float]
) -> tuple[dict[Choice, float], str]:
    """The way that was measured to be fastest, and, should there be no room for it, those that make constants no larger
    and are estimated to be ``faster``. How much time it saves is estimated all the same, and decides about memory."""
    from .convolution_times import fastest_choice  # it needs more of Inductor than there is when passes are entered

    best = fastest_choice(convolution, candidates)
    if best is None:
        return {}, "oneDNN's was measured to be faster"
    least = _LEAST_GAIN * library_seconds(convolution)
    others = {choice: seconds for choice, seconds in faster.items() if best.growth and not choice.growth}
    return {**others, best: max([faster.get(best, least), *others.values()])}, ""


# Replacing


def _replace(site: Site, program: Program, inserted: dict[Any, Node]) -> None:
    """Put a program in the place of a convolution; ``inserted`` are the nodes of earlier ones, and used again."""
    node = site.node
    arguments: list[Any] = list(node.args)
    if not site.gradient:
        node.replace_all_uses_with(_insert(program, node, arguments[:3], node.meta["val"], inserted))
        return
    (grad, input, weight), groups, mask = arguments[:3], arguments[-2], arguments[-1]

    def gradient(grad: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return program(grad, rotated(weight, groups), bias)

    out = _insert(gradient, node, [grad, weight, None], input.meta["val"], inserted)
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            user.replace_all_uses_with(out)
            node.graph.erase_node(user)
    node.args = (*arguments[:-1], [False, *mask[1:]])
    node.meta["val"] = (None, *node.meta["val"][1:])


def _insert(program: Program, before: Node, arguments: Sequence[Any], like: Tensor, inserted: dict[Any, Node]) -> Node:
    """The nodes of a program, and its result, which has the memory format of ``like``."""
    tensors = [argument for argument in arguments if argument is not None]

    def call(*values: Tensor) -> Tensor:
        input, weight, *bias = values
        if (wanted := suggest_memory_format(like)) != suggest_memory_format(input):
            # A channels_last weight makes a convolution's result channels_last, an operator's is as its input is.
            input = input.contiguous(memory_format=wanted)
        return program(input, weight, bias[0] if bias else None)

    values = [tensor.meta["val"] for tensor in tensors]
    with contextlib.ExitStack() as contexts:
        for context in (enable_python_dispatcher(), torch.no_grad(), torch._C._DisableAutocast()):
            contexts.enter_context(context)
        contexts.enter_context(detect_fake_mode(values) or contextlib.nullcontext())
        traced = make_fx(call, select_decomp_table(), tracing_mode="real")(*values)
    traced.graph.eliminate_dead_code()
    found: dict[Node, Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), tensors))
    graph = before.graph
    with graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), found.__getitem__)
                key = node.target, str(args), str(kwargs)
                if key not in inserted or not inserted[key] < before:  # sites are not in the order of nodes
                    inserted[key] = graph.call_function(node.target, args, kwargs)
                    inserted[key].meta = {**before.meta, **node.meta}  # of which layer it is
                found[node] = inserted[key]
    (result,) = traced.graph.output_node().all_input_nodes
    return found[result]
