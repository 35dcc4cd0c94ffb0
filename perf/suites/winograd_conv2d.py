"""Convolution with 3 x 3 kernels, padding 1 and a bias, by Winograd's algorithm, for inference."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import winograd_conv2d as operator
from ...ops.winograd_conv2d import KERNEL, Arguments
from .. import backends, convolutions
from ..convolutions import Layer, map_tensors
from ..spec import Contender, Job, Prepared, Suite


@dataclasses.dataclass(frozen=True)
class Shape(convolutions.Shape):
    """A layer and its input."""

    channels: int
    out_channels: int
    height: int
    width: int
    batch: int = 1
    groups: int = 1
    tile: int = 4

    def __str__(self) -> str:
        sizes = f"{self.channels} to {self.out_channels} ch, {self.height}x{self.width}"
        tile = [f"F({self.tile}x{self.tile})"] if self.tile != 4 else []
        return self.describe(sizes, *self.unusual("batch", "groups"), *tile)


def build(shape: Shape) -> Arguments:
    """The arguments of a call; the same values at every call."""
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    group_channels = shape.channels // shape.groups
    arguments = Arguments(
        input=normal(shape.batch, shape.channels, shape.height, shape.width),
        weight=normal(shape.out_channels, group_channels, KERNEL, KERNEL) / math.sqrt(KERNEL**2 * group_channels),
        bias=normal(shape.out_channels),
        padding=(shape.padding, shape.padding),
        tile=shape.tile,
    )
    return map_tensors(arguments, lambda tensor: tensor.to(shape.dtype))


def channels_last(arguments: Arguments) -> Arguments:
    """Put image and weight into that memory format, as models are."""
    return convolutions.channels_last(arguments, "input", "weight")


def winograd_conv2d(input: Tensor, weight: Tensor, bias: Tensor, padding: Any, tile: int) -> Tensor:
    """This package's operator."""
    return operator.winograd_conv2d(input, weight, bias, padding, tile, _groups(input, weight))


def conv2d(input: Tensor, weight: Tensor, bias: Tensor, padding: Any, tile: int) -> Tensor:
    """The layer as models have it."""
    return F.conv2d(input, weight, bias, padding=padding, groups=_groups(input, weight))


def _groups(input: Tensor, weight: Tensor) -> int:
    return input.shape[1] // weight.shape[1]


class _Geometry(NamedTuple):
    """Of a convolution, for other runtimes."""

    padding: Any
    stride: Any = (1, 1)
    dilation: Any = (1, 1)


def _onnxruntime(job: Job) -> Prepared:
    from onnx import helper

    a = job.inputs
    backends.only_float32(a.input.dtype, "ONNX Runtime")
    geometry = convolutions.onnx_geometry(_Geometry(a.padding), a.weight.shape[2:], a.groups)
    node = helper.make_node("Conv", ["input", "weight", "bias"], ["output"], **geometry)
    feeds = {"input": a.input}
    model = backends.onnx_model([node], feeds, 17, {"weight": a.weight, "bias": a.bias})
    return backends.onnxruntime(model, feeds, job.threads)


def _openvino(job: Job) -> Prepared:
    import numpy as np
    import openvino as ov
    from openvino import opset8

    a = map_tensors(job.inputs, torch.Tensor.float)
    image = opset8.parameter(a.input.shape, np.float32)
    if a.groups == 1:
        convolution, filters = opset8.convolution, a.weight
    else:
        convolution, filters = opset8.group_convolution, a.weight.unflatten(0, (a.groups, -1))
    geometry = convolutions.openvino_geometry(_Geometry(a.padding))
    out = convolution(image, convolutions.openvino_constant(filters), *geometry)
    model = ov.Model([convolutions.openvino_biased(out, a.bias)], [image])
    return backends.openvino(model, [a.input], job.threads, job.inputs.input.dtype)


def products(a: Arguments) -> tuple[Tensor, Tensor]:
    """Two batches of matrices as large as the transformed input and weight, one of each for each point and group."""
    points = (a.tile + KERNEL - 1) ** 2 * a.groups
    rows, columns = (
        -(-(size + 2 * padding - KERNEL + 1) // a.tile) for size, padding in zip(a.input.shape[2:], a.padding)
    )
    tiles, inputs, outputs = a.input.shape[0] * rows * columns, a.weight.shape[1], a.weight.shape[0] // a.groups
    dtype = a.input.dtype
    return torch.randn(points, tiles, inputs, dtype=dtype), torch.randn(points, inputs, outputs, dtype=dtype)


def _products(job: Job) -> Prepared:
    """The matrix products alone, a batch of them for all tiles; nothing is transformed."""
    return backends.eager(torch.bmm, products(job.inputs))


_WEIGHT_AND_BIAS = 1, 2

_CONTENDERS = backends.with_triton(
    *convolutions.ours(Layer(winograd_conv2d, _WEIGHT_AND_BIAS), channels_last),
    *convolutions.stock("conv2d", Layer(conv2d, _WEIGHT_AND_BIAS), channels_last),
    Contender("onnxruntime", "peer", _onnxruntime, check=backends.needs("onnx", "onnxruntime")),
    Contender("openvino", "peer", _openvino, check=backends.needs("openvino")),
    Contender("products", "limit", _products),
)

_LARGE = Shape(256, 256, 200, 272)
_MIDDLE = Shape(256, 256, 50, 68)
_vary = dataclasses.replace
_case = functools.partial(convolutions.case, build, tolerance=2e-5)

SUITE = Suite(
    name="winograd_conv2d",
    description="3x3 convolution by Winograd's algorithm, F(4x4) where nothing else is said, padding 1, forward",
    remark="All others compute the convolution directly, with four times as many multiplications.",
    reference=functools.partial(convolutions.reference, "winograd_conv2d"),
    contenders=_CONTENDERS,
    cases=(
        _case("256-200x272", _LARGE),
        _case("256-50x68", _MIDDLE),
        _case("512-25x34", Shape(512, 512, 25, 34)),
        _case("128-100x136", Shape(128, 128, 100, 136)),
        _case("64-200x272", Shape(64, 64, 200, 272)),
        _case("64-512x512", Shape(64, 64, 512, 512)),
        _case("32-224x224", Shape(32, 32, 224, 224)),
        _case("256-14x14", Shape(256, 256, 14, 14)),
        _case("512-7x7", Shape(512, 512, 7, 7)),
        _case("3-224x224", Shape(3, 64, 224, 224)),
        _case("256-50x68-tile2", _vary(_MIDDLE, tile=2)),
        _case("256-50x68-bf16", _vary(_MIDDLE, dtype=torch.bfloat16)),
        _case("256-50x68-groups4", _vary(_MIDDLE, groups=4)),
        _case("256-50x68-dynamic", _MIDDLE, "ours-compiled", "ours-dynamic", "products", note=", dynamic shapes"),
        _case(
            "256-50x68-threads", _MIDDLE, "ours-compiled", "ours-1-thread", "products", note=", 1 thread against all"
        ),
        _case("odd-37-channels", Shape(37, 50, 61, 83)),
    ),
)
