"""Depthwise-separable convolution with biases and ReLU6 between them, as batch norms leave it, for inference."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.convolution import output_size
from ...ops.depthwise_separable_conv2d import IDENTITY, Arguments, depthwise_separable_conv2d, parse_activation
from ...ops.registry import OPS
from .. import backends
from ..spec import Case, Contender, Job, Prepared, Suite


@dataclasses.dataclass(frozen=True)
class Shape:
    """A layer and its input, which is square."""

    channels: int
    out_channels: int
    size: int
    batch: int = 1
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    multiplier: int = 1
    activation: str = "relu6"
    dtype: torch.dtype = torch.float32

    @property
    def padding(self) -> int:
        """So that nothing is lost at the border."""
        return self.dilation * (self.kernel - 1) // 2

    def __str__(self) -> str:
        parts = [f"{self.channels} to {self.out_channels} ch, {self.size}x{self.size}, batch {self.batch}"]
        parts += [f"{self.kernel}x{self.kernel} kernel"] if self.kernel != 3 else []
        for name in ("stride", "dilation", "multiplier"):
            if getattr(self, name) != 1:
                parts.append(f"{name} {getattr(self, name)}")
        parts += [self.activation] if self.activation != "relu6" else []
        return ", ".join(parts + ([str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []))


def map_tensors(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """With all tensors changed."""
    return Arguments(*(change(value) if isinstance(value, Tensor) else value for value in arguments))


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


def reference(arguments: Arguments) -> Tensor:
    """The decomposition in float64."""
    return OPS["depthwise_separable_conv2d"].decomposition(*map_tensors(arguments, torch.Tensor.double))


def channels_last(arguments: Arguments) -> Arguments:
    """As in a channels_last model, whose weights here are the same: they have one channel or one pixel."""
    return arguments._replace(input=arguments.input.contiguous(memory_format=torch.channels_last))


def two_convolutions(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor,
    pointwise_bias: Tensor,
    *geometry: tuple[int, int],
    depthwise_activation: str | None,
) -> Tensor:
    """The same as models have it."""
    hidden = F.conv2d(input, depthwise_weight, depthwise_bias, *geometry, groups=input.shape[1])
    activation = parse_activation(depthwise_activation or IDENTITY)
    assert activation is not None, depthwise_activation
    return F.conv2d(activation(hidden), pointwise_weight, pointwise_bias)


class Layer(nn.Module):
    """The operator as models hold it: weights and biases belong to the module."""

    def __init__(self, function: Callable[..., Tensor], arguments: Arguments) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(t) for t in arguments.tensors[1:] if t is not None)
        self.geometry = arguments.stride, arguments.padding, arguments.dilation
        self.activation = None if arguments.activation == IDENTITY else arguments.activation

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input, *self.weights, *self.geometry, depthwise_activation=self.activation)


_Change = Callable[[Arguments], Arguments]


def _compiled(
    job: Job,
    function: Callable[..., Tensor] = depthwise_separable_conv2d,
    change: _Change = lambda arguments: arguments,
    dynamic: bool | None = None,
) -> Prepared:
    a = change(job.inputs)
    return backends.compiled(Layer(function, a), (a.input,), dynamic=dynamic)


def _packaged(job: Job) -> Prepared:
    return backends.packaged(Layer(depthwise_separable_conv2d, job.inputs), (job.inputs.input,))


def _eager(job: Job, change: _Change = lambda arguments: arguments) -> Prepared:
    a = change(job.inputs)
    return backends.eager(Layer(two_convolutions, a), (a.input,))


def _onnxruntime(job: Job) -> Prepared:
    from onnx import helper, numpy_helper

    a = job.inputs
    backends.only_float32(a.input.dtype, "ONNX Runtime")
    constants = {name: getattr(a, name) for name in a._fields[1:5]} | {
        "low": torch.tensor(0.0),
        "high": torch.tensor(6.0),
    }
    depthwise = ["input", "depthwise_weight", "depthwise_bias"]
    pointwise = ["between", "pointwise_weight", "pointwise_bias"]
    geometry = {"strides": a.stride, "pads": [*a.padding, *a.padding], "dilations": a.dilation, "group": a.channels}
    nodes = [
        helper.make_node("Conv", depthwise, ["hidden"], kernel_shape=a.kernel, **geometry),
        helper.make_node("Clip", ["hidden", "low", "high"], ["between"]),
        helper.make_node("Conv", pointwise, ["output"], kernel_shape=(1, 1)),
    ]
    image = helper.make_tensor_value_info(
        "input", helper.np_dtype_to_tensor_dtype(a.input.numpy().dtype), a.input.shape
    )
    output = helper.make_tensor_value_info("output", helper.np_dtype_to_tensor_dtype(a.input.numpy().dtype), None)
    initializers = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()]
    graph = helper.make_graph(nodes, "depthwise_separable", [image], [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return backends.onnxruntime(model.SerializeToString(), {"input": a.input}, job.threads)


def _openvino(job: Job) -> Prepared:
    import numpy as np
    import openvino as ov
    from openvino import opset8

    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[job.inputs.input.dtype]
    a = map_tensors(job.inputs, torch.Tensor.float)
    image = opset8.parameter(a.input.shape, np.float32)

    def biased(convolution: ov.Node, bias: Tensor) -> ov.Node:
        return opset8.add(convolution, opset8.constant(bias[:, None, None].numpy()))

    filters = a.depthwise_weight.view(a.channels, a.multiplier, 1, *a.kernel)  # groups, outputs of each, its inputs
    geometry = [list(pair) for pair in (a.stride, a.padding, a.padding, a.dilation)]
    hidden = opset8.group_convolution(image, opset8.constant(filters.numpy()), *geometry)
    hidden = opset8.clamp(biased(hidden, a.depthwise_bias), 0, 6)
    out = opset8.convolution(hidden, opset8.constant(a.pointwise_weight.numpy()), [1, 1], [0, 0], [0, 0], [1, 1])
    model = ov.Model([biased(out, a.pointwise_bias)], [image])
    return backends.openvino(model, [a.input], job.threads, precision)


def _pointwise(job: Job) -> Prepared:
    """The pointwise convolution alone, on what the depthwise one gives: channels_last, as oneDNN likes it best, and
    compiled with its weight frozen, which Inductor then has in oneDNN's own order."""
    a = job.inputs
    size = [output_size(*numbers) for numbers in zip(a.input.shape[2:], a.kernel, a.stride, a.padding, a.dilation)]
    hidden = a.input.new_zeros(a.input.shape[0], a.hidden_channels, *size).normal_()
    convolution = nn.Conv2d(a.hidden_channels, a.out_channels, 1, dtype=hidden.dtype)
    convolution.load_state_dict({"weight": a.pointwise_weight, "bias": a.pointwise_bias})
    return backends.compiled(convolution, (hidden.contiguous(memory_format=torch.channels_last),))


_convolutions_compiled = functools.partial(_compiled, function=two_convolutions)

_CONTENDERS = backends.with_triton(
    Contender("ours-compiled", "ours", _compiled, compiled=True),
    Contender("ours-channels-last", "ours", functools.partial(_compiled, change=channels_last), compiled=True),
    Contender("ours-aoti", "ours", _packaged, compiled=True),
    Contender("ours-dynamic", "ours", functools.partial(_compiled, dynamic=True), compiled=True, default=False),
    Contender("ours-1-thread", "ours", _compiled, compiled=True, threads=1, default=False),
    Contender("convolutions", "peer", _eager),
    Contender("convolutions-channels-last", "peer", functools.partial(_eager, change=channels_last)),
    Contender("convolutions-compiled", "peer", _convolutions_compiled, compiled=True),
    Contender(
        "convolutions-compiled-channels-last",
        "peer",
        functools.partial(_convolutions_compiled, change=channels_last),
        compiled=True,
    ),
    Contender("onnxruntime", "peer", _onnxruntime, check=backends.needs("onnx", "onnxruntime")),
    Contender("openvino", "peer", _openvino, check=backends.needs("openvino")),
    Contender("pointwise", "limit", _pointwise, compiled=True),
)

_LARGE = Shape(64, 128, 224)
_SMALL = Shape(256, 512, 28)
_vary = dataclasses.replace


def _case(name: str, shape: Shape, *contenders: str, note: str = "") -> Case:
    tolerance = 1e-5 if shape.dtype == torch.float32 else 2e-2
    return Case(name, f"{shape}{note}", functools.partial(build, shape), tolerance, contenders)


SUITE = Suite(
    name="depthwise_separable_conv2d",
    description="depthwise and pointwise convolution with ReLU6 between, 3x3 where nothing else is said, forward",
    reference=reference,
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
