"""The gradient of an operator, declared once: what else PyTorch must be told of it follows from its schema.

A :class:`Gradient` names the arguments that have one, and what it is computed from. :class:`Backward` derives the
schema of the operator ``<name>_backward``, its fake kernel, and what autograd saves and calls.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def gradient_format(tensor: Tensor) -> torch.memory_format:
    """The memory format of a tensor's gradient: channels_last if it is so itself."""
    return suggest_memory_format(tensor) if tensor.dim() == 4 else torch.contiguous_format


def in_format_of(gradient: Tensor, tensor: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=gradient_format(tensor))


def traceable(**arguments: Any) -> str | None:
    """Why a decomposition cannot become part of a graph, where it always can."""
    return None


def _accept(op: str, **arguments: Any) -> None:
    """The check where there is nothing to check."""


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The gradient of an operator's first result; further results are integers, and have none.

    It is an operator too. For ``op(Tensor input, Tensor weight, Tensor? bias, int stride) -> Tensor`` it is::

        op_backward(Tensor grad, Tensor input, Tensor weight, Tensor? bias, int stride, bool[3] wanted)
            -> (Tensor, Tensor, Tensor)

    with an empty tensor for each gradient that is not wanted. Where a single argument has a gradient there is no
    ``wanted``, and one result. Where this is a list of tensors there is one call for each of them whose gradient is
    wanted; the last argument is ``int item``, which of them it is. Gradients of this operator are a clear error.

    Attributes:
        decomposition: an aten program that takes the arguments of ``op_backward`` in their order, ``wanted`` by name,
            and returns the gradients, none a view of an argument, in place of those that are not wanted anything. An
            argument that is None never wants one. Each is converted to its argument's dtype and, where there are
            several, reshaped to its shape.
        of: names of the arguments that have a gradient.
        takes: what autograd keeps, and ``op_backward`` takes after ``grad``: names of arguments and of results, and
            ``input.shape`` for the shape of an argument that is not kept, which becomes ``SymInt[] size``. None means
            all arguments, in their order.
        check: called with the name of the operator that is differentiated and, by name, the arguments of
            ``op_backward`` other than ``wanted`` and ``item``; raises RuntimeError unless they are compatible.
        untraceable: as for :func:`~inductor_vision.ops.registry.define_op`.
        arrange: called with a gradient and its argument, or ``grad`` where that is not kept; returns the gradient laid
            out in memory as it is to be.
    """

    decomposition: Callable[..., Any]
    of: str
    takes: str | None = None
    check: Callable[..., None] = _accept
    untraceable: Callable[..., str | None] = traceable
    arrange: Callable[[Tensor, Tensor], Tensor] = in_format_of


class Schema(NamedTuple):
    """An operator's schema: the types of its arguments by name, and the names of its results, empty if without."""

    name: str
    arguments: Mapping[str, str]
    results: Sequence[str]


def parse_schema(schema: str) -> Schema:
    """
    Raises:
        ValueError: it is not ``name(type name, ...) -> type`` or ``-> (type name, ...)``, without default values.
    """
    match = re.fullmatch(r"(\w+)\(([^()*=]+)\) -> \(?([^()]+)\)?", schema)
    if match is None:
        raise ValueError(f"not the schema of an operator without default values: {schema!r}")
    name, arguments, results = match.groups()
    typed = (argument.split(" ") for argument in arguments.split(", "))
    return Schema(
        name, {argument: kind for kind, argument in typed}, [result.partition(" ")[2] for result in results.split(", ")]
    )


def _value(entry: str, names: Sequence[str], results: Sequence[str]) -> Callable[[Sequence[Any], Sequence[Any]], Any]:
    """What the gradient takes by this name, from an operator's arguments and results."""
    name, _, shape = entry.partition(".")
    if name in results:
        return lambda args, values: values[results.index(name)]
    i = names.index(name)
    if not shape:
        return lambda args, values: args[i]
    return lambda args, values: args[i].shape if isinstance(args[i], Tensor) else [tensor.shape for tensor in args[i]]


class Backward:
    """What follows from an operator's schema and the declaration of its gradient.

    Attributes:
        of: names of the arguments that have a gradient.
        positions: where they are among the arguments.
        name, schema, arguments, decomposition, untraceable: of the backward operator.
    """

    def __init__(self, schema: Schema, gradient: Gradient) -> None:
        """
        Raises:
            ValueError: there is no argument, or result, of a name in the declaration, an argument that is to have a
                gradient is no tensor, or the gradient cannot know what shape it has.
        """
        names = list(schema.arguments)
        self._op, self._gradient = schema.name, gradient
        self.of = tuple(gradient.of.split(", "))
        takes = names if gradient.takes is None else gradient.takes.split(", ")
        known = (*names, *schema.results, *(f"{name}.shape" for name in names))
        for name in (*self.of, *takes):
            if name not in (names if name in self.of else known):
                raise ValueError(f"{schema.name}: nothing is called {name!r}; there are {', '.join(names)}")
        for name in self.of:
            kind = schema.arguments[name]
            if not kind.startswith("Tensor"):
                raise ValueError(f"{schema.name}: {name!r} is no tensor but {kind}: it has no gradient")
        self.positions = tuple(map(names.index, self.of))
        self._several = len(self.of) > 1
        self._of_list = schema.arguments[self.of[0]] == "Tensor[]"

        self._values = [_value(entry, names, schema.results) for entry in takes]
        types = {**dict.fromkeys(schema.results, "Tensor"), **schema.arguments}
        arguments = {"grad": "Tensor"}
        for entry in takes:
            name, kind = ("size", "SymInt[]") if entry.endswith(".shape") else (entry, types[entry])
            if name in arguments:
                raise ValueError(f"{schema.name}: the gradient is to take {name!r} twice")
            arguments[name] = kind
        self._names = list(arguments)
        # Where each tensor, or else the shape of the only one, is among the arguments.
        self._tensors = [self._names.index(name) if name in arguments else None for name in self.of]
        self._size = self._names.index("size") if f"{self.of[0]}.shape" in takes else None
        if (None in self._tensors or self._of_list) and (self._several or self._size is None):
            raise ValueError(f"{schema.name}: the gradient must take {gradient.of} or, if it is one, its shape")
        which = {"wanted": f"bool[{len(self.of)}]"} if self._several else {"item": "int"} if self._of_list else {}
        for name in which.keys() & arguments.keys():
            raise ValueError(f"{schema.name}: the gradient has an argument {name!r} of its own")
        arguments |= which
        self.name, self.arguments = f"{schema.name}_backward", tuple(arguments)
        self.decomposition, self.untraceable = self.completed(gradient.decomposition), gradient.untraceable
        results = ", ".join(["Tensor"] * len(self.of))
        declared = ", ".join(f"{kind} {name}" for name, kind in arguments.items())
        self.schema = f"{self.name}({declared}) -> {f'({results})' if self._several else results}"

    def wanted(self, *args: Any) -> list[bool]:
        """Which gradients a call of the backward operator is to make: those that are wanted of what is not None."""
        if not self._several:
            return [True]
        return [want and args[i] is not None for want, i in zip(args[-1], self._tensors) if i is not None]

    def _check(self, args: Sequence[Any]) -> None:
        self._gradient.check(self._op, **dict(zip(self._names, args)))

    def _likes(self, args: Sequence[Any]) -> list[tuple[Tensor, Sequence[Any]]]:
        """For each gradient, the tensor whose dtype and memory format it has, and its shape."""
        if self._size is not None:
            return [(args[0], args[self._size])]
        tensors = [args[i] for i in self._tensors if i is not None]
        return [(args[0], [0]) if tensor is None else (tensor, tensor.shape) for tensor in tensors]

    def fake(self, *args: Any) -> Any:
        """The fake kernel of the backward operator."""
        self._check(args)
        results = tuple(
            self._gradient.arrange(like.new_empty(shape), like) if want else args[0].new_empty(0)
            for (like, shape), want in zip(self._likes(args), self.wanted(*args))
        )
        return results if self._several else results[0]

    def completed(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """The backward operator, computed by a program like the declaration's decomposition: arguments are checked
        before, and results arranged after."""

        def gradients(*args: Any) -> Any:
            self._check(args)
            if not self._several:
                like, _ = self._likes(args)[0]
                gradient = program(*args)
                return self._gradient.arrange(gradient.to(like.dtype), like)
            wanted = self.wanted(*args)
            return tuple(
                self._gradient.arrange(gradient.reshape(shape).to(like.dtype), like) if want else args[0].new_empty(0)
                for gradient, want, (like, shape) in zip(program(*args[:-1], wanted=wanted), wanted, self._likes(args))
            )

        return gradients

    def save(self, ctx: Any, args: Sequence[Any], result: Any) -> None:
        """Keep for the gradient what it takes."""
        results = result if isinstance(result, tuple) else (result,)
        values = [value(args, results) for value in self._values]
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in values))
        ctx.others = [None if isinstance(value, Tensor) else value for value in values]

    def gradients(self, op: Callable[..., Any], ctx: Any, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Any]:
        """The gradient of each tensor that may have one, None if it is not wanted.

        Args:
            op: the backward operator.
            ctx: from :meth:`save`.
            wanted: of these tensors, and perhaps further ones.
        """
        taken = [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others)]
        if self._several:
            wanted = list(wanted[: len(self.of)])
            gradients = op(grad, *taken, wanted)
            return [gradient if want else None for gradient, want in zip(gradients, wanted)]
        if not self._of_list:
            return [op(grad, *taken) if wanted[0] else None]
        assert self._size is not None
        before, sizes, after = taken[: self._size - 1], taken[self._size - 1], taken[self._size :]
        return [
            op(grad, *before, size, *after, item) if want else None
            for item, (size, want) in enumerate(zip(sizes, wanted))
        ]
