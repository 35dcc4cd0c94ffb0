"""One AOTInductor package with a call of every operator, for all sizes: one C++ file holds all of their kernels."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import inductor_vision
import pytest
import torch
from inductor_vision.lowering import patch_conv2d as patch_lowering
from inductor_vision.lowering.common.registry import has_template
from inductor_vision.ops.heatmaps_to_keypoints import heatmaps_to_keypoints
from inductor_vision.ops.registry import OPS
from inductor_vision.paths import Path, recorded_paths
from inductor_vision.tests.support import (
    convolution,
    deform_conv2d as deform,
    depthwise_separable_conv2d as separable,
    grid_sampler_2d as sampling,
    heatmaps_to_keypoints as heatmaps,
    multiscale_deformable_attention as attention,
    paste_masks as pasting,
    patch_conv2d as patches,
    regions,
    winograd_conv2d as winograd,
)
from inductor_vision.tests.support.boxes import (
    Boxes,
    RotatedBoxes,
    assert_taken,
    nms_oracle,
    nms_rotated_oracle,
    soft_nms_oracle,
)
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import constants_of_package, run_python
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map

Call = tuple[Any, ...]

pytestmark = pytest.mark.usefixtures("optimized")


@dataclasses.dataclass(frozen=True)
class Part:
    """What one family has in the package.

    Attributes:
        function: what is compiled; a module if it has weights.
        calls: its arguments; the package is made with the first of them.
        varies: which dimensions of each tensor do, by position; one for all if it is no tuple.
        assert_right: of the results and arguments of a call.
        ops: the operators that it calls, as often as it does.
        constants: the shapes of weights in the order of the kernels, and of what else is as large.
        wrong: calls that raise an error, and what that says.
    """

    function: Callable[..., Any]
    calls: Sequence[Call]
    varies: Any
    assert_right: Callable[..., None]
    ops: Sequence[str]
    constants: Sequence[str] = ()
    wrong: Sequence[tuple[Call, str]] = ()


def same_as_in_float64(function: Callable[..., Any]) -> Callable[..., None]:
    """A check: the results are those that ``function`` has eagerly, in float64."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def check(results: Any, *call: Any) -> None:
        exact = copy.deepcopy(function).double() if isinstance(function, nn.Module) else function
        expected = tree_leaves(exact(*tree_map(double, call)))
        for i, (result, right) in enumerate(zip(tree_leaves(results), expected, strict=True)):
            assert_close(result, right, torch.float32, f"result {i}")

    return check


def same_as_eagerly(function: Callable[..., Any]) -> Callable[..., None]:
    def check(results: Any, *call: Any) -> None:
        for i, (result, right) in enumerate(zip(tree_leaves(results), tree_leaves(function(*call)), strict=True)):
            assert_close(result, right, torch.float32, f"result {i}")

    return check


# Convolutions


def deform_conv2d() -> Part:
    model = deform.TwoConvolutions()
    calls = [model.call(*size) for size in ((3, 7, 9), (1, 7, 9), (2, 1, 1), (5, 20, 33))]
    constants = ["16", "16", "1, 1, 9, 16, 16", "9, 16"]

    def assert_right(results: Any, *call: Tensor) -> None:
        model.assert_right(results, call)

    return Part(model, calls, (0, 2, 3), assert_right, ["deform_conv2d"] * 2, constants)


def deform_conv2d_backward() -> Part:
    backward = OPS["deform_conv2d_backward"]

    def function(grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> Any:
        return backward(grad, x, offset, weight, None, [1, 1], [1, 1], [1, 1], mask, [True] * 3 + [False, True])

    def call(batch: int, *size: int) -> Call:
        case = deform.Case(batch=batch, channels=16, out_channels=24, size=size, bias=False)
        s = deform.sample(case)
        grad = deform.gradient_like(torch.empty(batch, 24, *case.out_size))
        return grad, *s.args[:3], s.kwargs["mask"]

    image = (0, 2, 3)
    varies = (image, image, image, (), image)
    calls = [call(4, 7, 11), call(2, 12, 5), call(1, 1, 1)]
    return Part(function, calls, varies, same_as_in_float64(function), ["deform_conv2d_backward"])


def depthwise_separable_conv2d() -> Part:
    model = separable.Network()
    calls = [(model.image(*size),) for size in ((3, 7, 9), (1, 7, 9), (2, 3, 4), (5, 20, 133))]
    constants = ["9, 16", "16", "1, 2, 1, 16, 16", "24", "9, 32", "1, 1, 1, 32, 16"]
    return Part(model, calls, (0, 2, 3), model.assert_right, ["depthwise_separable_conv2d"] * 2, constants)


def depthwise_separable_conv2d_backward() -> Part:
    backward = OPS["depthwise_separable_conv2d_backward"]

    def function(grad: Tensor, x: Tensor, *weights: Tensor) -> Any:
        return backward(grad, x, *weights, [1, 1], [1, 1], [1, 1], "prelu", [True] * 6)

    def call(batch: int, *size: int) -> Call:
        s = separable.sample(separable.Case(batch=batch, channels=16, out_channels=24, size=size, first="prelu"))
        grad = convolution.gradient_like(torch.empty(batch, 24, *size))
        return grad, *s.args, s.tensors["slope"]

    image = (0, 2, 3)
    varies = (image, image, *[()] * 5)
    calls = [call(3, 7, 9), call(1, 3, 4), call(2, 20, 33)]
    return Part(function, calls, varies, same_as_in_float64(function), ["depthwise_separable_conv2d_backward"])


class OfPatches(nn.Module):
    """A layer of each memory order, all of the same weight, and its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = inductor_vision.PatchConv2d(20, 40, 3, padding=1)

    def forward(self, *orders: Tensor) -> tuple[Tensor, ...]:
        results = tuple(self.conv(x).relu() for x in orders)
        backward, geometry = OPS["patch_conv2d_backward"], ([1, 1], [1, 1], [1, 1])
        return *results, *backward(results[0], orders[0], self.conv.weight, self.conv.bias, *geometry, [True] * 3)


def patch_conv2d() -> Part:
    def call(batch: int, number: int, *size: int) -> Call:
        orders = ("patches_first", "channels_first", "channels_last")
        return tuple(
            patches.sample(patches.Case(batch, number, 20, 40, size, layout=layout)).args[0] for layout in orders
        )

    model = OfPatches()
    calls = [call(3, 7, 4, 5), call(2, 1, 1, 1), call(5, 129, 4, 4), call(1, 13, 9, 17)]
    ops = ["patch_conv2d"] * 3 + ["patch_conv2d_backward"] * 2  # gradients of the input and of the others
    constants = ["1, 3, 9, 20, 16", "1, 2, 9, 40, 16", "40"]
    return Part(model, calls, ((0, 1, 3, 4),) * 3, same_as_in_float64(model), ops, constants)


class ByWinograd(nn.Module):
    """A layer, and the gradient of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 28, 3, 3) / 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out = inductor_vision.winograd_conv2d(x, self.weight).relu()
        gradients = OPS["winograd_conv2d_backward"](out, x, self.weight, None, [1, 1], 4, [True, False, False])
        return out, gradients[0]


def winograd_conv2d() -> Part:
    model = ByWinograd()
    calls = [
        (winograd.sample(winograd.Case(batch, 28, size=size, layout="channels_last")).args[0],)
        for batch, size in ((3, (7, 9)), (1, (7, 9)), (2, (3, 2)), (5, (20, 73)))
    ]
    ops = ["winograd_conv2d", "winograd_conv2d_backward"]
    constants = ["1, 2, 36, 28, 16", "1, 2, 36, 24, 16"]
    return Part(model, calls, (0, 2, 3), same_as_in_float64(model), ops, constants)


class Directly(nn.Module):
    """A dense convolution and a depthwise one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(20, 40, 3, 2, 1)
        self.depthwise = nn.Conv2d(40, 40, 3, 1, 1, groups=40)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.dense, self.depthwise):
            x = OPS["direct_conv2d"](x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation).relu()
        return x


def direct_conv2d() -> Part:
    model = Directly()
    sizes = (3, 9, 12), (1, 9, 12), (2, 1, 1), (5, 33, 70)
    calls = [(torch.randn(batch, 20, *size).contiguous(memory_format=torch.channels_last),) for batch, *size in sizes]
    constants = ["1, 3, 1, 180, 16", "40", "9, 40", "40"]
    return Part(model, calls, (0, 2, 3), same_as_in_float64(model), ["direct_conv2d"] * 2, constants)


class InvertedResidual(nn.Module):
    """The block of MobileNetV2, with its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.expansion, self.last = nn.Conv2d(20, 72, 1), nn.Conv2d(72, 20, 1)
        self.depthwise = nn.Conv2d(72, 72, 3, 1, 1, groups=72)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.expansion, self.depthwise, self.last
        tensors = [layer.weight for layer in layers] + [layer.bias for layer in layers]
        return x + OPS["inverted_residual_conv2d"](x, *tensors, [1, 1], [1, 1], [1, 1], "relu6", "relu6")


def inverted_residual_conv2d() -> Part:
    model = InvertedResidual()
    sizes = (3, 9, 12), (1, 9, 12), (2, 1, 1), (5, 33, 70)
    calls = [(torch.randn(batch, 20, *size).contiguous(memory_format=torch.channels_last),) for batch, *size in sizes]
    constants = ["1, 5, 1, 20, 16", "80", "9, 72", "72", "1, 2, 1, 72, 16", "20"]
    return Part(model, calls, (0, 2, 3), same_as_in_float64(model), ["inverted_residual_conv2d"], constants)


# Regions


NO_IMAGES = (2.0, -1.0, math.nan, math.inf, -math.inf, 1e30)
OPS_ON_REGIONS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "multiscale_roi_align")


def on_regions() -> Part:
    def function(x: Tensor, split: Tensor, coarse: Tensor, *rois: Tensor) -> list[Tensor]:
        return [
            inductor_vision.roi_align(x, rois[0], (2, 3), 0.5, -1, True),
            inductor_vision.roi_pool(x, rois[1], (2, 3), 0.5),
            inductor_vision.ps_roi_align(split, rois[2], (2, 3), 0.5, -1),
            inductor_vision.ps_roi_pool(split, rois[3], (2, 3), 0.5),
            inductor_vision.multiscale_roi_align(
                [x, coarse], rois[4], (2, 3), (0.5, 0.25), 2, canonical_scale=8, canonical_level=2
            ),
        ]

    def call(**changes: Any) -> Call:
        case = regions.Case(**changes)
        rows, columns = (-(-length // 2) for length in case.size)
        coarse_case = dataclasses.replace(case, size=(rows, columns), regions=0)
        x, split = (regions.sample(op, case) for op in ("roi_align", "ps_roi_align"))
        rois = [x.rois.clone() for _ in OPS_ON_REGIONS]
        return x.input, split.input, regions.sample("roi_align", coarse_case).input, *rois

    calls = [
        call(size=(11, 14)),
        call(),
        call(regions=0),
        call(regions=1, batch=1),
        call(regions=33, batch=5, size=(21, 18), boxes="inside"),
        call(size=(30, 2)),
        call(boxes="hostile", regions=24),
    ]
    wrong = []
    for which, image in itertools.product(range(len(OPS_ON_REGIONS)), NO_IMAGES):
        tensors = call()
        tensors[3 + which][6, 0] = image
        op = OPS_ON_REGIONS[which].removeprefix("multiscale_")
        wrong.append((tensors, rf"^{op}: boxes\[6\] names image \S+, which does not exist: there are 2$"))
    ops = [op.removeprefix("multiscale_") for op in OPS_ON_REGIONS]
    image = (0, 2, 3)
    varies = (image, image, image, *((0,) for _ in OPS_ON_REGIONS))
    return Part(function, calls, varies, same_as_eagerly(function), ops, wrong=wrong)


def on_regions_backward() -> Part:
    ops = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")

    def function(x: Tensor, split: Tensor, rois: Tensor, argmax: Tensor, *grads: Tensor) -> list[Tensor]:
        sizes = [list(tensor.shape) for tensor in (x, split)]
        return [
            OPS["roi_align_backward"](grads[0], rois, None, [0.5], sizes[0], -1, True, 0),
            OPS["roi_pool_backward"](grads[1], rois, argmax, sizes[0]),
            OPS["ps_roi_align_backward"](grads[2], rois, 0.5, sizes[1], -1),
            OPS["ps_roi_pool_backward"](grads[3], rois, 0.5, sizes[1]),
        ]

    def call(**changes: Any) -> Call:
        case = regions.Case(**changes)
        samples = {op: regions.sample(op, case) for op in ops}
        pooled = samples["roi_pool"]
        argmax = regions.roi_pool_oracle(*pooled.arguments)[1]
        gradients = [s.gradient for s in samples.values()]
        return pooled.input, samples["ps_roi_align"].input, pooled.rois, argmax, *gradients

    calls = [call(size=(11, 14)), call(regions=0), call(regions=33, batch=5, size=(21, 18), boxes="inside")]
    varies = ((0, 2, 3), (0, 2, 3), *((0,) for _ in range(6)))
    return Part(function, calls, varies, same_as_eagerly(function), [f"{op}_backward" for op in ops])


def keypoints() -> Part:
    def assert_right(results: Any, *call: Tensor) -> None:
        heatmaps.assert_keypoints(tuple(results), *call)

    calls = [call.tensors() for call in (heatmaps.Heatmaps(), *heatmaps.CALLS)]
    maps, rois = heatmaps.Heatmaps().tensors()
    wrong_rois = rois.clone()
    wrong_rois[3, 2] = math.nan
    wrong = [((maps, wrong_rois), r"^heatmaps_to_keypoints: rois must be finite .*, rois\[3\] is not$")]
    varies = ((0, 1, 2, 3), (0,))
    return Part(heatmaps_to_keypoints, calls, varies, assert_right, ["heatmaps_to_keypoints"], wrong=wrong)


def paste_masks() -> Part:
    def function(masks: Tensor, boxes: Tensor, like: Tensor) -> Tensor:
        return pasting.OP(masks, boxes, *like.shape)

    calls = [(*case.tensors(), torch.empty(case.image)) for case in pasting.CASES.values()]
    return Part(function, calls, ((0, 2, 3), (0,), (0, 1)), same_as_eagerly(function), ["paste_masks"])


# Attention


def multiscale_deformable_attention() -> Part:
    """Levels of maps, and of sizes that a tensor has."""
    backward = OPS["multiscale_deformable_attention_backward"]

    def function(grad: Tensor, shapes: Tensor, fine: Tensor, coarse: Tensor, *places: Tensor) -> Any:
        maps = fine, coarse
        value = torch.cat([map.flatten(1, 2) for map in maps], dim=1)
        sizes = [map.shape[1:3] for map in maps]
        out = inductor_vision.multiscale_deformable_attention(value, sizes, *places, (2, 3))
        return out.relu(), *backward(grad, value, [], shapes, *places, [2, 3], "discrete", [True] * 3)

    def call(*sizes: tuple[int, int], **changes: Any) -> Call:
        case = attention.Case(sizes=sizes, points=(2, 3), locations="smooth", **changes)
        value, *places = case.tensors()
        levels = value.split([height * width for height, width in sizes], dim=1)
        maps = [level.unflatten(1, size) for level, size in zip(levels, sizes)]
        return case.grad, torch.tensor(sizes), *maps, *places

    calls = [
        call((6, 5), (3, 4)),
        call((17, 9), (2, 7), batch=3, queries=33),
        call((2, 3), (11, 4), batch=1, queries=1),
    ]
    grad, _, *others = calls[0]
    message = "multiscale_deformable_attention: value_spatial_shapes must be positive, and have as many pixels as value"
    wrong_sizes = [[(6, 5), (3, 5)], [(6, 5), (0, 4)], [(-6, -5), (3, 4)], [(2**62, 4), (6, 7)]]
    wrong = [((grad, torch.tensor(sizes), *others), message) for sizes in wrong_sizes]
    varies = ((0, 1), (), (0, 1, 2), (0, 1, 2), (0, 1), (0, 1))
    ops = ["multiscale_deformable_attention", "multiscale_deformable_attention_backward"]
    return Part(function, calls, varies, same_as_in_float64(function), ops, wrong=wrong)


# Images


def upsample2d() -> Part:
    """To two sizes, with zeros up to the larger one, and with the centres of corners coinciding."""
    bilinear, bicubic = OPS["upsample_bilinear2d"], OPS["upsample_bicubic2d"]

    def function(fine: Tensor, coarse: Tensor, fewer: Tensor, more: Tensor) -> tuple[Tensor, ...]:
        small, large = fewer.shape[2:], more.shape[2:]
        padding = [a - b for a, b in zip(large, small)]
        return (
            bilinear(fine, small, False, None, None, padding),
            bilinear(coarse, large, True, None, None, [0, 0]),
            bicubic(fine, large, False, None, None, [0, 0]),
        )

    def call(batch: int, fine: tuple[int, int], coarse: tuple[int, int], fewer: tuple[int, int]) -> Call:
        more = tuple(length + 9 for length in fewer)
        images = [torch.randn(batch, 3, *size) for size in (fine, coarse)]
        return *images, torch.empty(1, 1, *fewer), torch.empty(1, 1, *more)

    calls = [
        call(2, (20, 30), (4, 6), (9, 11)),
        call(1, (1, 1), (1, 1), (1, 1)),
        call(3, (70, 41), (33, 9), (80, 50)),
    ]
    image = (0, 2, 3)
    ops = ["upsample_bilinear2d", "upsample_bilinear2d", "upsample_bicubic2d"]
    return Part(function, calls, (image, image, (2, 3), (2, 3)), same_as_eagerly(function), ops)


def grid_sampler_2d() -> Part:
    """Of few channels and of many, and the gradients of the latter."""

    def function(few: Tensor, many: Tensor, grid: Tensor) -> tuple[Tensor, ...]:
        sampled = sampling.OP(many, grid, 0, 2, False)
        gradients = sampling.BACKWARD(sampled, many, grid, 0, 2, False, [True, True])
        return sampling.OP(few, grid, 2, 0, True), sampled, *gradients

    def call(batch: int, few: tuple[int, int], many: tuple[int, int], out: tuple[int, int]) -> Call:
        images = [torch.randn(batch, *size) for size in ((3, *few), (20, *many))]
        return *images, torch.rand(batch, *out, 2) * 2.6 - 1.3

    calls = [
        call(2, (20, 30), (4, 6), (9, 11)),
        call(1, (1, 1), (1, 1), (1, 1)),
        call(3, (70, 41), (33, 9), (80, 50)),
    ]
    varies = ((0, 2, 3), (0, 2, 3), (0, 1, 2))
    return Part(
        function, calls, varies, same_as_eagerly(function), ["grid_sampler_2d"] * 2 + ["grid_sampler_2d_backward"]
    )


# Boxes

LARGE = 6000  # boxes, enough for more than one thread, with gaps for several grids


def nms() -> Part:
    def function(boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        return (
            inductor_vision.nms(boxes, scores, 0.3),
            inductor_vision.batched_nms(boxes, scores, classes, 0.5),
            inductor_vision.nms(boxes, scores, -0.5),
            *inductor_vision.nms(boxes, scores, 0.3, max_detections=20),
        )

    def assert_right(results: Any, boxes: Tensor, scores: Tensor, classes: Tensor) -> None:
        *results, best, count = results
        assert count == min(20, len(results[0]))
        assert best.tolist() == results[0][:20].tolist() + [-1] * (20 - count)
        if len(boxes) == LARGE:
            assert torch.equal(results[0], inductor_vision.nms(boxes, scores, 0.3))
            return
        expected = [
            nms_oracle(boxes, scores, 0.3),
            nms_oracle(boxes, scores, 0.5, classes),
            nms_oracle(boxes, scores, -0.5),
        ]
        assert [indices.tolist() for indices in results] == expected

    boxes = (Boxes(17), Boxes(2), Boxes(90), Boxes(90, "improper"), Boxes(0), Boxes(LARGE))
    return Part(function, [call.tensors() for call in boxes], ((0,),) * 3, assert_right, ["nms"] * 4)


def nms_rotated() -> Part:
    def function(boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        return (
            inductor_vision.nms_rotated(boxes, scores, 0.3),
            inductor_vision.batched_nms_rotated(boxes, scores, classes, 0.6),
        )

    def assert_right(results: Any, boxes: Tensor, scores: Tensor, classes: Tensor) -> None:
        expected = [nms_rotated_oracle(boxes, scores, 0.3), nms_rotated_oracle(boxes, scores, 0.6, classes)]
        assert [indices.tolist() for indices in results] == expected

    boxes = (RotatedBoxes(17), RotatedBoxes(0), RotatedBoxes(2), RotatedBoxes(90), RotatedBoxes(90, "improper"))
    return Part(function, [call.tensors() for call in boxes], ((0,),) * 3, assert_right, ["nms_rotated"] * 2)


def soft_nms() -> Part:
    gaussian = {"sigma": 0.4, "min_score": 0.05, "method": "gaussian"}

    def function(boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        return (
            *inductor_vision.soft_nms(boxes, scores),
            *inductor_vision.batched_soft_nms(boxes, scores, classes, **gaussian),
        )

    def assert_right(results: Any, boxes: Tensor, scores: Tensor, classes: Tensor) -> None:
        assert_taken(results[:2], soft_nms_oracle(boxes, scores))
        assert_taken(results[2:], soft_nms_oracle(boxes, scores, **gaussian, classes=classes))

    boxes = (Boxes(17), Boxes(2), Boxes(90), Boxes(90, "improper"), Boxes(0))
    return Part(function, [call.tensors() for call in boxes], ((0,),) * 3, assert_right, ["soft_nms"] * 2)


def box_iou_rotated() -> Part:
    def assert_right(result: Tensor, *call: Tensor) -> None:
        torch.testing.assert_close(result, inductor_vision.box_iou_rotated(*call), rtol=0, atol=1e-6)

    boxes = RotatedBoxes(90, "improper").tensors()[0]
    calls = [
        (RotatedBoxes(17).tensors()[0], RotatedBoxes(11).tensors()[0]),
        (boxes, boxes[:7]),
        (boxes[:0], boxes),
        (boxes[:1], boxes[:0]),
    ]
    return Part(inductor_vision.box_iou_rotated, calls, ((0,), (0,)), assert_right, ["box_iou_rotated"])


# The package

PARTS: dict[str, Callable[[], Part]] = {
    part.__name__: part
    for part in (
        deform_conv2d,
        deform_conv2d_backward,
        depthwise_separable_conv2d,
        depthwise_separable_conv2d_backward,
        patch_conv2d,
        winograd_conv2d,
        direct_conv2d,
        inverted_residual_conv2d,
        on_regions,
        on_regions_backward,
        keypoints,
        paste_masks,
        multiscale_deformable_attention,
        upsample2d,
        grid_sampler_2d,
        nms,
        nms_rotated,
        soft_nms,
        box_iou_rotated,
    )
}


class EveryOperator(nn.Module):
    """All parts; arguments and results by their names."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.functions = dict(functions)
        for name, function in functions.items():
            if isinstance(function, nn.Module):
                self.add_module(name, function)

    def forward(self, calls: dict[str, Call]) -> dict[str, Any]:
        return {name: function(*calls[name]) for name, function in self.functions.items()}


def dynamic_shapes(part: Part) -> tuple[Any, ...]:
    one_for_all = all(isinstance(dim, int) for dim in part.varies)
    varies = (part.varies,) * len(part.calls[0]) if one_for_all else part.varies
    return tuple(dict.fromkeys(dims, Dim.DYNAMIC) for dims in varies)


RUN_PACKAGE = """
import os, sys
import torch

def working_threads():
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0

model = torch._inductor.aoti_load_package(sys.argv[1])
calls, wrong = torch.load(sys.argv[2])
results, errors, working = {}, [], {}
for threads in (1, 2, 3, 5):
    torch.set_num_threads(threads)
    results[threads] = [model(call) for call in calls]
    working[threads] = working_threads()
for call in wrong:
    try:
        model(call)
    except RuntimeError as error:
        errors.append(str(error))
    else:
        errors.append(None)
results["after errors"] = [model(call) for call in calls]
present = {name.partition(".")[0] for name in sys.modules}
assert not present & {"inductor_vision", "torchvision"}, present
torch.save((results, errors, working), sys.argv[3])
"""


@dataclasses.dataclass(frozen=True)
class Packaged:
    """The package, and what it did in a process that has neither this package nor torchvision.

    Attributes:
        paths: of the operators' calls.
        results: of the calls of each part, by the number of threads, and "after errors".
        errors: of the wrong calls of each part.
        working: threads, by the number of them that torch was told to use.
    """

    parts: dict[str, Part]
    path: pathlib.Path
    paths: list[Path]
    results: dict[Any, dict[str, list[Any]]]
    errors: dict[str, list[str | None]]
    working: dict[int, int]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    folder = tmp_path_factory.mktemp("package")
    path, arguments, results = (folder / name for name in ("model.pt2", "calls.pt", "results.pt"))
    torch.manual_seed(0)
    parts = {name: make() for name, make in PARTS.items()}
    model = EveryOperator({name: part.function for name, part in parts.items()}).eval()
    first = {name: part.calls[0] for name, part in parts.items()}
    shapes = {name: dynamic_shapes(part) for name, part in parts.items()}
    with (
        torch.no_grad(),
        patch.object(patch_lowering, "cache_bytes", lambda: 4096),  # patches are cut into blocks
        recorded_paths() as paths,
    ):
        exported = torch.export.export(model, (first,), dynamic_shapes=(shapes,))
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path))

    rows = range(max(len(part.calls) for part in parts.values()))
    calls = [{name: part.calls[i % len(part.calls)] for name, part in parts.items()} for i in rows]
    wrong = [{**first, name: call} for name, part in parts.items() for call, _ in part.wrong]
    torch.save((calls, wrong), arguments)
    run_python(RUN_PACKAGE, str(path), str(arguments), str(results))
    computed, errors, working = torch.load(results)
    by_part = {
        key: {name: [row[name] for row in table[: len(part.calls)]] for name, part in parts.items()}
        for key, table in computed.items()
    }
    left = iter(errors)
    errors_by_part = {name: list(itertools.islice(left, len(part.wrong))) for name, part in parts.items()}
    return Packaged(parts, path, list(paths), by_part, errors_by_part, working)


def with_templates() -> set[str]:
    return {name for name, op in OPS.items() if has_template(op)}


def test_holds_a_call_of_every_operator(package):
    """An operator that is added to the package's belongs to a part."""
    assert {op for part in package.parts.values() for op in part.ops} == with_templates()
    expected = [(op, "template") for part in package.parts.values() for op in part.ops]
    assert sorted((path.op, path.kind) for path in package.paths) == sorted(expected)


def test_one_file_has_all_kernels_fused_with_their_neighbours(package):
    with zipfile.ZipFile(package.path) as archive:
        (kernels,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".kernel.cpp"))
    names = re.findall(r'extern "C"\s[^;{]*?\bcpp_fused_(\w+)_\d+\([^;{]*\)\s*\{', kernels)
    for op in with_templates():
        assert any(op in name for name in names), op
    fused = ["add_deform_conv2d_relu", "depthwise_separable_conv2d_relu", *["direct_conv2d_relu"] * 2]
    fused += ["multiscale_deformable_attention_relu", *["patch_conv2d_relu"] * 3, "relu_winograd_conv2d"]
    assert sorted(name for name in names if "relu" in name) == fused


def test_holds_packed_weights_and_no_others(package):
    constants = [shape for part in package.parts.values() for shape in part.constants]
    assert sorted(constants_of_package(package.path)) == sorted(constants)


@pytest.mark.parametrize("part", PARTS)
def test_runs_alone_on_all_sizes(package, part):
    results = package.results[2][part]
    with torch.no_grad():
        for call, result in zip(package.parts[part].calls, results, strict=True):
            package.parts[part].assert_right(result, *call)


@pytest.mark.parametrize("part", PARTS)
def test_gives_the_same_bits_with_all_threads_and_after_errors(package, part):
    first, *others = ([tree_leaves(result) for result in results[part]] for results in package.results.values())
    for other in others:
        for few, many in zip(first, other, strict=True):
            assert [tensor.numpy().tobytes() for tensor in few] == [tensor.numpy().tobytes() for tensor in many]


def test_uses_the_threads_of_the_machine_it_runs_on(package):
    if package.working[1]:
        assert [package.working[threads] - package.working[1] for threads in (2, 3, 5)] == [1, 2, 4]


def test_reports_what_it_cannot_compute(package):
    for name, part in package.parts.items():
        for (_, message), error in zip(part.wrong, package.errors[name], strict=True):
            assert re.search(message, error or ""), f"{name}: {error}"
