"""Inductor's table of decompositions in the hands of others, who run what they get of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inductor_vision.lowering.common.panels import pack_panels, unpack_panels
from inductor_vision.ops.registry import NAMESPACE, OPS
from inductor_vision.tests.support import (
    convolution,
    deform_conv2d as deformable,
    depthwise_separable_conv2d as separable,
    patch_conv2d as patches,
    winograd_conv2d as winograd,
)
from inductor_vision.tests.support.boxes import Boxes, RotatedBoxes
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.grid_sampler_2d import Case as Warp
from inductor_vision.tests.support.heatmaps_to_keypoints import Heatmaps
from inductor_vision.tests.support.multiscale_deformable_attention import Case as Attention
from inductor_vision.tests.support.paste_masks import Case as Paste
from inductor_vision.tests.support.regions import OPERATORS, sample as sample_regions
from inductor_vision.tests.support.upsample2d import MODES as RESIZING_MODES, Case as Resize
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

CONVOLUTIONS = {
    "deform_conv2d": deformable,
    "patch_conv2d": patches,
    "depthwise_separable_conv2d": separable,
    "winograd_conv2d": winograd,
}


def calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """A call of each operator, as the arguments of its schema."""
    for op, module in CONVOLUTIONS.items():
        s = module.sample("plain" if module is not deformable else "groups_2")
        yield op, s.positional
        yield f"{op}_backward", backward(op, s)
    for op in OPERATORS:
        regions = sample_regions(op, "plain")
        yield op, regions.positional
        yield f"{op}_backward", regions.positional_backward
    image, weight, bias = torch.randn(2, 5, 7, 9), torch.randn(6, 5, 3, 3), torch.randn(6)
    yield "direct_conv2d", (image, weight, bias, [2, 1], [1, 1], [1, 1])
    weights = torch.randn(20, 5, 1, 1), torch.randn(20, 1, 3, 3), torch.randn(6, 20, 1, 1)
    biases = torch.randn(20), torch.randn(20), torch.randn(6)
    yield "inverted_residual_conv2d", (image, *weights, *biases, [2, 1], [1, 1], [1, 1], "relu6", "silu")
    boxes, scores, classes = Boxes(12).tensors()
    rotated, _, _ = RotatedBoxes(12).tensors()
    yield "nms", (boxes, scores, classes, 0.5)
    yield "soft_nms", (boxes, scores, classes, 0.3, 0.5, 0.001, "linear")
    yield "nms_rotated", (rotated, scores, classes, 0.3)
    yield "box_iou_rotated", (rotated, rotated[:5])
    yield "heatmaps_to_keypoints", Heatmaps().tensors()
    yield "paste_masks", Paste().positional
    yield "paste_masks_backward", Paste().positional_backward
    yield "multiscale_deformable_attention", Attention().positional
    yield "multiscale_deformable_attention_backward", Attention(as_tensor=True).positional_backward
    for mode in RESIZING_MODES:
        resize = Resize(mode=mode)
        yield resize.op.name, resize.positional
        yield resize.op.backward.name, resize.positional_backward
    yield "grid_sampler_2d", Warp().positional
    yield "grid_sampler_2d_backward", Warp().positional_backward


def backward(op: str, s: convolution.Sample) -> tuple[Any, ...]:
    """The arguments of the operator of the gradients."""
    return convolution.gradient_like(OPS[op](*s.positional)), *s.positional, s.wanted


CALLS = dict(calls())


def test_every_operator_has_a_call():
    assert CALLS.keys() == OPS.keys()


class Call(nn.Module):
    """An operator as a model of the tensors among its arguments, wherever they are."""

    def __init__(self, op: str, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.op = OPS[op]
        leaves, self.spec = tree_flatten(arguments)
        self.others = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        self.tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def forward(self, *tensors: Tensor) -> Any:
        left = iter(tensors)
        leaves = [self.others[i] if i in self.others else next(left) for i in range(self.spec.num_leaves)]
        return self.op(*tree_unflatten(leaves, self.spec))


def assert_same(result: Any, call: Call, dtype: torch.dtype = torch.float32) -> None:
    results, expected = ([value] if isinstance(value, Tensor) else value for value in (result, call(*call.tensors)))
    assert len(results) == len(expected)
    for got, wanted in zip(results, expected):
        assert (got.dtype, got.stride()) == (wanted.dtype, wanted.stride())
        assert_close(got, wanted, dtype)


def debugged(call: Call) -> Any:
    """On the backend with which a fault is looked for: all of Inductor but Inductor."""
    return torch.compile(call, backend="aot_eager_decomp_partition", fullgraph=True)(*call.tensors)


def decomposed(call: Call) -> Any:
    exported = torch.export.export(call, call.tensors)
    return exported.run_decompositions(select_decomp_table()).module()(*call.tensors)


@pytest.mark.parametrize("route", [debugged, decomposed])
@pytest.mark.parametrize("op", CALLS)
def test_every_operator_runs(route, op):
    call = Call(op, CALLS[op])
    assert_same(route(call), call)


def internal_operators() -> set[str]:
    prefix = f"{NAMESPACE}::"
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)} - OPS.keys()


CASES = {
    "deform_conv2d": ("shared", "depthwise_37", "groups_across_offset_groups", "all_channels_last"),
    "patch_conv2d": (
        "numbers",
        "stride_3x4",
        "channels_37_to_19",
        "groups_3_of_17",
        "channels_first_strided",
        "channels_last_strided",
        "no_patches",
    ),
    "depthwise_separable_conv2d": (
        "then_gelu",
        "stride_padding_dilation",
        "channels_37_to_19",
        "multiplier_3_of_5",
        "multiplier_channels_last",
        "empty_batch",
    ),
}


def traced(op: str, arguments: tuple[Any, ...]) -> tuple[Any, list[str]]:
    """The result of a call's graph, with Inductor's decompositions, and which internal operators are in it."""
    call = Call(op, arguments)
    graph = make_fx(call, decomposition_table=select_decomp_table())(*call.tensors)
    names = [node.target.__name__.partition(".")[0] for node in graph.graph.nodes if node.op == "call_function"]
    return graph(*call.tensors), [name for name in names if name in internal_operators()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", CASES)
def test_internal_operators_compute_what_they_stand_for(op, dtype):
    for name in CASES[op]:
        s = CONVOLUTIONS[op].sample(name, dtype)
        for internal, arguments in ((op, s.positional), (f"{op}_backward", backward(op, s))):
            result, found = traced(internal, arguments)
            assert internal == "deform_conv2d_backward" or found, f"{internal}, {name}"
            assert_same(result, Call(internal, arguments), dtype)


def test_every_internal_operator_is_among_them():
    found = {name for op, arguments in CALLS.items() for name in traced(op, arguments)[1]}
    assert found == internal_operators()
    assert len(found) > 1


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("outputs", [1, 16, 37])
def test_panels_are_unpacked(outputs, pairs):
    weight = torch.randn(3, outputs, 4, 9).bfloat16()
    assert torch.equal(unpack_panels(pack_panels(weight, pairs), outputs).to(weight.dtype), weight)
