"""Deformable convolution, version 2 (with mask and bias), for inference."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.convolution import output_size
from ...ops.deform_conv2d import Arguments, deform_conv2d
from ...ops.registry import OPS
from .. import backends
from ..spec import Case, Contender, Job, Prepared, Suite

_OFFSET_SPREAD = 2.0  # pixels, standard deviation


@dataclasses.dataclass(frozen=True)
class Shape:
    """A layer and its input; sizes are (height, width) or one number for both."""

    channels: int
    size: int | tuple[int, int]
    batch: int = 1
    out_channels: int | None = None  # as many as channels
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    offset_groups: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        out = "" if self.out_channels is None else f" to {self.out_channels}"
        parts = [f"{self.channels}{out} ch, {height}x{width}, batch {self.batch}"]
        parts += [f"{self.kernel}x{self.kernel} kernel"] if self.kernel != 3 else []
        for name in ("stride", "dilation", "groups", "offset_groups"):
            value = getattr(self, name)
            if value != 1:
                depthwise = name == "groups" and value == self.channels
                parts.append("depthwise" if depthwise else f"{name.replace('_', ' ')} {value}")
        return ", ".join(parts + ([str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []))


def map_tensors(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """With all tensors changed."""
    return Arguments(*(change(value) if isinstance(value, Tensor) else value for value in arguments))


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


class _Layer(nn.Module):
    """The operator as models hold it: weight and bias belong to the module, the rest comes in."""

    def __init__(self, function: Callable[..., Tensor], arguments: Arguments) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(arguments.weight)
        self.bias = nn.Parameter(arguments.bias)
        self.geometry = arguments.stride, arguments.padding, arguments.dilation

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return self.function(input, offset, self.weight, self.bias, *self.geometry, mask)


def _compiled(
    job: Job,
    function: Callable[..., Tensor] = deform_conv2d,
    change: Callable[[Arguments], Arguments] = lambda arguments: arguments,
    dynamic: bool | None = None,
) -> Prepared:
    a = change(job.inputs)
    return backends.compiled(_Layer(function, a), (a.input, a.offset, a.mask), dynamic=dynamic)


def _channels_last(arguments: Arguments) -> Arguments:
    return arguments._replace(input=arguments.input.contiguous(memory_format=torch.channels_last))


def _float32(arguments: Arguments) -> Arguments:
    return map_tensors(arguments, torch.Tensor.float)


def _packaged(job: Job) -> Prepared:
    a = job.inputs
    return backends.packaged(_Layer(deform_conv2d, a), (a.input, a.offset, a.mask))


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
    node = helper.make_node(
        "DeformConv",
        ["input", "weight", "offset", "bias", "mask"],
        ["output"],
        kernel_shape=a.weight.shape[2:],
        strides=a.stride,
        pads=a.padding * 2,
        dilations=a.dilation,
        group=a.groups,
        offset_group=a.offset_groups,
    )
    feeds = {"input": a.input, "offset": a.offset, "mask": a.mask}
    constants = {"weight": a.weight, "bias": a.bias}
    model = backends.onnx_model(node, feeds, 19, constants)  # 19: the first with it
    return backends.onnxruntime(model, feeds, job.threads)


def _openvino(job: Job) -> Prepared:
    import numpy as np
    import openvino as ov
    from openvino import opset8

    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[job.inputs.input.dtype]
    a = _float32(job.inputs)
    feeds = [a.input, a.offset, a.mask]
    parameters = [opset8.parameter(tensor.shape, np.float32) for tensor in feeds]
    image, offset, mask = parameters
    convolution = opset8.deformable_convolution(
        image,
        offset,
        opset8.constant(a.weight.numpy()),
        list(a.stride),
        list(a.padding),
        list(a.padding),
        list(a.dilation),
        mask=mask,
        group=a.groups,
        deformable_group=a.offset_groups,
        bilinear_interpolation_pad=True,
    )
    output = opset8.add(convolution, opset8.constant(a.bias[:, None, None].numpy()))
    return backends.openvino(ov.Model([output], parameters), feeds, job.threads, precision)


def _conv2d(job: Job) -> Prepared:
    """oneDNN's convolution of the same shape, in the layout that it likes best."""
    a = job.inputs
    image, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (a.input, a.weight))
    return backends.eager(F.conv2d, (image, weight, a.bias, a.stride, a.padding, a.dilation, a.groups))


_CONTENDERS = backends.with_triton(
    Contender("ours-compiled", "ours", _compiled, compiled=True),
    Contender("ours-aoti", "ours", _packaged, compiled=True),
    Contender("ours-channels-last", "ours", functools.partial(_compiled, change=_channels_last), compiled=True),
    Contender("ours-dynamic", "ours", functools.partial(_compiled, dynamic=True), compiled=True, default=False),
    Contender("ours-1-thread", "ours", _compiled, compiled=True, threads=1, default=False),
    Contender("ours-fp32", "ours", functools.partial(_compiled, change=_float32), compiled=True, default=False),
    Contender("decomposition", "peer", lambda job: backends.eager(_decomposition, job.inputs)),
    Contender("decomposition-compiled", "peer", functools.partial(_compiled, function=_decomposition), compiled=True),
    Contender("torchvision", "peer", _torchvision, check=backends.needs_torchvision),
    Contender("onnxruntime", "peer", _onnxruntime, check=backends.needs("onnx", "onnxruntime")),
    Contender("openvino", "peer", _openvino, check=backends.needs("openvino")),
    Contender("conv2d", "limit", _conv2d),
)

_S32 = Shape(64, 32)
_S64 = Shape(256, 64)
_DEPTHWISE = Shape(512, 32, groups=512)
_BF16_CONTENDERS = ("ours-compiled", "ours-fp32", "ours-aoti", "decomposition-compiled", "torchvision", "onnxruntime")


def _case(name: str, shape: Shape, *contenders: str, note: str = "") -> Case:
    tolerance = 1e-5 if shape.dtype == torch.float32 else 2e-2
    return Case(name, f"{shape}{note}", functools.partial(build, shape), tolerance, contenders)


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
        _case("odd-dilation2", _vary(_S32, padding=2, dilation=2)),
        _case("odd-1x1", Shape(128, 32, kernel=1, padding=0)),
        _case("odd-5x5", _vary(_S32, kernel=5, padding=2)),
        _case("odd-3-channels", Shape(3, 64, out_channels=32)),
        _case("odd-37-channels", Shape(37, 32)),
        _case("odd-size", Shape(64, (33, 47), batch=3)),
        _case("odd-groups2", _vary(_S32, groups=2)),
        _case("odd-groups8", _vary(_S32, groups=8)),
        _case("odd-offset-groups2", _vary(_S32, offset_groups=2)),
        _case("odd-offset-groups4", _vary(_S32, offset_groups=4)),
    ),
)
