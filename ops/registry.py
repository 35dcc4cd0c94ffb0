"""Defines custom operators, and knows which ones there are.

An operator of this package is, to PyTorch, a custom op in the namespace ``inductor_vision``:

* its *decomposition*, an aten program, is what eager mode runs on every device;
* its *fake kernel* says what comes out, and raises what eager mode would raise;
* :mod:`inductor_vision.lowering` may say how Inductor turns it into one fused kernel.

:func:`define_op` registers the first two, an autocast rule, what :mod:`torch.func` makes of it, and its gradient, which
is an operator of the same kind and follows from a declaration, see :class:`~.gradients.Gradient`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function
from torch.utils._pytree import tree_leaves

from ..paths import record_path
from . import transforms
from .gradients import Backward, Gradient, parse_schema, traceable

NAMESPACE = "inductor_vision"
_library = torch.library.Library(NAMESPACE, "DEF")


@dataclasses.dataclass(frozen=True)
class VisionOp:
    """One operator.

    Attributes:
        name: what it is called.
        family: stem of the files about it in ``lowering/``.
        arguments: their names.
        decomposition: what it means.
        gradient_of: the arguments of another operator that it makes the gradients of, if it is one's gradient.
    """

    name: str
    family: str
    arguments: tuple[str, ...]
    decomposition: Callable[..., Any]
    gradient_of: tuple[str, ...]
    _untraceable: Callable[..., str | None]

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    @property
    def backward(self) -> VisionOp:
        """The operator that is its gradient."""
        return OPS[f"{self.name}_backward"]

    def untraceable(self, *args: Any, **kwargs: Any) -> str | None:
        """Why the decomposition of a call cannot become part of a graph; None if it can."""
        return self._untraceable(**dict(zip(self.arguments, args)), **kwargs)

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)


OPS: dict[str, VisionOp] = {}

# What the gradients of operators are, by the operator that is differentiated.
GRADIENTS: dict[str, Backward] = {}

# torchvision's operator -> the same call in terms of this package's operators, see `serves_torchvision`.
TORCHVISION: dict[str, Callable[..., Any]] = {}

# "module.function" of torchvision's Python -> what takes its place in compiled code, see `replaces_torchvision`.
TORCHVISION_PYTHON: dict[str, Callable[..., Any]] = {}


@dataclasses.dataclass(frozen=True)
class Served:
    """What computes calls of one of aten's operators, see `serves_aten`.

    Attributes:
        op: this package's operator.
        arguments: from the arguments of aten's operator, those of ``op``.
    """

    op: VisionOp
    arguments: Callable[..., tuple[Any, ...]]


ATEN: dict[torch._ops.OpOverload, Served] = {}


def define_op(
    schema: str,
    *,
    family: str | None = None,
    decomposition: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: Gradient | None = None,
    autocast: bool | Literal["lower"] = True,
    untraceable: Callable[..., str | None] = traceable,
    fold: transforms.Fold | None = None,
) -> VisionOp:
    """Define ``inductor_vision::<schema>``, and ``inductor_vision::<name>_backward`` if it has a gradient.

    Args:
        schema: the operator's schema, without namespace. Its name is the stem of the files about it.
        family: stem of the files in ``lowering/``, where that is another because several operators share them.
        decomposition: aten program; runs eagerly and below autograd.
        fake: shapes, strides and dtypes of the result; raises what the decomposition would raise.
        gradient: how it is differentiated.
        autocast: whether autocast computes it in float32 and returns the first argument's dtype, as torchvision does;
            "lower": autocast computes it in the lower precision, as it does convolutions.
        untraceable: from the operator's arguments, by name, why the decomposition cannot become part of a graph; None
            if it can. Such a call, where no template takes it, runs in a compiled graph as it does eagerly.
        fold: how :func:`torch.vmap` computes a batch of calls, or of gradients, as one; without, it runs one after the
            other.

    Raises:
        ValueError: an operator of that name exists, or the declaration of the gradient does not fit the schema.
    """
    parsed = parse_schema(schema)
    if parsed.name in OPS:
        raise ValueError(f"operator {parsed.name!r} is defined twice; defined are: {', '.join(sorted(OPS))}")
    op = VisionOp(parsed.name, family or parsed.name, tuple(parsed.arguments), decomposition, (), untraceable)
    backward = None if gradient is None else Backward(parsed, gradient)
    _define(op, schema, fake, fold)
    if autocast:
        rule = _in_lower_precision if autocast == "lower" else _in_float32
        for device in ("CPU", "CUDA"):
            _library.impl(op.name, rule(op, device), f"Autocast{device}")
    if backward is not None:
        _define_gradient(op, backward, fold)
    return op


def _define(op: VisionOp, schema: str, fake: Callable[..., Any], fold: transforms.Fold | None) -> None:
    def eager(*args: Any) -> Any:
        record_path(op.name, "eager", "the call was not compiled; the aten decomposition ran")
        return op.decomposition(*args)

    qualified = f"{NAMESPACE}::{op.name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(op.name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_vmap(qualified, transforms.vmap_rule(op, fold), lib=_library)
    OPS[op.name] = op


def _define_gradient(op: VisionOp, backward: Backward, fold: transforms.Fold | None) -> None:
    op_backward = VisionOp(
        backward.name, op.family, backward.arguments, backward.decomposition, backward.of, backward.untraceable
    )
    _define(op_backward, backward.schema, backward.fake, fold)
    GRADIENTS[op.name] = backward

    gradients = functools.partial(backward.gradients, op_backward.overload)
    kernel = transforms.autograd_kernel(op, backward.positions, backward.save, gradients)
    _library.impl(op.name, kernel, "Autograd", with_keyset=True)

    def forbidden(*_: Any) -> Any:
        raise RuntimeError(f"{op.name}: double backward is not supported")

    kernel = transforms.autograd_kernel(op_backward, (), lambda ctx, args, result: None, forbidden)
    _library.impl(op_backward.name, kernel, "Autograd", with_keyset=True)


def _autocast_key(device: str) -> torch._C.DispatchKeySet:
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))


def _in_float32(op: VisionOp, device: str) -> Callable[..., Any]:
    key = _autocast_key(device)

    def cast(value: Any) -> Any:
        low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if low else value

    def autocast(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(*map(cast, args)).to(args[0].dtype)

    return autocast


def _in_lower_precision(op: VisionOp, device: str) -> Callable[..., Any]:
    key = _autocast_key(device)

    def cast(value: Any) -> Any:  # float64 stays what it is, as everywhere under autocast
        takes_part = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(torch.get_autocast_dtype(device.lower())) if takes_part else value

    def autocast(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(*map(cast, args))

    return autocast


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that operators compute in: float32 for the low precisions."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(op: str, condition: bool, message: str) -> None:
    """Raise a RuntimeError that names the operator, eagerly and while a graph is traced, unless the condition holds."""
    torch._check(condition, lambda: f"{op}: {message}")


def is_proxy(*args: Any) -> bool:
    """Whether arguments, or items of lists, are what :func:`torch.fx.symbolic_trace` passes: no shapes to decide by."""
    items = (item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    return any(isinstance(item, torch.fx.Proxy) for item in items)


def record_call(function: Callable[..., Any], **arguments: Any) -> Any:
    """Have :func:`torch.fx.symbolic_trace` record a call of a public function, whichever module makes it;
    :func:`torch.fx.wrap` sees only those of its own module."""
    return handle_torch_function(function, tree_leaves(arguments), **arguments)


_T = TypeVar("_T", bound=Callable[..., Any])


def not_scriptable(public: _T) -> _T:
    """Have :func:`torch.jit.script` of a public function or module, or of what calls it, say what to do instead."""

    def refuse(*self: Any) -> Any:
        raise RuntimeError(
            f"inductor_vision.{public.__name__}: torch.jit.script is not supported. Compile with torch.compile, or "
            "export with torch.export. A model that must be scripted too takes torchvision's operators, which "
            "inductor_vision.accelerate_torchvision() has torch.compile and torch.export replace with these"
        )

    # torch.jit.script calls it, if there is one, before it compiles anything.
    public.__prepare_scriptable__ = refuse  # type: ignore[attr-defined]  # of functions and classes alike
    return public


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """A number for each of height and width.

    Raises:
        ValueError: it is a word, as torch.nn.Conv2d takes for its padding.
    """
    if isinstance(value, str):
        raise ValueError(f"{name} must be a number, or one for each of height and width, got {value!r}")
    # Not torch.nn's _pair, which Dynamo refuses to trace for a number that may change from call to call.
    pair: Any = tuple(value) if isinstance(value, Iterable) else (value, value)
    return pair


def register_no_gradient(op: VisionOp) -> None:
    """Have the results of an operator be constants to autograd, and :mod:`torch.func` be told that they are."""
    _library.impl(op.name, transforms.no_gradient_kernel(op), "Autograd", with_keyset=True)


def serves_torchvision(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a function that computes ``torch.ops.torchvision.<name>``, argument for argument, with these operators.

    :func:`inductor_vision.accelerate_torchvision` puts it to use.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in TORCHVISION:
            raise ValueError(f"torchvision::{name} is served twice")
        TORCHVISION[name] = function
        return function

    return register


def replaces_torchvision(function: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a function that does what ``torchvision.<function>``, which is Python, does, argument for argument, and
    that compiles as one graph where the original does not.

    :func:`inductor_vision.accelerate_torchvision` puts it to use.
    """

    def register(replacement: Callable[..., Any]) -> Callable[..., Any]:
        if function in TORCHVISION_PYTHON:
            raise ValueError(f"torchvision.{function} is replaced twice")
        TORCHVISION_PYTHON[function] = replacement
        return replacement

    return register


def serves_aten(op: VisionOp, *overloads: torch._ops.OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare that an operator computes what these of aten's do: a function from their arguments to its own.

    :func:`inductor_vision.accelerate_sampling` puts it to use.
    """

    def register(arguments: Callable[..., Any]) -> Callable[..., Any]:
        for overload in overloads:
            if overload in ATEN:
                raise ValueError(f"{overload} is served twice")
            ATEN[overload] = Served(op, arguments)
        return arguments

    return register
