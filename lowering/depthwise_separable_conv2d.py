"""depthwise_separable_conv2d as one C++ kernel, inverted_residual_conv2d as the same with an expansion, and the
depthwise half of the gradients as another.

See cpp/depthwise_separable_conv2d.h and depthwise_separable_conv2d_backward.h.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.convolution import empty_output
from ..ops.depthwise_separable_conv2d import (
    PRELU,
    Arguments,
    DepthwiseGradients,
    check_arguments,
    depthwise_gradients,
    gradients,
    parse_activation,
)
from ..ops.gradients import gradient_format
from ..ops.inverted_residual_conv2d import Arguments as InvertedResidual, check_arguments as check_inverted_residual
from ..ops.registry import GRADIENTS, OPS, accumulate_dtype
from .common.constants import realize_constant
from .common.geometry import by_axis, constant_geometry
from .common.internal_op import define_internal_op
from .common.layout import image_and_format
from .common.machine import cache_bytes
from .common.panels import MAX_DEPTH, pack_panels, unpack_panels
from .common.registry import Template, template_for
from .common.template import BlocksTemplate, ResultsTemplate, double, in_cpp, pointer, size_in_cpp, sizes, struct, view
from .inductor.codegen import DTYPE_TO_CPP, CppTemplateKernel, V, ir


@dataclasses.dataclass(frozen=True)
class Separable:
    """What is known of a call when it is compiled: all but batch and image size."""

    multiplier: int
    out_channels: int
    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    activation: str

    SCHEMA = (
        "int multiplier, int out_channels, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
        "str activation"
    )

    @property
    def arguments(self) -> list[Any]:
        """The arguments that tell the internal operator all of this."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def declare(
        self,
        kernel: CppTemplateKernel,
        image: ir.IRNode,
        tensors: Sequence[ir.IRNode | None],
        out_size: Sequence[Any],
        channels: int | None = None,
    ) -> str:
        """C++ that defines `op`; ``tensors`` are depthwise weight and bias, pointwise weight and bias.

        ``channels``: those of the expanded image, if it is.
        """
        names = "depthwise_weight", "depthwise_bias", "pointwise_weight", "pointwise_bias"
        size = sizes(kernel, image, "batch", "channels", "height", "width")
        if channels is not None:
            size["channels"] = str(channels)
        op = struct(
            "DepthwiseSeparableConv2d",
            DTYPE_TO_CPP[image.get_dtype()],
            input=view(kernel, image),
            **{name: pointer(kernel, tensor) for name, tensor in zip(names, tensors)},
            **size,
            multiplier=self.multiplier,
            out_channels=self.out_channels,
            **by_axis(
                out=out_size, kernel=self.kernel, stride=self.stride, padding=self.padding, dilation=self.dilation
            ),
        )
        return f"const auto op = {op};"

    def declare_activation(self, kernel: CppTemplateKernel, slope: ir.IRNode | None) -> str:
        """C++ that defines `activation`."""
        if self.activation == PRELU:
            value = f"static_cast<double>(*{pointer(kernel, slope)})"
            return f"const auto activation = {struct('Prelu', slope=value)};"
        return _declare_activation("activation", self.activation)

    def blocking(self, dtype: torch.dtype) -> int:
        """SeparableBlocking: pixels of a tile whose hidden channels and sums take half of the second-level cache."""
        itemsize = accumulate_dtype(dtype).itemsize
        return max(12, min(96, cache_bytes() // 2 // ((MAX_DEPTH + self.out_channels) * itemsize)))


def _declare_activation(variable: str, text: str) -> str:
    """C++ that defines a variable of a type of cpp/activations.h: of leaky_relu ``LeakyRelu<what has its slope>``."""
    activation = parse_activation(text)
    assert activation is not None
    name = "".join(word.capitalize() for word in text.partition("(")[0].split("_"))
    if not activation.parameters:
        return f"const inductor_vision::{name} {variable}{{}};"
    parameters = f"{variable}_parameters"
    values = (f"static constexpr double {k}() {{ return {double(v)}; }}" for k, v in activation.parameters.items())
    return f"struct {parameters} {{ {' '.join(values)} }}; const inductor_vision::{name}<{parameters}> {variable}{{}};"


def _refusal(*args: Any) -> str | None:
    call = Arguments(*args)
    return constant_geometry(call.stride, call.padding, call.dilation)


def _refusal_expanded(*args: Any) -> str | None:
    call = InvertedResidual(*args)
    return constant_geometry(call.stride, call.padding, call.dilation)


def _refusal_backward(grad: Tensor, *args: Any) -> str | None:
    return _refusal(*args[:-1])


def _separable(call: Arguments) -> Separable:
    return Separable(
        call.multiplier, call.out_channels, call.kernel, call.stride, call.padding, call.dilation, call.activation
    )


def _by_multiplier(call: Arguments, values: Tensor) -> Tensor:
    """``[C * M, n]`` as ``[M * C, n]``."""
    return values.reshape(call.channels, call.multiplier, -1).transpose(0, 1).reshape(call.hidden_channels, -1)


def _by_channel(call: Arguments, values: Tensor) -> Tensor:
    """The reverse."""
    return values.reshape(call.multiplier, call.channels, -1).transpose(0, 1).reshape(call.hidden_channels, -1)


def _pack_depthwise(call: Arguments) -> tuple[Tensor, Tensor | None]:
    """Weight, ``[K, M * C]``, and bias of the depthwise convolution."""
    dtype = accumulate_dtype(call.input.dtype)
    weight = _by_multiplier(call, call.depthwise_weight.to(dtype)).t().contiguous()
    if call.depthwise_bias is None:
        return weight, None
    return weight, _by_multiplier(call, call.depthwise_bias.to(dtype)).reshape(-1).clone()


def _pack(call: Arguments) -> tuple[Tensor, Tensor, Tensor | None]:
    """Depthwise and pointwise weight, and depthwise bias."""
    depthwise, bias = _pack_depthwise(call)
    dtype = accumulate_dtype(call.input.dtype)
    pointwise = _by_multiplier(call, call.pointwise_weight.to(dtype).reshape(call.out_channels, -1).t()).t()
    return depthwise, pack_panels(pointwise[None, :, :, None]), bias  # of [O, M * C]


def _prepack(*args: Any) -> Tensor:
    call = Arguments(*args)
    tensors = call.input, *_pack(call), call.pointwise_bias, call.slope
    return _prepacked(*tensors, *_separable(call).arguments, check_arguments(call))


def _prepack_expanded(*args: Any) -> Tensor:
    call = InvertedResidual(*args)
    separable = call.separable(call.of_its_size())
    expansion = pack_panels(call.expansion_weight[None, :, :, :, 0])  # of [E, C]
    bias = call.expansion_weight.new_zeros(call.channels) if call.expansion_bias is None else call.expansion_bias
    padding = expansion.shape[1] * expansion.shape[4] - call.channels  # to whole panels
    expansion_bias = torch.constant_pad_nd(bias.to(expansion.dtype), [0, padding])
    tensors = call.input, expansion, expansion_bias, *_pack(separable), call.pointwise_bias
    arguments = call.channels, call.expansion_activation, *_separable(separable).arguments
    return _prepacked_expanded(*tensors, *arguments, check_inverted_residual(call))


def _depthwise_gradients(call: Arguments, grad_hidden: Tensor | None, wanted: DepthwiseGradients) -> DepthwiseGradients:
    weight, bias = _pack_depthwise(call)
    if grad_hidden is not None:
        grad_hidden = _by_multiplier(call, grad_hidden.t()).t()
    channels_last = gradient_format(call.input) == torch.channels_last
    tensors = grad_hidden, call.input, weight, bias, call.slope
    grad_input, grad_weight, grad_bias, grad_slope, hidden = _gradients(
        *tensors, *_separable(call).arguments, check_arguments(call), channels_last, wanted
    )
    return DepthwiseGradients(
        grad_input if wanted.input else None,
        _by_channel(call, grad_weight.t()) if wanted.weight else None,
        _by_channel(call, grad_bias).reshape(-1) if wanted.bias else None,
        grad_slope if wanted.slope else None,
        _by_channel(call, hidden.t()).t() if wanted.hidden else None,
    )


def _unpacked(
    input: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    slope: Tensor | None,
    separable: Separable,
) -> Arguments:
    """The operator's arguments from what :func:`_pack_depthwise` made of them, and ``pointwise``, ``[O, M * C]``."""
    tensors = input, depthwise.t(), pointwise, depthwise_bias, pointwise_bias, slope
    packed = Arguments(
        *tensors, separable.stride, separable.padding, separable.dilation, activation=separable.activation
    )
    depthwise = _by_channel(packed, packed.depthwise_weight).reshape(-1, 1, *separable.kernel)
    pointwise = _by_channel(packed, pointwise.t()).t()[:, :, None, None]
    if depthwise_bias is not None:
        depthwise_bias = _by_channel(packed, depthwise_bias).flatten().to(input.dtype)
    return packed._replace(
        depthwise_weight=depthwise.to(input.dtype),
        pointwise_weight=pointwise.to(input.dtype),
        depthwise_bias=depthwise_bias,
    )


def _prepacked_body(input: Tensor, depthwise: Tensor, packed: Tensor, *args: Any) -> Tensor:
    depthwise_bias, pointwise_bias, slope, *fields, _ = args
    separable = Separable(*fields)
    pointwise = unpack_panels(packed, separable.out_channels)[0, :, :, 0]  # [O, M * C]
    call = _unpacked(input, depthwise, pointwise, depthwise_bias, pointwise_bias, slope, separable)
    return OPS["depthwise_separable_conv2d"].decomposition(*call)


def _fake_prepacked(input: Tensor, *args: Any) -> Tensor:
    return empty_output(input, args[6], args[-1])


def _expanded_body(input: Tensor, expansion: Tensor, expansion_bias: Tensor, *args: Any) -> Tensor:
    depthwise, packed, depthwise_bias, pointwise_bias, channels, activation, *fields, _ = args
    separable = Separable(*fields)
    pointwise = unpack_panels(packed, separable.out_channels)[0, :, :, 0]  # [O, M * E]
    expanded = input[:, :1].expand(-1, channels, -1, -1)  # only its size matters
    a = _unpacked(expanded, depthwise, pointwise, depthwise_bias, pointwise_bias, None, separable)
    weight = unpack_panels(expansion, channels)[0, :, :, 0, None, None].to(input.dtype)  # [E, C, 1, 1]
    weights = weight, a.depthwise_weight, a.pointwise_weight
    biases = expansion_bias[:channels].to(input.dtype), a.depthwise_bias, a.pointwise_bias
    geometry = a.stride, a.padding, a.dilation
    return OPS["inverted_residual_conv2d"].decomposition(input, *weights, *biases, *geometry, activation, a.activation)


def _fake_expanded(input: Tensor, *args: Any) -> Tensor:
    return empty_output(input, args[9], args[-1])


def _lower(
    input: ir.TensorBox,
    depthwise: ir.TensorBox,
    pointwise: ir.TensorBox,
    depthwise_bias: ir.TensorBox | None,
    pointwise_bias: ir.TensorBox | None,
    slope: ir.TensorBox | None,
    *args: Any,
) -> ir.TensorBox:
    node = V.graph.current_node
    image, channels_last = image_and_format(input, node)
    tensors = (depthwise, pointwise, depthwise_bias, pointwise_bias, slope)
    return DepthwiseSeparableConv2dTemplate(
        Separable(*args[:-1]),
        image,
        [realize_constant(i, tensor) for i, tensor in enumerate(tensors, 1)],
        ir.convert_shape_to_inductor(node.meta["val"].shape),
        channels_last,
    ).output()


def _lower_expanded(
    input: ir.TensorBox,
    expansion: ir.TensorBox,
    expansion_bias: ir.TensorBox,
    depthwise: ir.TensorBox,
    pointwise: ir.TensorBox,
    depthwise_bias: ir.TensorBox | None,
    pointwise_bias: ir.TensorBox | None,
    channels: int,
    activation: str,
    *args: Any,
) -> ir.TensorBox:
    node = V.graph.current_node
    image, channels_last = image_and_format(input, node)
    tensors = (expansion, expansion_bias, depthwise, pointwise, depthwise_bias, pointwise_bias)
    weight, bias, *others = (realize_constant(i, tensor) for i, tensor in enumerate(tensors, 1))
    return InvertedResidualConv2dTemplate(
        Separable(*args[:-1]),
        image,
        [*others, None, weight, bias],
        ir.convert_shape_to_inductor(node.meta["val"].shape),
        channels_last,
        channels,
        activation,
    ).output()


class DepthwiseSeparableConv2dTemplate(BlocksTemplate):
    """See cpp/depthwise_separable_conv2d.h."""

    op = "depthwise_separable_conv2d"
    header = "depthwise_separable_conv2d.h"
    channels: int | None = None  # of the expanded image, if it is

    def __init__(
        self,
        separable: Separable,
        image: ir.IRNode,
        tensors: Sequence[ir.IRNode | None],
        size: Sequence[Any],
        channels_last: bool,
    ) -> None:
        """
        Args:
            tensors: depthwise and pointwise weight, depthwise and pointwise bias, slope; those of an expansion.
        """
        super().__init__([image, *(t for t in tensors if t is not None)], image.get_dtype(), size, channels_last)
        self.separable = separable
        self.present = [tensor is not None for tensor in tensors]

    @property
    def path(self) -> str:
        return f"one pass, tiles of {self.separable.blocking(self.dtype)} pixels"

    def declare_expansion(self, kernel: CppTemplateKernel, tensors: Sequence[ir.IRNode | None]) -> str:
        """C++ that defines `expansion`."""
        return "const inductor_vision::NoExpansion expansion{};"

    def call(self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], store: str) -> str:
        image, *given = inputs
        tensors = [given.pop(0) if present else None for present in self.present]
        depthwise, pointwise, depthwise_bias, pointwise_bias, slope, *expansion = tensors
        of_op = depthwise, depthwise_bias, pointwise, pointwise_bias
        return f"""
    {self.separable.declare(kernel, image, of_op, self.output_size(kernel)[2:], self.channels)}
    {self.declare_expansion(kernel, expansion)}
    const auto blocking = {struct("SeparableBlocking", pixels=self.separable.blocking(self.dtype))};
    {self.separable.declare_activation(kernel, slope)}
    const auto store = {store};
    inductor_vision::depthwise_separable_conv2d<{in_cpp(self.channels_last)}>(
        op, expansion, activation, blocking, store);"""


class InvertedResidualConv2dTemplate(DepthwiseSeparableConv2dTemplate):
    """The same kernel with an expansion."""

    op = "inverted_residual_conv2d"

    def __init__(self, *args: Any) -> None:
        """
        Args:
            args: those of the base; channels and activation of the expanded image.
        """
        *of_base, self.channels, self.activation = args
        super().__init__(*of_base)

    def declare_expansion(self, kernel: CppTemplateKernel, tensors: Sequence[ir.IRNode | None]) -> str:
        """C++ that defines `expansion`."""
        weight, bias = (pointer(kernel, tensor) for tensor in tensors)
        types = DTYPE_TO_CPP[accumulate_dtype(self.dtype)], "decltype(expansion_activation)"
        image_channels = kernel.size(self.inputs[0], 1)
        values = {"weight": weight, "bias": bias, "channels": image_channels, "activation": "expansion_activation"}
        return f"""{_declare_activation("expansion_activation", self.activation)}
    const auto expansion = {struct("Expansion", *types, **values)};"""


def _gradients_body(
    grad_hidden: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None, slope: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    separable, (_, channels_last, wanted) = Separable(*args[:-3]), args[-3:]
    pointwise = weight.new_empty(separable.out_channels, weight.shape[1])  # its values do not matter
    call = _unpacked(input, weight, pointwise, bias, None, slope, separable)
    if grad_hidden is not None:
        grad_hidden = _by_channel(call, grad_hidden.t()).t()
    half = depthwise_gradients(call, grad_hidden, DepthwiseGradients(*wanted))
    format = torch.channels_last if channels_last else torch.contiguous_format
    return (
        input.new_empty(0) if half.input is None else half.input.to(input.dtype).contiguous(memory_format=format),
        weight.new_empty(0) if half.weight is None else _by_multiplier(call, half.weight).t().contiguous(),
        weight.new_empty(0) if half.bias is None else _by_multiplier(call, half.bias).flatten(),
        weight.new_empty(0) if half.slope is None else half.slope,
        weight.new_empty(0) if half.hidden is None else _by_multiplier(call, half.hidden.t()).t().contiguous(),
    )


def _fake_gradients(grad_hidden: Tensor | None, input: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    out_size, channels_last, wanted = args[-3:]
    taps, hidden = weight.shape
    grad_input = input.new_empty(0)
    if wanted[0]:
        format = torch.channels_last if channels_last else torch.contiguous_format
        grad_input = input.new_empty(input.shape).contiguous(memory_format=format)
    sizes = [[taps, hidden], [hidden], [1], [input.shape[0] * out_size[0] * out_size[1], hidden]]
    return grad_input, *(weight.new_empty(size if want else [0]) for size, want in zip(sizes, wanted[1:]))


def _lower_gradients(
    grad_hidden: ir.TensorBox | None,
    input: ir.TensorBox,
    weight: ir.TensorBox,
    bias: ir.TensorBox | None,
    slope: ir.TensorBox | None,
    *args: Any,
) -> list[ir.TensorBox]:
    *separable, out_size, channels_last, wanted = args
    realize, require_contiguous = ir.ExternKernel.realize_input, ir.ExternKernel.require_contiguous
    grad = None if grad_hidden is None else realize(require_contiguous(grad_hidden))
    return DepthwiseGradientsTemplate(
        Separable(*separable),
        out_size,
        channels_last,
        realize(input),
        [grad, realize_constant(2, weight), realize_constant(3, bias), realize_constant(4, slope)],
        wanted,
    ).results()


class DepthwiseGradientsTemplate(ResultsTemplate):
    """See cpp/depthwise_separable_conv2d_backward.h."""

    op = "depthwise_separable_conv2d_backward"
    header = "depthwise_separable_conv2d_backward.h"
    names = ("grad_input", "grad_weight", "grad_bias", "grad_slope", "hidden")

    def __init__(
        self,
        separable: Separable,
        out_size: Sequence[Any],
        channels_last: bool,
        image: ir.IRNode,
        tensors: Sequence[ir.IRNode | None],
        wanted: Sequence[bool],
    ) -> None:
        """
        Args:
            out_size: height and width.
            channels_last: memory format of the input's gradient.
            tensors: gradient of the hidden channels, depthwise weight and bias, slope.
        """
        super().__init__([image, *(t for t in tensors if t is not None)], wanted)
        self.separable = separable
        self.out_size = out_size
        self.channels_last = channels_last
        self.present = [tensor is not None for tensor in tensors]

    @property
    def path(self) -> str:
        names = {
            "grad_input": "input",
            "grad_weight": "depthwise_weight",
            "grad_bias": "depthwise_bias",
            "grad_slope": "slope",
        }
        gradients = [f"gradient of {names[name]}" for name in self.wanted if name in names]
        return ", ".join([*gradients, *(["hidden channels"] if "hidden" in self.wanted else [])])

    def call(
        self, kernel: CppTemplateKernel, inputs: Sequence[ir.IRNode], results: dict[str, ir.Buffer]
    ) -> Sequence[str]:
        image, *tensors = inputs
        grad, weight, bias, slope = (tensors.pop(0) if present else None for present in self.present)
        gradients = struct(
            "SeparableGradients",
            DTYPE_TO_CPP[image.get_dtype()],
            grad_hidden=pointer(kernel, grad),
            channels_last=self.channels_last,
            input=pointer(kernel, results.get("grad_input")),
            weight=pointer(kernel, results.get("grad_weight")),
            bias=pointer(kernel, results.get("grad_bias")),
            slope=pointer(kernel, results.get("grad_slope")),
            hidden=pointer(kernel, results.get("hidden")),
        )
        return [
            self.separable.declare(kernel, image, [weight, bias, None, None], size_in_cpp(kernel, self.out_size)),
            f"const auto gradients = {gradients};",
            f"const auto blocking = {struct('SeparableBackwardBlocking', bytes=cache_bytes() // 2)};",
            self.separable.declare_activation(kernel, slope),
            "inductor_vision::depthwise_separable_conv2d_backward(op, activation, gradients, blocking);",
        ]


_prepacked = define_internal_op(
    "depthwise_separable_conv2d_prepacked(Tensor input, Tensor depthwise, Tensor packed, Tensor? depthwise_bias, "
    f"Tensor? pointwise_bias, Tensor? slope, {Separable.SCHEMA}, SymInt[2] out_size) -> Tensor",
    body=_prepacked_body,
    fake=_fake_prepacked,
    lower=_lower,
)
_prepacked_expanded = define_internal_op(
    "inverted_residual_conv2d_prepacked(Tensor input, Tensor expansion, Tensor expansion_bias, Tensor depthwise, "
    "Tensor packed, Tensor? depthwise_bias, Tensor? pointwise_bias, int channels, str expansion_activation, "
    f"{Separable.SCHEMA}, SymInt[2] out_size) -> Tensor",
    body=_expanded_body,
    fake=_fake_expanded,
    lower=_lower_expanded,
)
_gradients = define_internal_op(
    "depthwise_separable_conv2d_gradients(Tensor? grad_hidden, Tensor input, Tensor depthwise, Tensor? bias, "
    f"Tensor? slope, {Separable.SCHEMA}, SymInt[2] out_size, bool channels_last, bool[5] wanted) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    body=_gradients_body,
    fake=_fake_gradients,
    lower=_lower_gradients,
)
template_for("depthwise_separable_conv2d", Template(_refusal, prepack=_prepack))
template_for("inverted_residual_conv2d", Template(_refusal_expanded, prepack=_prepack_expanded))
_prepack_backward = GRADIENTS["depthwise_separable_conv2d"].completed(
    functools.partial(gradients, depthwise=_depthwise_gradients)
)
template_for("depthwise_separable_conv2d_backward", Template(_refusal_backward, prepack=_prepack_backward))
