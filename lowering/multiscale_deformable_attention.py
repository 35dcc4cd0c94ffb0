"""multiscale_deformable_attention as one C++ kernel, and its gradients as another: see
cpp/multiscale_deformable_attention.h, multiscale_deformable_attention_backward.h."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ..ops.multiscale_deformable_attention import Arguments
from .common.layout import is_unwritten
from .common.machine import cache_bytes
from .common.registry import Template, serve_all, template_for
from .common.template import (
    BlocksTemplate,
    ResultsTemplate,
    in_cpp,
    members,
    pointer,
    size_in_cpp,
    strides,
    struct,
)
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, V, ir, lowerings

_HEADS_FIRST = [3, 1, 2, 0]  # [B, H, S, D] in memory: which rank the stride of each of B, S, H, D has


@dataclasses.dataclass(frozen=True)
class DeformableAttention:
    """What the kernels of the operator and of its gradient share.

    Attributes:
        inputs: value, locations, weights and perhaps the shapes of the levels, realized.
        sizes: height and width of each level, where they are numbers.
        points: of each level.
        strided: whether the channels of ``value`` are no neighbours.
    """

    inputs: list[ir.IRNode]
    sizes: Sequence[Any]
    points: Sequence[int]
    discrete: bool

    @classmethod
    def of(cls, call: Arguments) -> DeformableAttention:
        contiguous, realize = ir.ExternKernel.require_contiguous, ir.ExternKernel.realize_input
        value = call.value
        if is_unwritten(value):
            # All pixels of a head together. In [B, S, H, D] they are a power of two apart, so that an eighth of the
            # cache has room for them.
            value = ir.ExternKernel.require_stride_order(value, _HEADS_FIRST)
        value = realize(value)
        others = [tensor for tensor in (call.locations, call.weights, call.shapes) if tensor is not None]
        inputs = [value, *(realize(contiguous(tensor)) for tensor in others)]
        return cls(inputs, list(call.sizes), list(call.points), call.method == "discrete")

    @property
    def strided(self) -> bool:
        value = self.inputs[0]
        same = V.graph.sizevars.statically_known_equals
        return not (same(value.get_layout().stride[3], 1) or same(value.get_size()[3], 1))

    @property
    def flags(self) -> str:
        """Template arguments of the kernels."""
        return f"{in_cpp(self.discrete)}, {in_cpp(self.strided)}"

    def declare(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode]) -> str:
        """C++ that declares ``op``; ``inputs`` are the same, as the template has them."""
        value, locations, weights, *shapes = inputs
        levels = len(self.points)
        numbers = ", ".join(size_in_cpp(kernel, self.sizes))
        op = struct(
            "DeformableAttention",
            *types_of(inputs),
            value=heads_view(kernel, value),
            locations=pointer(kernel, locations),
            weights=pointer(kernel, weights),
            sizes=pointer(kernel, shapes[0]) if shapes else "sizes",
            points="points",
            levels=levels,
            batch=kernel.size(value, 0),
            pixels=kernel.size(value, 1),
            queries=kernel.size(locations, 1),
            heads=kernel.size(value, 2),
            channels=kernel.size(value, 3),
        )
        declared = "" if shapes else f"const int64_t sizes[] = {{{numbers}}};"
        return f"""{declared}
    const int64_t points[] = {{{", ".join(map(str, self.points))}}};
    const auto op = {op};"""


def types_of(inputs: Sequence[ir.IRNode]) -> list[str]:
    """The types of value, locations and weights in C++: template arguments of the kernels' structs."""
    return [DTYPE_TO_CPP[node.get_dtype()] for node in inputs[:3]]


def heads_view(kernel: CppTemplateKernel, node: ir.IRNode) -> str:
    """A tensor [B, S, H, D] as a HeadsView in C++."""
    return members(data=pointer(kernel, node), **strides(kernel, node, "batch", "pixel", "head", "channel"))


class DeformableAttentionTemplate(BlocksTemplate):
    """See cpp/multiscale_deformable_attention.h."""

    op = "multiscale_deformable_attention"
    header = "multiscale_deformable_attention.h"

    def __init__(self, attention: DeformableAttention) -> None:
        value, locations, *_ = attention.inputs
        batch, _, heads, channels = value.get_size()
        # A row of queries whose channels are neighbours.
        size = [batch, heads * channels, 1, locations.get_size()[1]]
        super().__init__(attention.inputs, value.get_dtype(), size, channels_last=True)
        self.attention = attention

    @property
    def path(self) -> str:
        return "fused, channels that are no neighbours" if self.attention.strided else "fused"

    def queries(self) -> ir.TensorBox:
        """Add the kernel to the graph; its result, ``[B, Q, H * D]``."""
        permute, view = (lowerings[op] for op in (torch.ops.aten.permute.default, torch.ops.aten.view.default))
        batch, channels, _, queries = self.size
        return view(permute(self.output(), [0, 2, 3, 1]), [batch, queries, channels])

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        return f"""
    {self.attention.declare(kernel, inputs)}
    inductor_vision::multiscale_deformable_attention<{self.attention.flags}>(op, {store});"""


def _lower(*args: Any) -> ir.TensorBox:
    return DeformableAttentionTemplate(DeformableAttention.of(Arguments(*args))).queries()


class DeformableAttentionBackwardTemplate(ResultsTemplate):
    """See cpp/multiscale_deformable_attention_backward.h."""

    op = "multiscale_deformable_attention_backward"
    header = "multiscale_deformable_attention_backward.h"
    names = ("value", "locations", "weights")

    def __init__(self, attention: DeformableAttention, grad: ir.IRNode, wanted: Sequence[bool]) -> None:
        super().__init__([grad, *attention.inputs], wanted)
        self.attention = attention

    def call(
        self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], results: dict[str, ir.Buffer]
    ) -> Sequence[str]:
        grad, *others = inputs
        gradients = struct(
            "DeformableAttentionGradients",
            *types_of(others),
            output=pointer(kernel, grad),
            **{name: pointer(kernel, results.get(name)) for name in self.names},
            bytes=cache_bytes(),
        )
        return [
            self.attention.declare(kernel, others),
            f"inductor_vision::{self.op}<{self.attention.flags}>(op, {gradients});",
        ]


def _lower_backward(grad: ir.TensorBox, *args: Any) -> list[ir.TensorBox]:
    *call, wanted = args
    contiguous = ir.ExternKernel.realize_input(ir.ExternKernel.require_contiguous(grad))
    attention = DeformableAttention.of(Arguments(*call))
    return DeformableAttentionBackwardTemplate(attention, contiguous, wanted).results()


template_for("multiscale_deformable_attention", Template(serve_all, _lower))
template_for("multiscale_deformable_attention_backward", Template(serve_all, _lower_backward))
