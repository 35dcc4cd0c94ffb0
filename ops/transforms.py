"""What autograd and the transforms of :mod:`torch.func` make of an operator: its gradient, and batches of calls.

:func:`torch.library.register_autograd` registers a gradient that ``torch.func.grad`` and its like refuse, and that
forward-mode differentiation passes by, so that tangents are lost without a word. :func:`autograd_kernel` takes the same
functions, serves the former, and refuses the latter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled, unpack_dual
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from .registry import VisionOp


def autograd_kernel(
    op: VisionOp, backward: Callable[..., Any], setup_context: Callable[..., None] | None
) -> Callable[..., Any]:
    """What the dispatcher is to call under the key Autograd, with a key set, to give an operator its gradient.

    Args:
        backward, setup_context: as :func:`torch.library.register_autograd` takes them.
    """

    def forward(ctx: Any, keyset: torch._C.DispatchKeySet, args: Sequence[Any], *tensors: Tensor) -> Any:
        # The tensors are those among the arguments: here for autograd to see.
        with torch._C._AutoDispatchBelowAutograd(), _differentiable_below():
            result = op.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        ctx.kinds = [len(arg) if _is_list(arg) else isinstance(arg, Tensor) for arg in args]
        if setup_context is not None:
            setup_context(ctx, args, result)
        return result

    def gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        ctx.needs_input_grad = _as_arguments(ctx.kinds, needed[2:])
        try:
            results = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needed
        results = results if isinstance(results, tuple) else (results,)
        return None, None, *_of_tensors(ctx.kinds, results)

    function: Any = type(
        op.name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(gradients)},
    )

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise RuntimeError(
                f"{op.name}: forward-mode differentiation (torch.func.jvp, jacfwd, hessian, dual tensors) is not "
                "supported; torch.func.vjp, grad and jacrev are"
            )
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            # The dispatcher calls this for each level of torch.func by itself. Function.apply, which would go through
            # all of them, is left out.
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, function).apply(keyset, args, *tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return op.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return autograd


def no_gradient_kernel(op: VisionOp) -> Callable[..., Any]:
    """What the dispatcher is to call under the key Autograd for an operator without a gradient.

    To autograd its results are constants. :mod:`torch.func` would take them for that without a word, and answer zero.
    """

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        transformed = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()
        if any(unpack_dual(tensor).tangent is not None or (transformed and tensor.requires_grad) for tensor in tensors):
            raise RuntimeError(f"{op.name}: there is no gradient; call detach() on what it is given")
        with torch._C._AutoDispatchBelowAutograd():
            return op.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return autograd


@contextlib.contextmanager
def _differentiable_below() -> Iterator[None]:
    """The levels of torch.func below this one are not to be without gradients because this one computes its own."""
    if not torch._C._are_functorch_transforms_active():
        yield
        return
    with torch.enable_grad(), _set_fwd_grad_enabled(True):
        yield


def _is_list(value: Any) -> bool:
    """Whether it is a list of tensors."""
    return isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value)


def _as_arguments(kinds: Sequence[int | bool], flags: Sequence[bool]) -> tuple[Any, ...]:
    """One for each argument, from one for each tensor; a kind is whether an argument is a tensor, or how many."""
    left = iter(flags)
    return tuple(kind and next(left) if isinstance(kind, bool) else [next(left) for _ in range(kind)] for kind in kinds)


def _of_tensors(kinds: Sequence[int | bool], values: Sequence[Any]) -> Iterator[Any]:
    """One for each tensor, from one for each argument; of a list that is None, each is."""
    for kind, value in zip(kinds, values, strict=True):
        if not isinstance(kind, bool):
            yield from [None] * kind if value is None else value
        elif kind:
            yield value


# Computes a batch of an operator's calls as one call. It takes the operator, how many calls there are, the arguments,
# and of each whether it differs from call to call: then calls are its first dimension, as they are of all results. It
# is NotImplemented where there is no such call.
Fold = Callable[["VisionOp", int, Sequence[Any], Sequence[bool]], Any]


def vmap_rule(op: VisionOp, fold: Fold | None) -> Callable[..., Any]:
    """What :func:`torch.library.register_vmap` takes: calls of an operator, computed as one or one after the other."""

    def batched(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        count = info.batch_size
        if count == 0:
            raise RuntimeError(f"{op.name}: torch.vmap over a dimension of size 0 is not supported")
        differ = [any(dim is not None for dim in tree_leaves(dims)) for dims in in_dims]
        args = tuple(
            tree_map(lambda value, dim: _by_call(value, dim, count), arg, dims) if differs else arg
            for arg, dims, differs in zip(args, in_dims, differ, strict=True)
        )
        results = NotImplemented if fold is None else fold(op, count, args, differ)
        if results is NotImplemented:
            results = _one_after_the_other(op, count, args, differ)
        return results, tree_map(lambda _: 0, results)

    return batched


def _by_call(value: Tensor, dim: int | None, count: int) -> Tensor:
    return value.expand(count, *value.shape) if dim is None else value.movedim(dim, 0)


def _one_after_the_other(op: VisionOp, count: int, args: Sequence[Any], differ: Sequence[bool]) -> Any:
    calls = zip(*(_calls(arg, count) if differs else [arg] * count for arg, differs in zip(args, differ)))
    return tree_map(lambda *values: torch.stack(values), *(op(*call) for call in calls))


def _calls(arg: Tensor | Sequence[Tensor], count: int) -> list[Any]:
    """The argument of each call."""
    return list(arg) if isinstance(arg, Tensor) else [[value[i] for value in arg] for i in range(count)]


def as_one_batch(*images: int, unless: Callable[..., bool] = lambda *args: False) -> Fold:
    """The fold of an operator that treats images by themselves: calls are further images.

    Args:
        images: which arguments have images for their first dimension, as results have.
        unless: from the operator's arguments, whether there is a result that images add up in.
    """

    def fold(op: VisionOp, count: int, args: Sequence[Any], differ: Sequence[bool]) -> Any:
        if unless(*args) or any(differs and i not in images for i, differs in enumerate(differ)):
            return NotImplemented
        results = op(
            *(
                flattened(arg, differs, count) if i in images and arg is not None else arg
                for i, (arg, differs) in enumerate(zip(args, differ))
            )
        )
        return tree_map(lambda result: unflattened(result, count), results)

    return fold


def flattened(value: Tensor, differs: bool, count: int) -> Tensor:
    """The first dimension for each call, one call after the other."""
    return (value if differs else value.expand(count, *value.shape)).flatten(0, 1)


def unflattened(value: Tensor, count: int) -> Tensor:
    return value.unflatten(0, (count, value.shape[0] // count))
