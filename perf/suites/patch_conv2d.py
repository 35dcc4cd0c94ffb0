"""Convolution of many small patches with a bias, for inference."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import patch_conv2d as operator
from ...ops.convolution import output_size
from ...ops.patch_conv2d import CHANNELS_FIRST, CHANNELS_LAST, Arguments, arranged
from .. import backends, convolutions
from ..convolutions import Layer, map_tensors
from ..spec import Contender, Job, Prepared, Suite


@dataclasses.dataclass(frozen=True)
class Shape(convolutions.Shape):
    """A layer and its input, of square patches."""

    patches: int
    size: int
    channels: int = 32
    out_channels: int = 64
    groups: int = 1

    def __str__(self) -> str:
        sizes = f"{self.patches} patches of {self.size}x{self.size}, {self.channels} to {self.out_channels} ch"
        return self.describe(sizes, *self.unusual("groups"))


def build(shape: Shape) -> Arguments:
    """The arguments of a call; the same values at every call."""
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    fan_in = shape.channels // shape.groups * shape.kernel**2
    arguments = Arguments(
        input=normal(1, shape.patches, shape.channels, shape.size, shape.size),
        weight=normal(shape.out_channels, shape.channels // shape.groups, shape.kernel, shape.kernel)
        / math.sqrt(fan_in),
        bias=normal(shape.out_channels),
        stride=(shape.stride, shape.stride),
        padding=(shape.padding, shape.padding),
        dilation=(shape.dilation, shape.dilation),
    )
    return map_tensors(arguments, lambda tensor: tensor.to(shape.dtype))


def in_order(order: tuple[int, ...], arguments: Arguments) -> Arguments:
    """Put the patches into this order in memory."""
    return arguments._replace(input=arranged(arguments.input, order))


def as_channels_last_models(arguments: Arguments) -> Arguments:
    """Lay out the patches as a channels_last batch of images, and the weight in that memory format too."""
    return convolutions.channels_last(in_order(CHANNELS_LAST, arguments), "weight")


def patch_conv2d(input: Tensor, weight: Tensor, bias: Tensor, *geometry: Any) -> Tensor:
    """This package's operator."""
    return operator.patch_conv2d(input, weight, bias, *geometry, _groups(input, weight))


def conv2d_of_the_batch(input: Tensor, weight: Tensor, bias: Tensor, *geometry: Any) -> Tensor:
    """The patches as a batch of images. [1, N, O, Ho, Wo]"""
    return F.conv2d(input.squeeze(0), weight, bias, *geometry, _groups(input, weight)).unsqueeze(0)


def _unfold(input: Tensor, weight: Tensor, bias: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """All columns, then one matrix product for each patch. [1, N, O, Ho, Wo]"""
    groups = _groups(input, weight)
    pairs = zip(input.shape[3:], weight.shape[2:], stride, padding, dilation)
    size = [output_size(*numbers) for numbers in pairs]
    columns = F.unfold(input.squeeze(0), weight.shape[2:], dilation, padding, stride)  # [N, C * K, P]
    columns = columns.unflatten(1, (groups, -1))  # [N, G, Cg * K, P]
    out = weight.flatten(1).unflatten(0, (groups, -1)) @ columns  # [N, G, Og, P]
    return (out.flatten(1, 2) + bias[:, None]).unflatten(2, size).unsqueeze(0)


def _groups(input: Tensor, weight: Tensor) -> int:
    return input.shape[2] // weight.shape[1]


def _onnxruntime(job: Job) -> Prepared:
    from onnx import helper

    a = job.inputs
    backends.only_float32(a.input.dtype, "ONNX Runtime")
    geometry = convolutions.onnx_geometry(a, a.weight.shape[2:], a.groups)
    node = helper.make_node("Conv", ["input", "weight", "bias"], ["output"], **geometry)
    feeds = {"input": a.input[0]}
    model = backends.onnx_model([node], feeds, 17, {"weight": a.weight, "bias": a.bias})
    return _unsqueezed(backends.onnxruntime(model, feeds, job.threads))


def _openvino(job: Job) -> Prepared:
    import numpy as np
    import openvino as ov
    from openvino import opset8

    a = map_tensors(job.inputs, torch.Tensor.float)
    patches = opset8.parameter(a.input.shape[1:], np.float32)
    if a.groups == 1:
        convolution, filters = opset8.convolution, a.weight
    else:
        convolution, filters = opset8.group_convolution, a.weight.unflatten(0, (a.groups, -1))
    out = convolution(patches, convolutions.openvino_constant(filters), *convolutions.openvino_geometry(a))
    model = ov.Model([convolutions.openvino_biased(out, a.bias)], [patches])
    return _unsqueezed(backends.openvino(model, [a.input[0]], job.threads, job.inputs.input.dtype))


def _unsqueezed(prepared: Prepared) -> Prepared:
    """The output of a runtime that takes four dimensions."""
    output = prepared.output[0] if isinstance(prepared.output, (list, tuple)) else prepared.output
    return dataclasses.replace(prepared, output=torch.as_tensor(output).unsqueeze(0))


def matrix_depth(a: Arguments) -> int:
    """How many products a number of the result is the sum of, on average over the pixels of a patch."""
    size, kernel = a.input.shape[3], a.weight.shape[2]
    out_size = output_size(size, kernel, a.stride[0], a.padding[0], a.dilation[0])
    places = [y * a.stride[0] - a.padding[0] + i * a.dilation[0] for y in range(out_size) for i in range(kernel)]
    inside = sum(0 <= place < size for place in places)  # rows, and as many columns
    return max(1, round(a.weight.shape[1] * inside**2 / out_size**2))


def _matrix_product(job: Job) -> Prepared:
    """One matrix product of as many multiplications as there are outside the padding, each group by itself; nothing
    is gathered, and the result has the size of the convolution's. It reads columns from memory, several times as many
    bytes as the patches have: no limit where memory is what takes the time."""
    a, depth = job.inputs, matrix_depth(job.inputs)
    out_size = output_size(a.input.shape[3], a.weight.shape[2], a.stride[0], a.padding[0], a.dilation[0])
    columns = torch.randn(a.groups, a.input.shape[1] * out_size**2, depth, dtype=a.input.dtype)
    weight = torch.randn(a.groups, depth, a.weight.shape[0] // a.groups, dtype=a.input.dtype)
    return backends.eager(torch.matmul, (columns, weight))


_WEIGHT_AND_BIAS = 1, 2
_OURS = Layer(patch_conv2d, _WEIGHT_AND_BIAS)
_CHANNELS_FIRST = dataclasses.replace(_OURS, change=functools.partial(in_order, CHANNELS_FIRST))

_CONTENDERS = backends.with_triton(
    *convolutions.ours(_OURS, functools.partial(in_order, CHANNELS_LAST)),
    Contender("ours-channels-first", "ours", _CHANNELS_FIRST.compiled, compiled=True),
    *convolutions.stock("conv2d", Layer(conv2d_of_the_batch, _WEIGHT_AND_BIAS), as_channels_last_models),
    Contender("unfold", "peer", Layer(_unfold, _WEIGHT_AND_BIAS).eager),
    Contender("onnxruntime", "peer", _onnxruntime, check=backends.needs("onnx", "onnxruntime")),
    Contender("openvino", "peer", _openvino, check=backends.needs("openvino")),
    Contender("matrix-product", "limit", _matrix_product),
)

S4 = Shape(20480, 4)
S8 = Shape(5120, 8)
_vary = dataclasses.replace
_case = functools.partial(convolutions.case, build)

SUITE = Suite(
    name="patch_conv2d",
    description="convolution of many small patches, each padded by itself, 3x3 where nothing else is said, forward",
    remark="Most results are 84 MB, which are memory fresh from the system at each call unless freed memory is kept; "
    "ONNX Runtime keeps its own.",
    reference=functools.partial(convolutions.reference, "patch_conv2d"),
    contenders=_CONTENDERS,
    cases=(
        _case("4x4", S4),
        _case("4x4-twice-as-many", _vary(S4, patches=2 * S4.patches)),
        _case("8x8", S8),
        _case("16x16", Shape(1280, 16)),
        _case("4x4-256-channels", Shape(2560, 4, 256, 256)),
        _case("4x4-bf16", _vary(S4, dtype=torch.bfloat16)),
        _case("8x8-stride2", _vary(S8, stride=2)),
        _case("8x8-groups4", Shape(5120, 8, 64, 64, groups=4)),
        _case("8x8-5x5", _vary(S8, kernel=5)),
        _case("8x8-3-channels", _vary(S8, channels=3)),
        _case("7x7-37-channels", Shape(5120, 7, 37, 50)),
    ),
)
