"""Frozen graphs, and what is left in them behind convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._inductor.lowering  # from here on this package is among its tables
from inductor_vision import accelerate_torchvision
from inductor_vision.lowering.passes.affine_maps import FoldAffineMaps
from inductor_vision.perf.backends import Autocast
from inductor_vision.tests.support.compiled import Traced, caches_disabled, trace_and_run
from torch import Tensor, nn
from torch._inductor import config, graph, ir
from torch.fx import Graph, Node

CONVOLUTIONS = ("aten.convolution", "mkldnn._convolution_pointwise", "mkldnn._convolution_transpose_pointwise")


def freeze_and_run(fn: Callable[..., Any], *args: Any, fold: bool = True, **options: Any) -> Traced:
    """Trace and freeze a function, with affine maps folded or as Inductor does it, and run what it has become."""
    config = {"freezing": True, "joint_custom_pre_pass": [FoldAffineMaps("tested")] if fold else []}
    torch._dynamo.reset()
    with torch.no_grad():
        return trace_and_run(fn, *args, config=config, **options)


def is_called(node: Node, *names: str) -> bool:
    return str(node.target).rpartition(".")[0] in names


def convolutions(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if is_called(node, *CONVOLUTIONS)]


def affine_maps_left(graph: Graph) -> list[Node]:
    """Operators that are nothing but affine maps, by constants, of a convolution's result."""
    return [map for conv in convolutions(graph) if (map := _affine_map_of(conv)) is not None]


def _affine_map_of(result: Node) -> Node | None:
    if len(result.users) != 1:
        return None
    (user,) = result.users
    if is_called(user, "prims.convert_element_type"):
        return _affine_map_of(user)
    names = "aten.add", "aten.sub", "aten.mul", "aten.div", "aten.neg"
    others = [value for value in user.args if value is not result]
    constant = all(not isinstance(value, Node) or value.op == "get_attr" for value in others)
    if not is_called(user, *names) or not constant:
        return None
    # One of a hardsigmoid, relu6(x + 3) / 6, which Inductor has the convolution compute.
    hardsigmoid = others == [3] and is_called(user, "aten.add")
    return None if hardsigmoid and any(is_called(follower, "aten.clamp_min") for follower in user.users) else user


def casts(graph: Graph) -> list[Node]:
    """Casts of what is computed."""
    found = [node for node in graph.nodes if is_called(node, "prims.convert_element_type")]
    return [node for node in found if node.args[0].op != "placeholder"]


def assert_norms_are_folded(detector: nn.Module, image: Tensor, precision: str) -> None:
    """Of a detector, under "autocast" or converted to "bfloat16"; there must be some, but for SSD300."""
    if precision == "bfloat16":
        detector, image = detector.bfloat16(), image.bfloat16()
    accelerate_torchvision()
    traced = freeze_and_run(Autocast(detector) if precision == "autocast" else detector, [image])
    kinds = {path.kind for path in traced.paths if path.op == "convolution"}
    has_norms = any("Norm" in type(layer).__name__ for layer in detector.modules())
    assert kinds == ({"fused"} if has_norms else set())
    assert [map for graph in traced.graphs for map in affine_maps_left(graph)] == []


class _Lowered(Exception):
    """All that is wanted of Inductor is done."""


@torch.no_grad()
def copies_of_maps(fn: Callable[..., Any], *args: Any) -> list[tuple[str, list[str]]]:
    """Which maps Inductor copies into another memory format, frozen: for which operator, and their sizes.

    A function is lowered only; no code is generated.
    """
    copies = []
    original = ir.ExternKernel.copy_input

    def copy_input(x: Any) -> Any:
        if len(x.get_size()) == 4 and x.maybe_get_layout() is not None:  # of others the copy is all that is written
            copies.append((str(ir.V.graph.current_node.target), [str(size) for size in x.get_size()]))
        return original(x)

    def stop(self: Any) -> None:
        raise _Lowered

    torch._dynamo.reset()
    with (
        patch.object(ir.ExternKernel, "copy_input", staticmethod(copy_input)),
        patch.object(graph.GraphLowering, "compile_to_module", stop),
        caches_disabled(),
        config.patch(freezing=True),
        pytest.raises(Exception, match="_Lowered"),
    ):
        torch.compile(fn, fullgraph=True)(*args)
    return copies
