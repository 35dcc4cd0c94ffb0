"""Deformable convolution, version 2 (with mask and bias), for inference."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.convolution import output_size
from ...ops.deform_conv2d import Arguments, deform_conv2d
from ...ops.registry import OPS
from .. import backends, convolutions
from ..convolutions import Layer, map_tensors
from ..spec import Contender, Job, Prepared, Suite

_OFFSET_SPREAD = 2.0  # pixels, standard deviation


@dataclasses.dataclass(frozen=True)
class Shape(convolutions.Shape):
    """A layer and its input; sizes are (height, width) or one number for both."""

    channels: int
    size: int | tuple[int, int]
    batch: int = 1
    out_channels: int | None = None  # as many as channels
    groups: int = 1
    offset_groups: int = 1

    def __str__(self) -> str:
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        out = "" if self.out_channels is None else f" to {self.out_channels}"
        groups = ["depthwise"] if self.groups == self.channels else self.unusual("groups")
        sizes = f"{self.channels}{out} ch, {height}x{width}, batch {self.batch}"
        return self.describe(sizes, *groups, *self.unusual("offset_groups"))


def build(shape: Shape) -> Arguments:
    """The arguments of a call; the same values at every call."""
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator)
    height, width = (shape.size, shape.size) if isinstance(shape.size, int) else shape.size
    out_channels, taps = shape.out_channels or shape.channels, shape.kernel**2
    out = [output_size(n, shape.kernel, shape.stride, shape.padding, shape.dilation) for n in (height, width)]
    fan_in = shape.channels // shape.groups * taps
    arguments = Arguments(
        input=normal(shape.batch, shape.channels, height, width),
        offset=normal(shape.batch, 2 * shape.offset_groups * taps, *out) * _OFFSET_SPREAD,
        weight=normal(out_channels, shape.channels // shape.groups, shape.kernel, shape.kernel) / math.sqrt(fan_in),
        bias=normal(out_channels),
        stride=(shape.stride, shape.stride),
        padding=(shape.padding, shape.padding),
        dilation=(shape.dilation, shape.dilation),
        mask=normal(shape.batch, shape.offset_groups * taps, *out).sigmoid(),
    )
    return map_tensors(arguments, lambda tensor: tensor.to(shape.dtype))


def _reference(arguments: Arguments) -> Tensor:
    """The decomposition in float64, image by image because it takes many times the memory of its input."""
    a = map_tensors(arguments, torch.Tensor.double)
    images = zip(a.input.split(1), a.offset.split(1), a.mask.split(1))
    decomposition = OPS["deform_conv2d"].decomposition
    return torch.cat(
        [
            decomposition(x, offset, a.weight, a.bias, a.stride, a.padding, a.dilation, mask)
            for x, offset, mask in images
        ]
    )


def _channels_last(arguments: Arguments) -> Arguments:
    return convolutions.channels_last(arguments, "input")


def _float32(arguments: Arguments) -> Arguments:
    return map_tensors(arguments, torch.Tensor.float)


def _decomposition(*arguments: Any) -> Tensor:
    return OPS["deform_conv2d"].decomposition(*arguments)


def _torchvision(job: Job) -> Prepared:
    from torchvision.ops import deform_conv2d as theirs

    backends.only_float32(job.inputs.input.dtype, "torchvision")
    return backends.eager(theirs, job.inputs)


def _onnxruntime(job: Job) -> Prepared:
    from onnx import helper

    backends.only_float32(job.inputs.input.dtype, "ONNX Runtime")
    a = job.inputs
    geometry = convolutions.onnx_geometry(a, a.weight.shape[2:], a.groups)
    names = ["input", "weight", "offset", "bias", "mask"]
    node = helper.make_node("DeformConv", names, ["output"], offset_group=a.offset_groups, **geometry)
    feeds = {"input": a.input, "offset": a.offset, "mask": a.mask}
    constants = {"weight": a.weight, "bias": a.bias}
    model = backends.onnx_model([node], feeds, 19, constants)  # 19: the first with it
    return backends.onnxruntime(model, feeds, job.threads)


def _openvino(job: Job) -> Prepared:
    import numpy as np
    import openvino as ov
    from openvino import opset8

    a = _float32(job.inputs)
    feeds = [a.input, a.offset, a.mask]
    parameters = [opset8.parameter(tensor.shape, np.float32) for tensor in feeds]
    image, offset, mask = parameters
    convolution = opset8.deformable_convolution(
        image,
        offset,
        convolutions.openvino_constant(a.weight),
        *convolutions.openvino_geometry(a),
        mask=mask,
        group=a.groups,
        deformable_group=a.offset_groups,
        bilinear_interpolation_pad=True,
    )
    model = ov.Model([convolutions.openvino_biased(convolution, a.bias)], parameters)
    return backends.openvino(model, feeds, job.threads, job.inputs.input.dtype)


def _conv2d(job: Job) -> Prepared:
    """oneDNN's convolution of the same shape, in the layout that it likes best."""
    a = job.inputs
    image, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (a.input, a.weight))
    return backends.eager(F.conv2d, (image, weight, a.bias, a.stride, a.padding, a.dilation, a.groups))


_WEIGHT_AND_BIAS = 2, 3
_OURS = Layer(deform_conv2d, _WEIGHT_AND_BIAS)
_IN_FLOAT32 = dataclasses.replace(_OURS, change=_float32)

_CONTENDERS = backends.with_triton(
    *convolutions.ours(_OURS, _channels_last),
    Contender("ours-fp32", "ours", _IN_FLOAT32.compiled, compiled=True, default=False),
    Contender("decomposition", "peer", lambda job: backends.eager(_decomposition, job.inputs)),
    Contender("decomposition-compiled", "peer", Layer(_decomposition, _WEIGHT_AND_BIAS).compiled, compiled=True),
    Contender("torchvision", "peer", _torchvision, check=backends.needs_torchvision),
    Contender("onnxruntime", "peer", _onnxruntime, check=backends.needs("onnx", "onnxruntime")),
    Contender("openvino", "peer", _openvino, check=backends.needs("openvino")),
    Contender("conv2d", "limit", _conv2d),
)

_S32 = Shape(64, 32)
_S64 = Shape(256, 64)
_DEPTHWISE = Shape(512, 32, groups=512)
_BF16_CONTENDERS = ("ours-compiled", "ours-fp32", "ours-aoti", "decomposition-compiled", "torchvision", "onnxruntime")

_case = functools.partial(convolutions.case, build)
_vary = dataclasses.replace

SUITE = Suite(
    name="deform_conv2d",
    description="deformable convolution with mask and bias, 3x3 with padding 1 where nothing else is said, forward",
    reference=_reference,
    contenders=_CONTENDERS,
    cases=(
        _case("s32-b1", _S32),
        _case("s32-b4", _vary(_S32, batch=4)),
        _case("s32-b8", _vary(_S32, batch=8)),
        _case("s64-b1", _S64),
        _case("s64-b4", _vary(_S64, batch=4)),
        _case("s64-b7", _vary(_S64, batch=7), note=" (memory)"),
        _case("depthwise-512-32-b1", _DEPTHWISE),
        _case("depthwise-512-16-b16", _vary(_DEPTHWISE, size=16, batch=16)),
        _case("s64-b1-bf16", _vary(_S64, dtype=torch.bfloat16), *_BF16_CONTENDERS, "openvino", "conv2d"),
        _case("s64-b1-dynamic", _S64, "ours-compiled", "ours-dynamic", "conv2d", note=", dynamic shapes"),
        _case("s64-b1-threads", _S64, "ours-compiled", "ours-1-thread", "conv2d", note=", 1 thread against all"),
        _case("odd-stride2", Shape(64, 64, stride=2)),
        _case("odd-dilation2", _vary(_S32, dilation=2)),
        _case("odd-1x1", Shape(128, 32, kernel=1)),
        _case("odd-5x5", _vary(_S32, kernel=5)),
        _case("odd-3-channels", Shape(3, 64, out_channels=32)),
        _case("odd-37-channels", Shape(37, 32)),
        _case("odd-size", Shape(64, (33, 47), batch=3)),
        _case("odd-groups2", _vary(_S32, groups=2)),
        _case("odd-groups8", _vary(_S32, groups=8)),
        _case("odd-offset-groups2", _vary(_S32, offset_groups=2)),
        _case("odd-offset-groups4", _vary(_S32, offset_groups=4)),
    ),
)
