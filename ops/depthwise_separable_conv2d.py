"""Depthwise-separable convolution, the block that MobileNets are built of: https://arxiv.org/abs/1704.04861."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..paths import record_path
from .convolution import (
    check_dtypes,
    check_geometry,
    check_gradient,
    check_size,
    empty_output,
)
from .gradients import Gradient
from .registry import (
    accumulate_dtype,
    check,
    define_op,
    is_proxy,
    not_scriptable,
    pair,
    record_call,
)
from .transforms import as_one_batch


@not_scriptable
def depthwise_separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    depthwise_activation: str | None = None,
    pointwise_activation: str | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    r"""Depthwise convolution, activation, pointwise (1 x 1) convolution and activation, in one pass.

    With :math:`f` and :math:`g` the activations, :math:`k = cM + m` and :math:`M` the channel multiplier:

    .. math::
        h[b, k, p, q] = f\Bigl(\text{depthwise\_bias}[k] + \sum_{i, j} \text{depthwise\_weight}[k, 0, i, j] \cdot
            \text{input}[b, c](p \cdot \text{stride} - \text{padding} + i \cdot \text{dilation}, \dots)\Bigr)

        \text{out}[b, o, p, q] = g\Bigl(\text{pointwise\_bias}[o] + \sum_k \text{pointwise\_weight}[o, k, 0, 0] \cdot
            h[b, k, p, q]\Bigr)

    Pixels outside the image count as zero. The result is that of two calls of :func:`torch.nn.functional.conv2d`, the
    first with as many groups as channels. Compiled code never stores the whole of :math:`h`.

    Args:
        input: ``[B, C, H, W]`` or ``[C, H, W]``, float32, float64, bfloat16 or float16; the low precisions are computed
            in float32 and rounded once, at the end.
        depthwise_weight: ``[C * M, 1, kH, kW]``.
        pointwise_weight: ``[O, C * M, 1, 1]``.
        depthwise_bias: ``[C * M]``.
        pointwise_bias: ``[O]``.
        stride, padding, dilation: those of the depthwise convolution; one number, or one for each of height and width.
        depthwise_activation, pointwise_activation: what follows each convolution, None or one of ``"relu"``,
            ``"relu6"``, ``"leaky_relu"``, ``"hardtanh"``, ``"elu"``, ``"selu"``, ``"celu"``, ``"softplus"``,
            ``"softsign"``, ``"hardsigmoid"``, ``"hardswish"``, ``"sigmoid"``, ``"tanh"``, ``"silu"``, ``"mish"`` and
            ``"gelu"`` (exact): the functions of these names in :mod:`torch.nn.functional`; or ``"gelu_tanh"``, the
            approximation of gelu by tanh. Parameters other than the defaults are written behind the name, all of them:
            ``"leaky_relu(0.2)"``, ``"hardtanh(-2, 2)"``, ``"elu(0.5)"``. ``depthwise_activation`` may also be
            ``"prelu"``.
        slope: ``[1]``, the slope of prelu; None for other activations.

    Returns:
        ``[B, O, Ho, Wo]`` (or ``[O, Ho, Wo]``), in the memory format of ``input``;
        :math:`H_o = \lfloor (H + 2\,\text{padding} - \text{dilation}\,(kH - 1) - 1) / \text{stride} \rfloor + 1`.

    Raises:
        ValueError: an activation is not in the list, only one of ``"prelu"`` and ``slope`` is given, or ``padding`` is
            a string.
        TypeError: ``slope`` is a number.
        RuntimeError: shapes, dtypes or devices are not compatible. The message says what was expected.
    """
    if is_proxy(input, depthwise_weight, pointwise_weight):
        return record_call(depthwise_separable_conv2d, **locals())
    if (slope is not None) != (depthwise_activation == PRELU):
        given = "none" if slope is None else f"one with depthwise_activation={depthwise_activation!r}"
        raise ValueError(f"slope must be given with depthwise_activation={PRELU!r}, and only then, got {given}")
    if slope is None:
        _check_activation("depthwise_activation", depthwise_activation)
    elif not isinstance(slope, Tensor):
        raise TypeError(f"slope must be a tensor of shape [1], got {slope!r}")
    last = _check_activation("pointwise_activation", pointwise_activation)
    unbatched = input.dim() == 3
    arguments = Arguments(
        input.unsqueeze(0) if unbatched else input,
        depthwise_weight,
        pointwise_weight,
        depthwise_bias,
        pointwise_bias,
        slope,
        pair("stride", stride),
        pair("padding", padding),
        pair("dilation", dilation),
        depthwise_activation or IDENTITY,
    )
    out = _trained_eagerly(arguments) if _trains_eagerly(arguments) else _op(*arguments)
    out = out.squeeze(0) if unbatched else out
    # Not part of the operator: Inductor fuses what follows into the kernel's store, whatever it is.
    return last(out)


@dataclasses.dataclass(frozen=True)
class Activation:
    """A function of each element, with parameters or without.

    Attributes:
        function: of a tensor and the parameters.
        gradient: of its input, from the gradient of its result, the input, and the parameters.
        parameters: the parameters by name; defaults in the table. That of prelu is a tensor, which comes with a call.
    """

    function: Callable[..., Tensor]
    gradient: Callable[..., Tensor]
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameters.values())

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return self.gradient(grad, x, *self.parameters.values())


_aten = torch.ops.aten

IDENTITY = "identity"  # what the operator calls no activation
PRELU = "prelu"

SELU = 1.6732632423543772, 1.0507009873554805  # alpha and scale, see F.selu

# By the names that they have in torch. Of each there is a C++ type in lowering/cpp/activations.h, and a branch in
# lowering/triton/depthwise_separable_conv2d.py.
ACTIVATIONS = {
    IDENTITY: Activation(lambda x: x, lambda grad, x: grad),
    "relu": Activation(F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
    "relu6": Activation(F.relu6, lambda grad, x: _aten.hardtanh_backward(grad, x, 0, 6)),
    "leaky_relu": Activation(
        F.leaky_relu, lambda grad, x, slope: _aten.leaky_relu_backward(grad, x, slope, False), {"negative_slope": 0.01}
    ),
    PRELU: Activation(F.prelu, lambda grad, x, slope: torch.where(x > 0, grad, grad * slope)),
    "hardtanh": Activation(_aten.hardtanh, _aten.hardtanh_backward, {"min_val": -1.0, "max_val": 1.0}),
    "elu": Activation(F.elu, lambda grad, x, alpha: _aten.elu_backward(grad, alpha, 1, 1, False, x), {"alpha": 1.0}),
    "selu": Activation(F.selu, lambda grad, x: _aten.elu_backward(grad, *SELU, 1, False, x)),
    "celu": Activation(
        F.celu, lambda grad, x, alpha: _aten.elu_backward(grad, alpha, 1, 1 / alpha, False, x), {"alpha": 1.0}
    ),
    "softplus": Activation(F.softplus, _aten.softplus_backward, {"beta": 1.0, "threshold": 20.0}),
    "softsign": Activation(F.softsign, lambda grad, x: grad / (1 + x.abs()).square()),
    "hardsigmoid": Activation(F.hardsigmoid, _aten.hardsigmoid_backward),
    "hardswish": Activation(F.hardswish, _aten.hardswish_backward),
    "sigmoid": Activation(torch.sigmoid, lambda grad, x: _aten.sigmoid_backward(grad, x.sigmoid())),
    "tanh": Activation(torch.tanh, lambda grad, x: _aten.tanh_backward(grad, x.tanh())),
    "silu": Activation(F.silu, _aten.silu_backward),
    "mish": Activation(F.mish, _aten.mish_backward),
    "gelu": Activation(F.gelu, _aten.gelu_backward),
    "gelu_tanh": Activation(
        functools.partial(F.gelu, approximate="tanh"), functools.partial(_aten.gelu_backward, approximate="tanh")
    ),
}


def parse_activation(text: str) -> Activation | None:
    """The activation that is called ``"relu"``, or ``"leaky_relu(0.2)"``; None if there is none."""
    # Methods of strings, which Dynamo computes; it does not know regular expressions.
    name, parenthesis, rest = text.partition("(")
    activation = ACTIVATIONS.get(name)
    if activation is None or not parenthesis:
        return activation
    try:
        values = [float(number) for number in rest.removesuffix(")").split(",")]
    except ValueError:  # no number
        return None
    if not rest.endswith(")") or len(values) != len(activation.parameters):
        return None
    return dataclasses.replace(activation, parameters=dict(zip(activation.parameters, values)))


def format_activation(name: str, parameters: dict[str, float]) -> str:
    """What :func:`parse_activation` reads."""
    if parameters == ACTIVATIONS[name].parameters:
        return name
    return f"{name}({', '.join(repr(float(value)) for value in parameters.values())})"


def _known_activations(names: Iterable[str]) -> str:
    return ", ".join(f"{name}({', '.join(p)})" if (p := ACTIVATIONS[name].parameters) else name for name in names)


_OF_THE_OPERATOR = IDENTITY, PRELU  # which are not called by name alone


def _check_activation(argument: str, text: str | None) -> Activation:
    """The activation; raises ValueError if there is none of that name."""
    activation = None if text in _OF_THE_OPERATOR else parse_activation(IDENTITY if text is None else text)
    if activation is None:
        known = _known_activations(name for name in ACTIVATIONS if name not in _OF_THE_OPERATOR)
        raise ValueError(f"{argument} must be None or one of {known}, got {text!r}")
    return activation


@not_scriptable
class DepthwiseSeparableConv2d(nn.Module):
    """Depthwise-separable convolution with weights of its own.

    See :func:`depthwise_separable_conv2d`. Parameters are initialized as two :class:`torch.nn.Conv2d` do.

    Args:
        in_channels, out_channels: C and O.
        kernel_size, stride, padding, dilation: of the depthwise convolution.
        channel_multiplier: M, how many filters each input channel has.
        bias: whether both convolutions have one.
        depthwise_activation, pointwise_activation: what follows each convolution, as the function takes it.

    Raises:
        ValueError: an activation is not in the list, or ``padding`` is a string.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        channel_multiplier: int = 1,
        bias: bool = True,
        depthwise_activation: str | None = None,
        pointwise_activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_activation("depthwise_activation", depthwise_activation)
        _check_activation("pointwise_activation", pointwise_activation)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair("kernel_size", kernel_size)
        self.stride = pair("stride", stride)
        self.padding = pair("padding", padding)
        self.dilation = pair("dilation", dilation)
        self.channel_multiplier = channel_multiplier
        self.depthwise_activation = depthwise_activation
        self.pointwise_activation = pointwise_activation
        hidden = in_channels * channel_multiplier

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.depthwise_weight = parameter(hidden, 1, *self.kernel_size)
        self.depthwise_bias = parameter(hidden) if bias else None
        self.pointwise_weight = parameter(out_channels, hidden, 1, 1)
        self.pointwise_bias = parameter(out_channels) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight, bias in (
            (self.depthwise_weight, self.depthwise_bias),
            (self.pointwise_weight, self.pointwise_bias),
        ):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            if bias is not None:
                bound = 1 / math.sqrt(weight[0].numel())
                nn.init.uniform_(bias, -bound, bound)

    @classmethod
    def from_convolutions(
        cls,
        depthwise: nn.Conv2d,
        pointwise: nn.Conv2d,
        depthwise_norm: nn.BatchNorm2d | None = None,
        depthwise_activation: str | None = None,
        pointwise_norm: nn.BatchNorm2d | None = None,
        pointwise_activation: str | None = None,
    ) -> DepthwiseSeparableConv2d:
        """The module that computes ``depthwise``, its norm and activation, ``pointwise``, its norm and activation.

        Batch norms become part of weights and biases, with their running statistics: the module is what the layers are
        in eval mode. Weights are copies, so the layers are left as they are.

        Raises:
            ValueError: the layers are not a depthwise and a pointwise convolution that follow each other, pad with
                something else than zeros or differently on two sides, or a norm has no running statistics.
        """
        stride, padding, dilation = _check_depthwise(depthwise)
        _check_pointwise(pointwise, depthwise.out_channels)
        weights = [
            _fold(name, convolution, norm)
            for name, convolution, norm in (
                ("depthwise_norm", depthwise, depthwise_norm),
                ("pointwise_norm", pointwise, pointwise_norm),
            )
        ]
        (depthwise_weight, depthwise_bias), (pointwise_weight, pointwise_bias) = weights
        module = cls(
            depthwise.in_channels,
            pointwise.out_channels,
            depthwise.kernel_size,
            stride,
            padding,
            dilation,
            depthwise.out_channels // depthwise.in_channels,
            bias=False,
            depthwise_activation=depthwise_activation,
            pointwise_activation=pointwise_activation,
            device="meta",  # its own weights are not needed
        )
        module.depthwise_weight, module.depthwise_bias = depthwise_weight, depthwise_bias
        module.pointwise_weight, module.pointwise_bias = pointwise_weight, pointwise_bias
        return module.train(depthwise.training)

    def forward(self, input: Tensor) -> Tensor:
        """Call :func:`depthwise_separable_conv2d`, which describes the arguments."""
        return depthwise_separable_conv2d(
            input,
            self.depthwise_weight,
            self.pointwise_weight,
            self.depthwise_bias,
            self.pointwise_bias,
            self.stride,
            self.padding,
            self.dilation,
            self.depthwise_activation,
            self.pointwise_activation,
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults = {
            "padding": (0, 0),
            "dilation": (1, 1),
            "channel_multiplier": 1,
            "depthwise_activation": None,
            "pointwise_activation": None,
        }
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        for name in ("depthwise_bias", "pointwise_bias"):
            if getattr(self, name) is None:
                text += f", {name}=False"
        return text


def _check_depthwise(convolution: nn.Conv2d) -> tuple[Any, Any, Any]:
    """Raise ValueError unless it is a depthwise convolution; its stride, padding and dilation."""
    kernel, dilation, padding = convolution.kernel_size, convolution.dilation, convolution.padding
    if convolution.groups != convolution.in_channels:
        raise ValueError(
            f"depthwise must have as many groups as input channels, got {convolution.groups} groups and "
            f"{convolution.in_channels} channels"
        )
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
        if any(r % 2 for r in reach):
            raise ValueError(f"depthwise must pad both sides alike, got padding='same' with kernel_size={kernel}")
        padding = tuple(r // 2 for r in reach)
    elif padding == "valid":
        padding = (0, 0)
    if convolution.padding_mode != "zeros" and any(padding):
        raise ValueError(f"depthwise must pad with zeros, got padding_mode={convolution.padding_mode!r}")
    return convolution.stride, padding, dilation


def _check_pointwise(convolution: nn.Conv2d, channels: int) -> None:
    kernel, stride, padding = convolution.kernel_size, convolution.stride, convolution.padding
    padded = not isinstance(padding, str) and any(padding)  # "same" and "valid" are no padding of a 1 x 1 kernel
    if any(n != 1 for n in (*kernel, *stride, convolution.groups)) or padded:
        raise ValueError(
            "pointwise must be a 1 x 1 convolution without stride, padding and groups, got "
            f"kernel_size={kernel}, stride={stride}, padding={padding}, groups={convolution.groups}"
        )
    if convolution.in_channels != channels:
        raise ValueError(f"pointwise must take depthwise's {channels} channels, got {convolution.in_channels}")


def _fold(name: str, convolution: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Copies of weight and bias, with the batch norm in them."""
    weight, bias = convolution.weight, convolution.bias
    if norm is not None:
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(f"{name} must have running statistics")
        if norm.num_features != convolution.out_channels:
            raise ValueError(f"{name} must have {convolution.out_channels} features, got {norm.num_features}")
        weight, bias = fuse_conv_bn_weights(
            weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )

    def copied(parameter: Tensor) -> nn.Parameter:
        return nn.Parameter(parameter.detach().clone(), parameter.requires_grad)

    return copied(weight), None if bias is None else copied(bias)


class Arguments(NamedTuple):
    """What the operator takes, in its order."""

    input: Tensor
    depthwise_weight: Tensor
    pointwise_weight: Tensor
    depthwise_bias: Tensor | None
    pointwise_bias: Tensor | None
    slope: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    activation: str

    @property
    def function(self) -> Activation:
        activation = parse_activation(self.activation)
        assert activation is not None  # which was checked
        return activation if self.slope is None else dataclasses.replace(activation, parameters={"slope": self.slope})

    def gradient_of_slope(self, grad: Tensor, x: Tensor) -> Tensor:
        """``[1]``, from the gradient of the activation's result, and its input."""
        return torch.where(x > 0, 0, grad * x).sum().reshape(1)

    @property
    def channels(self) -> int:
        return int(self.input.shape[1])

    @property
    def hidden_channels(self) -> int:
        """C * M, the channels between the two convolutions."""
        return int(self.depthwise_weight.shape[0])

    @property
    def multiplier(self) -> int:
        return self.hidden_channels // self.channels

    @property
    def out_channels(self) -> int:
        return int(self.pointwise_weight.shape[0])

    @property
    def kernel(self) -> tuple[int, int]:
        return int(self.depthwise_weight.shape[2]), int(self.depthwise_weight.shape[3])


def check_arguments(arguments: Arguments, op: str = "depthwise_separable_conv2d") -> tuple[int, int]:
    """Raise RuntimeError, by the name of ``op``, unless the arguments are compatible; return the output's height and
    width."""
    input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, slope, *geometry, activation = arguments
    require = functools.partial(check, op)

    require(
        input.dim() == 4,
        f"input must have 4 dimensions, or 3 without a batch, got shape {tuple(input.shape)}",
    )
    weights = {"depthwise_weight": depthwise_weight, "pointwise_weight": pointwise_weight}
    biases = {"depthwise_bias": depthwise_bias, "pointwise_bias": pointwise_bias}
    for name, weight in weights.items():
        require(weight.dim() == 4, f"{name} must have 4 dimensions, got shape {tuple(weight.shape)}")
        require(weight.numel() > 0, f"{name} must not be empty, got shape {tuple(weight.shape)}")
    check_dtypes(op, input, {**weights, **biases, "slope": slope})
    stride, padding, dilation = geometry
    check_geometry(op, stride, padding, dilation)
    require(
        parse_activation(activation) is not None,
        f"activation must be one of {_known_activations(ACTIVATIONS)}, got {activation!r}",
    )
    wanted = "have shape (1,)" if activation == PRELU else f"be None with activation {activation!r}"
    shape = None if slope is None else tuple(slope.shape)
    require(shape == ((1,) if activation == PRELU else None), f"slope must {wanted}, got {shape}")

    # int() makes a symbolic size a constant: channels are what the operator is.
    channels, hidden, kernel = int(input.shape[1]), arguments.hidden_channels, arguments.kernel
    require(
        int(depthwise_weight.shape[1]) == 1,
        f"depthwise_weight must have shape [C * M, 1, kH, kW], got {tuple(depthwise_weight.shape)}",
    )
    require(
        channels > 0 and hidden % channels == 0,
        f"depthwise_weight.shape[0] must be a multiple of input's {channels} channels, got {hidden}",
    )
    require(
        tuple(pointwise_weight.shape[1:]) == (hidden, 1, 1),
        f"pointwise_weight must have shape [O, {hidden}, 1, 1], got {tuple(pointwise_weight.shape)}",
    )
    for (name, bias), length in zip(biases.items(), (hidden, arguments.out_channels)):
        require(
            bias is None or tuple(bias.shape) == (length,),
            f"{name} must have shape ({length},), got {None if bias is None else tuple(bias.shape)}",
        )
    return check_size(op, input, kernel, stride, padding, dilation)


def _fake(*args: Any) -> Tensor:
    arguments = Arguments(*args)
    return empty_output(arguments.input, arguments.out_channels, check_arguments(arguments))


def _accumulated(arguments: Arguments) -> Arguments:
    """The arguments in the dtype that is computed in."""
    dtype = accumulate_dtype(arguments.input.dtype)
    values: list[Any] = [value.to(dtype) if isinstance(value, Tensor) else value for value in arguments]
    return Arguments(*values)


def _depthwise(a: Arguments) -> Tensor:
    """The depthwise convolution alone. [B, C * M, Ho, Wo]"""
    return F.conv2d(a.input, a.depthwise_weight, a.depthwise_bias, a.stride, a.padding, a.dilation, groups=a.channels)


def _convolutions(a: Arguments) -> Tensor:
    hidden = a.function(_depthwise(a))  # [B, C * M, Ho, Wo]
    return F.conv2d(hidden, a.pointwise_weight, a.pointwise_bias)  # [B, O, Ho, Wo]


def _decomposition(*args: Any) -> Tensor:
    arguments = Arguments(*args)
    check_arguments(arguments)
    input = arguments.input
    out = _convolutions(_accumulated(arguments))
    return out.to(input.dtype).contiguous(memory_format=suggest_memory_format(input))


def _trains_eagerly(arguments: Arguments) -> bool:
    """Whether gradients are wanted of a call that is not compiled, and that is computed in its own precision."""
    input = arguments.input
    if torch.compiler.is_compiling() or input.dtype != accumulate_dtype(input.dtype):
        return False
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments)
    return wanted and not autocast


def _trained_eagerly(arguments: Arguments) -> Tensor:
    """The operator without its own gradient.

    That one computes the depthwise convolution again, and saves nothing of it. Compiled, it gains by it: what is not
    stored need not be read. In eager mode each step is a pass over memory, and autograd of the two convolutions, which
    keeps their results, is faster by up to a half.
    """
    check_arguments(arguments)
    record_path("depthwise_separable_conv2d", "eager", "the call was not compiled; two convolutions ran, for gradients")
    return _convolutions(arguments).contiguous(memory_format=suggest_memory_format(arguments.input))


def _check_backward(op: str, grad: Tensor, **arguments: Any) -> None:
    call = Arguments(**arguments)
    check_gradient(op, grad, call.input, (call.input.shape[0], call.out_channels, *check_arguments(call)))


class DepthwiseGradients(NamedTuple):
    """What the depthwise half of the operator contributes to the gradients; or, of each, whether it is wanted.

    Attributes:
        input, weight, bias: gradients; None if not wanted.
        slope: that of prelu, ``[1]``.
        hidden: ``[P, C * M]`` with P = B * Ho * Wo, what the pointwise convolution takes; None if not wanted.
    """

    input: Any
    weight: Any
    bias: Any
    slope: Any
    hidden: Any


def gradients(
    grad: Tensor, *args: Any, wanted: Sequence[bool], depthwise: Callable[..., DepthwiseGradients]
) -> list[Tensor | None]:
    """Gradients of input, the two weights, the two biases and the slope.

    The pointwise half of them are products of matrices, which take the gradient of the output in either memory format.

    Args:
        args, wanted: as the backward operator takes them.
        depthwise: computes the other half, from the arguments; the gradient ``[P, C * M]`` of what the pointwise
            convolution takes, None if only that itself is wanted; and which of the results are.
    """
    arguments = Arguments(*args)
    dtype = accumulate_dtype(arguments.input.dtype)
    results: list[Tensor | None] = [None] * 6
    of_input, of_weight, of_pointwise_weight, of_bias, of_pointwise_bias, of_slope = wanted
    if of_input or of_weight or of_pointwise_weight or of_bias or of_slope:
        rows = grad.to(dtype).transpose(0, 1).flatten(1)  # [O, P]
        grad_hidden = None
        if of_input or of_weight or of_bias or of_slope:
            grad_hidden = rows.t() @ arguments.pointwise_weight.flatten(1).to(dtype)
        wanted_half = DepthwiseGradients(of_input, of_weight, of_bias, of_slope, of_pointwise_weight)
        half = depthwise(arguments, grad_hidden, wanted_half)
        results[0], results[1], results[3], results[5] = half.input, half.weight, half.bias, half.slope
        results[2] = None if half.hidden is None else rows @ half.hidden
    if of_pointwise_bias:
        results[4] = grad.to(dtype).sum(3).sum((0, 2))  # of rows first: threads then read memory from front to back
    return results


def depthwise_gradients(
    arguments: Arguments, grad_hidden: Tensor | None, wanted: DepthwiseGradients
) -> DepthwiseGradients:
    """Compute them with aten operators, and the convolution once more.

    The convolution and its gradients are channels_last, whatever the input is: so torch computes them several times
    as fast.
    """
    a = _accumulated(arguments)
    a = a._replace(input=a.input.contiguous(memory_format=torch.channels_last))
    sums = _depthwise(a).contiguous(memory_format=torch.channels_last)  # [B, C * M, Ho, Wo]
    hidden = a.function(sums).permute(0, 2, 3, 1).flatten(0, 2) if wanted.hidden else None
    if grad_hidden is None:
        return DepthwiseGradients(None, None, None, None, hidden)
    batch, channels, height, width = sums.shape
    grad_hidden = grad_hidden.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    grad_sums = a.function.backward(grad_hidden, sums)
    grad_input, grad_weight, grad_bias = None, None, None
    if wanted.input or wanted.weight:
        grad_input, grad_weight, _ = _aten.convolution_backward(
            grad_sums.contiguous(memory_format=torch.channels_last),
            a.input,
            a.depthwise_weight,
            None,
            a.stride,
            a.padding,
            a.dilation,
            False,
            [0, 0],
            a.channels,
            [wanted.input, wanted.weight, False],
        )
    if wanted.bias:
        grad_bias = grad_sums.sum((0, 2, 3))
    grad_slope = a.gradient_of_slope(grad_hidden, sums) if wanted.slope else None
    return DepthwiseGradients(
        grad_input if wanted.input else None, grad_weight if wanted.weight else None, grad_bias, grad_slope, hidden
    )


_op = define_op(
    "depthwise_separable_conv2d(Tensor input, Tensor depthwise_weight, Tensor pointwise_weight, "
    "Tensor? depthwise_bias, Tensor? pointwise_bias, Tensor? slope, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] dilation, str activation) -> Tensor",
    decomposition=_decomposition,
    fake=_fake,
    gradient=Gradient(
        functools.partial(gradients, depthwise=depthwise_gradients),
        of="input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, slope",
        check=_check_backward,
    ),
    autocast="lower",  # it takes the place of two convolutions, which autocast runs in the lower precision
    fold=as_one_batch("input"),
)
