"""Depthwise-separable convolution with biases and ReLU6 between them, as batch norms leave it, for inference."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.convolution import output_size
from ...ops.depthwise_separable_conv2d import Arguments, depthwise_separable_conv2d, parse_activation
from .. import backends, convolutions
from ..convolutions import Layer, map_tensors
from ..spec import Contender, Job, Prepared, Suite


@dataclasses.dataclass(frozen=True)
class Shape(convolutions.Shape):
    """A layer and its input, which is square."""

    channels: int
    out_channels: int
    size: int
    batch: int = 1
    multiplier: int = 1
    activation: str = "relu6"

    def __str__(self) -> str:
        sizes = f"{self.channels} to {self.out_channels} ch, {self.size}x{self.size}, batch {self.batch}"
        activation = [self.activation] if self.activation != "relu6" else []
        return self.describe(sizes, *self.unusual("multiplier"), *activation)


def build(shape: Shape) -> Arguments:
    """The arguments of a call; the same values at every call."""
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    hidden = shape.channels * shape.multiplier
    arguments = Arguments(
        input=normal(shape.batch, shape.channels, shape.size, shape.size),
        depthwise_weight=normal(hidden, 1, shape.kernel, shape.kernel) * (3 / shape.kernel),
        pointwise_weight=normal(shape.out_channels, hidden, 1, 1) / math.sqrt(hidden),
        depthwise_bias=normal(hidden),
        pointwise_bias=normal(shape.out_channels),
        slope=None,
        stride=(shape.stride, shape.stride),
        padding=(shape.padding, shape.padding),
        dilation=(shape.dilation, shape.dilation),
        activation=shape.activation,
    )
    return map_tensors(arguments, lambda tensor: tensor.to(shape.dtype))


def channels_last(arguments: Arguments) -> Arguments:
    """Put the image into channels_last; weights of one channel or one pixel are so as they are."""
    return convolutions.channels_last(arguments, "input")


def one_operator(*arguments: Any) -> Tensor:
    """This package's."""
    *tensors, slope, stride, padding, dilation, activation = arguments
    return depthwise_separable_conv2d(*tensors, stride, padding, dilation, activation, slope=slope)


def two_convolutions(*arguments: Any) -> Tensor:
    """The layers as models have them."""
    input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, _, *geometry, name = arguments
    hidden = F.conv2d(input, depthwise_weight, depthwise_bias, *geometry, groups=input.shape[1])
    activation = parse_activation(name)
    assert activation is not None, name
    return F.conv2d(activation(hidden), pointwise_weight, pointwise_bias)


def _onnxruntime(job: Job) -> Prepared:
    from onnx import helper

    a = job.inputs
    backends.only_float32(a.input.dtype, "ONNX Runtime")
    constants = {name: getattr(a, name) for name in a._fields[1:5]}
    constants |= {"low": torch.tensor(0.0), "high": torch.tensor(6.0)}
    geometry = convolutions.onnx_geometry(a, a.kernel, a.channels)
    depthwise = ["input", "depthwise_weight", "depthwise_bias"]
    pointwise = ["between", "pointwise_weight", "pointwise_bias"]
    nodes = [
        helper.make_node("Conv", depthwise, ["hidden"], **geometry),
        helper.make_node("Clip", ["hidden", "low", "high"], ["between"]),
        helper.make_node("Conv", pointwise, ["output"], kernel_shape=(1, 1)),
    ]
    feeds = {"input": a.input}
    return backends.onnxruntime(backends.onnx_model(nodes, feeds, 17, constants), feeds, job.threads)


def _openvino(job: Job) -> Prepared:
    import numpy as np
    import openvino as ov
    from openvino import opset8

    a = map_tensors(job.inputs, torch.Tensor.float)
    constant, biased = convolutions.openvino_constant, convolutions.openvino_biased
    image = opset8.parameter(a.input.shape, np.float32)
    filters = a.depthwise_weight.view(a.channels, a.multiplier, 1, *a.kernel)  # groups, outputs of each, its inputs
    hidden = opset8.group_convolution(image, constant(filters), *convolutions.openvino_geometry(a))
    hidden = opset8.clamp(biased(hidden, a.depthwise_bias), 0, 6)
    out = opset8.convolution(hidden, constant(a.pointwise_weight), [1, 1], [0, 0], [0, 0], [1, 1])
    model = ov.Model([biased(out, a.pointwise_bias)], [image])
    return backends.openvino(model, [a.input], job.threads, job.inputs.input.dtype)


def _pointwise(job: Job) -> Prepared:
    """The pointwise convolution alone, on what the depthwise one gives: channels_last, as oneDNN likes it best, and
    compiled with its weight frozen, which Inductor then has in oneDNN's own order."""
    a = job.inputs
    size = [output_size(*numbers) for numbers in zip(a.input.shape[2:], a.kernel, a.stride, a.padding, a.dilation)]
    hidden = a.input.new_zeros(a.input.shape[0], a.hidden_channels, *size).normal_()
    convolution = nn.Conv2d(a.hidden_channels, a.out_channels, 1, dtype=hidden.dtype)
    convolution.load_state_dict({"weight": a.pointwise_weight, "bias": a.pointwise_bias})
    return backends.compiled(convolution, (hidden.contiguous(memory_format=torch.channels_last),))


_WEIGHTS_AND_BIASES = 1, 2, 3, 4

_CONTENDERS = backends.with_triton(
    *convolutions.ours(Layer(one_operator, _WEIGHTS_AND_BIASES), channels_last),
    *convolutions.stock("convolutions", Layer(two_convolutions, _WEIGHTS_AND_BIASES), channels_last),
    Contender("onnxruntime", "peer", _onnxruntime, check=backends.needs("onnx", "onnxruntime")),
    Contender("openvino", "peer", _openvino, check=backends.needs("openvino")),
    Contender("pointwise", "limit", _pointwise, compiled=True),
)

_LARGE = Shape(64, 128, 224)
_SMALL = Shape(256, 512, 28)
_vary = dataclasses.replace
_case = functools.partial(convolutions.case, build)

SUITE = Suite(
    name="depthwise_separable_conv2d",
    description="depthwise and pointwise convolution with ReLU6 between, 3x3 where nothing else is said, forward",
    remark="A call of compiled code takes 0.1 ms whatever it does, which a package's does not.",
    reference=functools.partial(convolutions.reference, "depthwise_separable_conv2d"),
    contenders=_CONTENDERS,
    cases=(
        _case("224-b1", _LARGE),
        _case("224-b8", _vary(_LARGE, batch=8)),
        _case("28-b1", _SMALL),
        _case("28-b8", _vary(_SMALL, batch=8)),
        _case("224-b1-bf16", _vary(_LARGE, dtype=torch.bfloat16)),
        _case("28-b1-bf16", _vary(_SMALL, dtype=torch.bfloat16)),
        # Layers of MobileNetV2.
        _case("mobilenet-32-112-b1", Shape(32, 16, 112)),
        _case("mobilenet-96-112-stride2-b1", Shape(96, 24, 112, stride=2)),
        _case("mobilenet-96-112-stride2-b8", Shape(96, 24, 112, batch=8, stride=2)),
        _case("mobilenet-144-56-b1", Shape(144, 24, 56)),
        _case("mobilenet-144-56-stride2-b1", Shape(144, 32, 56, stride=2)),
        _case("mobilenet-192-28-b1", Shape(192, 32, 28)),
        _case("mobilenet-384-14-b1", Shape(384, 64, 14)),
        _case("mobilenet-384-14-b8", Shape(384, 64, 14, batch=8)),
        _case("mobilenet-576-14-stride2-b1", Shape(576, 160, 14, stride=2)),
        _case("mobilenet-960-7-b1", Shape(960, 160, 7)),
        _case("mobilenet-960-7-b8", Shape(960, 160, 7, batch=8)),
        _case("224-b1-dynamic", _LARGE, "ours-compiled", "ours-dynamic", "pointwise", note=", dynamic shapes"),
        _case("224-b1-threads", _LARGE, "ours-compiled", "ours-1-thread", "pointwise", note=", 1 thread against all"),
        _case("odd-5x5", Shape(120, 40, 28, kernel=5)),
        _case("odd-dilation2", Shape(256, 256, 33, dilation=2)),
        _case("odd-multiplier2", Shape(64, 64, 56, multiplier=2)),
        _case("odd-37-channels", Shape(37, 19, 56)),
    ),
)
