"""What the tests of convolutions have in common: what a sample of a call is, and what is asked of every such operator.

What an operator is called with stands in its own module of this folder.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from inductor_vision.tests.support.arguments import Wrong
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.layouts import strides_of
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.utils import _pair

Pair = int | tuple[int, int]
Function = Callable[..., Tensor]

LOW_DTYPES = (torch.bfloat16, torch.float16)


# Samples


def out_size(case: Any) -> tuple[int, int]:
    """Height and width of the result of a case."""
    height, width = (
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(
            case.size, case.kernel, _pair(case.stride), _pair(case.padding), _pair(case.dilation)
        )
    )
    return height, width


@dataclasses.dataclass(frozen=True)
class Sample:
    """One call: ``function(*args, **kwargs)``.

    Attributes:
        names: of all tensors, in the order of their gradients; ``args`` are the first of them.
        name: of the case, if it has one.
        case: what the call looks like, of the operator's own class.
    """

    names: ClassVar[tuple[str, ...]]

    name: str
    case: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def positional(self) -> tuple[Any, ...]:
        """The arguments in the order of the operator's schema."""
        raise NotImplementedError

    @property
    def geometry(self) -> list[list[int]]:
        """Stride, padding and dilation, as an operator's schema wants them."""
        return [list(_pair(self.kwargs[name])) for name in ("stride", "padding", "dilation")]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that the call has."""
        named = {**self.kwargs, **dict(zip(self.names, self.args))}
        return {name: named[name] for name in self.names if named[name] is not None}

    @property
    def wanted(self) -> list[bool]:
        """Which tensors have a gradient, in the form that the operator of the gradients takes."""
        return [name in self.tensors for name in self.names]

    def replace(self, **tensors: Tensor) -> Sample:
        """This call on other tensors."""
        args = tuple(tensors.get(name, tensor) for name, tensor in zip(self.names, self.args))
        kwargs = {name: tensors.get(name, value) for name, value in self.kwargs.items()}
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    def to(self, dtype: torch.dtype) -> Sample:
        """This call in another dtype, rounded to it; strides are kept."""
        return self.replace(**{name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    def requiring_grad(self, *names: str) -> Sample:
        """This call on leaves; the named ones, or all, require a gradient."""
        wanted = names or tuple(self.tensors)
        return self.replace(
            **{name: tensor.detach().requires_grad_(name in wanted) for name, tensor in self.tensors.items()}
        )


def generator_of(case: Any) -> torch.Generator:
    """Random numbers that depend on the case alone."""
    return torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))


def normal_of(case: Any, dtype: torch.dtype) -> Callable[..., Tensor]:
    """What makes tensors of such numbers, one of the shape of each of its calls."""
    generator = generator_of(case)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def numbers(tensor: Tensor) -> np.ndarray:
    """Its values in float64, for oracles."""
    return tensor.detach().double().numpy()


def arrange_weight(weight: Tensor, layout: str) -> Tensor:
    """A weight in memory: ``"contiguous"``, ``"permuted"``, or ``"shared"``: its first filter, expanded to all."""
    if layout == "shared":
        return weight[:1].expand(weight.shape)
    return weight.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) if layout == "permuted" else weight


def gradient_like(out: Tensor) -> Tensor:
    """A random gradient of a result, always the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)


# Values and gradients


def call(function: Function, s: Sample) -> Tensor:
    return function(*s.args, **s.kwargs)


def gradients_of(out: Tensor, s: Sample, grad: Tensor | None = None) -> dict[str, Tensor]:
    """The gradient of each tensor of a call, by a gradient of its result, or by that of :func:`gradient_like`."""
    grad = gradient_like(out) if grad is None else grad
    return dict(zip(s.tensors, torch.autograd.grad(out, list(s.tensors.values()), grad, retain_graph=True)))


def gradients(function: Function, s: Sample) -> dict[str, Tensor]:
    s = s.requiring_grad()
    return gradients_of(call(function, s), s)


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], dtype, f"gradient of {name}")


def assert_same_in(
    dtypes: Iterable[torch.dtype], function: Function, sample: Callable[..., Sample], with_gradients: bool = True
) -> None:
    """``sample(dtype)`` gives the values and gradients that the same numbers give in float64."""
    for dtype in dtypes:
        s = sample(dtype)
        exact = s.to(torch.float64)
        if with_gradients:
            s, exact = s.requiring_grad(), exact.requiring_grad()
        out, expected = call(function, s), call(function, exact)
        assert out.dtype == dtype
        assert_close(out, expected, dtype, f"result in {dtype}")
        if with_gradients:
            actual = gradients_of(out, s)
            assert {gradient.dtype for gradient in actual.values()} == {dtype}
            assert_same_gradients(actual, gradients_of(expected, exact), dtype)


def assert_gradcheck(function: Function, s: Sample, weight: str = "weight", **options: Any) -> None:
    """torch's numerical check, of float64 tensors. ``weight`` is the name of the tensor that may be shared."""
    s = s.requiring_grad()
    tensors, shape = s.tensors, s.tensors[weight].shape
    if s.case.weight_layout == "shared":  # gradcheck wants each input to have memory of its own
        tensors[weight] = tensors[weight][:1].detach().requires_grad_()

    def of_tensors(*values: Tensor) -> Tensor:
        named = dict(zip(tensors, values))
        named[weight] = named[weight].expand(shape)
        return call(function, s.replace(**named))

    assert torch.autograd.gradcheck(of_tensors, tuple(tensors.values()), **options)


def assert_each_gradient_alone(function: Function, s: Sample) -> None:
    """Where one tensor requires a gradient it gets the same one, and the others get none."""
    expected = gradients(function, s)
    for wanted in s.tensors:
        alone = s.requiring_grad(wanted)
        out = call(function, alone)
        out.backward(gradient_like(out))
        assert [name for name, tensor in alone.tensors.items() if tensor.grad is not None] == [wanted]
        assert_close(alone.tensors[wanted].grad, expected[wanted], torch.float64, f"gradient of {wanted} alone")


def assert_same_gradients_by(arrange: Callable[[Tensor], Tensor], function: Function, s: Sample) -> None:
    """The gradient of the result may lie in memory otherwise."""
    s = s.requiring_grad()
    out = call(function, s)
    strided = arrange(gradient_like(out))
    assert strided.stride() != out.stride()
    assert_same_gradients(gradients_of(out, s, strided), gradients_of(out, s), torch.float64)


def assert_no_double_backward(function: Function, s: Sample, op: str = "") -> None:
    s = s.requiring_grad()
    (gradient,) = torch.autograd.grad(call(function, s).square().sum(), s.args[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op or function.__name__}: double backward is not supported"):
        gradient.sum().backward()


# What PyTorch asks of an operator


def opcheck(op: OpOverload, op_backward: OpOverload, s: Sample) -> None:
    """What is quick to check, of the gradients too: all of them, that of the input, none."""
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, s.positional, test_utils=quick)
    grad = gradient_like(op(*s.positional))
    none = [False] * len(s.names)
    for wanted in (s.wanted, [True, *none[1:]], none):
        torch.library.opcheck(op_backward, (grad, *s.positional, wanted), test_utils=quick)


def opcheck_with_dynamic_shapes(op: OpOverload, s: Sample) -> None:
    """A graph of the call and of its gradients, for few samples: it takes its time."""
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    checks = ("test_autograd_registration", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, s.requiring_grad().positional, test_utils=checks)


def _described(results: Sequence[Tensor]) -> list[tuple]:
    return [(t.shape, strides_of(t), t.dtype, t.device) for t in results]


def assert_fake_results_are_like_real_ones(op: OpOverload, op_backward: OpOverload, s: Sample) -> None:
    """Shapes, strides, dtypes and devices of an operator's result and of its gradients."""
    out = op(*s.positional)
    results = [out, *op_backward(gradient_like(out), *s.positional, s.wanted)]
    with FakeTensorMode() as mode:
        fake = s.replace(**{name: mode.from_tensor(tensor) for name, tensor in s.tensors.items()})
        fake_out = op(*fake.positional)
        fake_results = [fake_out, *op_backward(torch.empty_like(fake_out), *fake.positional, fake.wanted)]
    assert _described(fake_results) == _described(results)


def assert_memory_format_follows(layout: str, out: Tensor) -> None:
    """A result is channels_last where its input of this layout is, and contiguous elsewhere."""
    channels_last = layout in ("channels_last", "sliced_channels_last")
    assert out.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert out.is_contiguous() != channels_last


def assert_stride_may_change(function: Function, s: Sample) -> None:
    """From call to call, in one graph that was compiled for any."""

    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def strided(stride: int, *tensors: Tensor) -> Tensor:
        return function(*tensors, **{**s.kwargs, "stride": stride})

    strided(2, *s.args)
    with torch.compiler.set_stance("fail_on_recompile"):
        for stride in (3, 4):
            assert torch.equal(strided(stride, *s.args), function(*s.args, **{**s.kwargs, "stride": stride}))


# Autocast


def assert_autocast_lowers(low: torch.dtype, function: Function, replaced: Function, s: Sample) -> None:
    """As the convolution does whose place it takes: whatever comes, low precision goes."""
    expected = call(function, s.to(low))
    for dtype in (torch.float32, *LOW_DTYPES):
        with torch.autocast("cpu", low):
            out = call(function, s.replace(input=s.args[0].to(dtype)))
            assert call(replaced, s).dtype == low
        assert out.dtype == low
        if dtype == torch.float32:
            assert torch.equal(out, expected)


def assert_gradients_under_autocast(function: Function, s: Sample, expected: dict[str, Tensor]) -> None:
    """Those of float32 tensors are in float32, and as near to ``expected`` as bfloat16 is."""
    s = s.requiring_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = call(function, s)
    actual = gradients_of(out, s)
    assert {gradient.dtype for gradient in actual.values()} == {torch.float32}
    assert_same_gradients(actual, expected, torch.bfloat16)


def assert_autocast_leaves_float64(function: Function, s: Sample) -> None:
    expected = call(function, s)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(function, s), expected)


# Wrong arguments

WRONG_GEOMETRY: dict[str, Wrong] = {
    "stride_0": ({"stride": 0}, "stride must be at least 1, got (0, 0)"),
    "one_stride_negative": ({"stride": (1, -1)}, "stride must be at least 1, got (1, -1)"),
    "stride_of_three": ({"stride": (1, 1, 1)}, "stride must be a number or a pair, got (1, 1, 1)"),
    "padding_negative": ({"padding": (1, -1)}, "padding must be at least 0, got (1, -1)"),
    "padding_of_one": ({"padding": (1,)}, "padding must be a number or a pair, got (1,)"),
    "dilation_0": ({"dilation": (0, 1)}, "dilation must be at least 1, got (0, 1)"),
}

# What takes the place of a weight [6, 4, 3, 3] and its bias, in a convolution of 8 channels.
WRONG_WEIGHTS: dict[str, Wrong] = {
    "weight_rank": ({"weight": torch.zeros(6, 4, 3)}, "weight must have 4 dimensions, got shape (6, 4, 3)"),
    "weight_empty": ({"weight": torch.zeros(6, 4, 0, 3)}, "weight must not be empty, got shape (6, 4, 0, 3)"),
    "no_outputs": (
        {"weight": torch.zeros(0, 4, 3, 3), "bias": torch.zeros(0)},
        "weight must not be empty, got shape (0, 4, 3, 3)",
    ),
    "out_channels": (
        {"weight": torch.zeros(5, 4, 3, 3)},
        "weight.shape[0] must be divisible by groups = 8 // 4 = 2, got 5",
    ),
    "bias_rank": ({"bias": torch.zeros(6, 1)}, "bias must have shape (6,), got (6, 1)"),
    "bias_shape": ({"bias": torch.zeros(5)}, "bias must have shape (6,), got (5,)"),
}


# Modules

MODULES: dict[str, dict[str, Any]] = {
    "plain": {"in_channels": 8, "out_channels": 6, "kernel_size": 3},
    "everything": {
        "in_channels": 8, "out_channels": 6, "kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0),
        "dilation": (1, 2), "groups": 2, "bias": False,
    },
    "some": {"in_channels": 8, "out_channels": 8, "kernel_size": 1, "stride": 2, "padding": 3, "groups": 8},
}  # fmt: skip


def modules_of_the_same_state(
    our_class: Callable[..., nn.Module], their_class: Callable[..., nn.Module], name: str
) -> tuple[nn.Module, nn.Module]:
    """One of ``MODULES`` of each class; they start with the same parameters, and load each other's."""
    torch.manual_seed(3)
    theirs = their_class(**MODULES[name])
    torch.manual_seed(3)
    ours = our_class(**MODULES[name])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name

    torch.manual_seed(4)
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs
