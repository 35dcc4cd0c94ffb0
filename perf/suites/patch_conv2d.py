"""Convolution of many small patches with a bias, for inference."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.convolution import output_size
from ...ops.patch_conv2d import CHANNELS_FIRST, CHANNELS_LAST, Arguments, arranged, patch_conv2d
from ...ops.registry import OPS
from .. import backends
from ..spec import Case, Contender, Job, Prepared, Suite


@dataclasses.dataclass(frozen=True)
class Shape:
    """A layer and its input, of square patches."""

    patches: int
    size: int
    channels: int = 32
    out_channels: int = 64
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def padding(self) -> int:
        """So that nothing is lost at the border."""
        return self.dilation * (self.kernel - 1) // 2

    def __str__(self) -> str:
        parts = [f"{self.patches} patches of {self.size}x{self.size}, {self.channels} to {self.out_channels} ch"]
        parts += [f"{self.kernel}x{self.kernel} kernel"] if self.kernel != 3 else []
        for name in ("stride", "dilation", "groups"):
            if getattr(self, name) != 1:
                parts.append(f"{name} {getattr(self, name)}")
        return ", ".join(parts + ([str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []))


def map_tensors(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """With all tensors changed."""
    return Arguments(*(change(value) if isinstance(value, Tensor) else value for value in arguments))


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


def _reference(arguments: Arguments) -> Tensor:
    """The decomposition in float64."""
    return OPS["patch_conv2d"].decomposition(*map_tensors(arguments, torch.Tensor.double))


def in_order(arguments: Arguments, order: tuple[int, ...]) -> Arguments:
    """With the patches in this order in memory."""
    return arguments._replace(input=arranged(arguments.input, order))


class _Layer(nn.Module):
    """The operator as models hold it: weight and bias belong to the module."""

    def __init__(self, function: Callable[..., Tensor], arguments: Arguments) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(arguments.weight)
        self.bias = nn.Parameter(arguments.bias)
        self.geometry = arguments.stride, arguments.padding, arguments.dilation, arguments.groups

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input, self.weight, self.bias, *self.geometry)


def conv2d_of_the_batch(input: Tensor, weight: Tensor, bias: Tensor, *geometry) -> Tensor:
    """The patches as a batch of images. [1, N, O, Ho, Wo]"""
    return F.conv2d(input.squeeze(0), weight, bias, *geometry).unsqueeze(0)


def _unfold(input: Tensor, weight: Tensor, bias: Tensor, stride, padding, dilation, groups: int) -> Tensor:
    """All columns, then one matrix product for each patch. [1, N, O, Ho, Wo]"""
    pairs = zip(input.shape[3:], weight.shape[2:], stride, padding, dilation)
    size = [output_size(*numbers) for numbers in pairs]
    columns = F.unfold(input.squeeze(0), weight.shape[2:], dilation, padding, stride)  # [N, C * K, P]
    columns = columns.unflatten(1, (groups, -1))  # [N, G, Cg * K, P]
    out = weight.flatten(1).unflatten(0, (groups, -1)) @ columns  # [N, G, Og, P]
    return (out.flatten(1, 2) + bias[:, None]).unflatten(2, size).unsqueeze(0)


def _compiled(
    job: Job,
    function: Callable[..., Tensor] = patch_conv2d,
    order: tuple[int, ...] | None = None,
) -> Prepared:
    a = job.inputs if order is None else in_order(job.inputs, order)
    return backends.compiled(_Layer(function, a), (a.input,))


def _packaged(job: Job) -> Prepared:
    return backends.packaged(_Layer(patch_conv2d, job.inputs), (job.inputs.input,))


def _eager(
    job: Job, function: Callable[..., Tensor] = conv2d_of_the_batch, order: tuple[int, ...] | None = None
) -> Prepared:
    """``order`` is that of the input; a channels_last one has a channels_last weight."""
    a = job.inputs
    if order is not None:
        a = in_order(a, order)._replace(weight=a.weight.contiguous(memory_format=torch.channels_last))
    return backends.eager(_Layer(function, a), (a.input,))


def _onnxruntime(job: Job) -> Prepared:
    from onnx import helper

    a = job.inputs
    backends.only_float32(a.input.dtype, "ONNX Runtime")
    node = helper.make_node(
        "Conv",
        ["input", "weight", "bias"],
        ["output"],
        kernel_shape=a.weight.shape[2:],
        strides=a.stride,
        pads=a.padding * 2,
        dilations=a.dilation,
        group=a.groups,
    )
    feeds = {"input": a.input[0]}
    model = backends.onnx_model(node, feeds, 17, {"weight": a.weight, "bias": a.bias})
    return _unsqueezed(backends.onnxruntime(model, feeds, job.threads))


def _openvino(job: Job) -> Prepared:
    import numpy as np
    import openvino as ov
    from openvino import opset8

    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[job.inputs.input.dtype]
    a = map_tensors(job.inputs, torch.Tensor.float)
    patches = opset8.parameter(a.input.shape[1:], np.float32)
    geometry = [list(pair) for pair in (a.stride, a.padding, a.padding, a.dilation)]
    if a.groups == 1:
        out = opset8.convolution(patches, opset8.constant(a.weight.numpy()), *geometry)
    else:
        filters = a.weight.unflatten(0, (a.groups, -1))
        out = opset8.group_convolution(patches, opset8.constant(filters.numpy()), *geometry)
    out = opset8.add(out, opset8.constant(a.bias[:, None, None].numpy()))
    return _unsqueezed(backends.openvino(ov.Model([out], [patches]), [a.input[0]], job.threads, precision))


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


_CONTENDERS = backends.with_triton(
    Contender("ours-compiled", "ours", _compiled, compiled=True),
    Contender("ours-aoti", "ours", _packaged, compiled=True),
    Contender("ours-channels-last", "ours", functools.partial(_compiled, order=CHANNELS_LAST), compiled=True),
    Contender("ours-channels-first", "ours", functools.partial(_compiled, order=CHANNELS_FIRST), compiled=True),
    Contender("conv2d", "peer", _eager),
    Contender("conv2d-channels-last", "peer", functools.partial(_eager, order=CHANNELS_LAST)),
    Contender("conv2d-compiled", "peer", functools.partial(_compiled, function=conv2d_of_the_batch), compiled=True),
    Contender(
        "conv2d-compiled-channels-last",
        "peer",
        functools.partial(_compiled, function=conv2d_of_the_batch, order=CHANNELS_LAST),
        compiled=True,
    ),
    Contender("unfold", "peer", functools.partial(_eager, function=_unfold)),
    Contender("onnxruntime", "peer", _onnxruntime, check=backends.needs("onnx", "onnxruntime")),
    Contender("openvino", "peer", _openvino, check=backends.needs("openvino")),
    Contender("matrix-product", "limit", _matrix_product),
)

S4 = Shape(20480, 4)
S8 = Shape(5120, 8)
_vary = dataclasses.replace


def _case(name: str, shape: Shape) -> Case:
    tolerance = 1e-5 if shape.dtype == torch.float32 else 2e-2
    return Case(name, str(shape), functools.partial(build, shape), tolerance)


SUITE = Suite(
    name="patch_conv2d",
    description="convolution of many small patches, each padded by itself, 3x3 where nothing else is said, forward",
    reference=_reference,
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
