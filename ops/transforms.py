"""What autograd and the transforms of :mod:`torch.func` make of an operator: its gradient, and batches of calls.

:func:`torch.library.register_autograd` registers a gradient that ``torch.func.grad`` and its like refuse, and that
forward-mode differentiation passes by, so that tangents are lost without a word. :func:`autograd_kernel` serves the
former, and refuses the latter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled, unpack_dual
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from .registry import VisionOp


def autograd_kernel(
    op: VisionOp,
    differentiable: Sequence[int],
    save: Callable[[Any, Sequence[Any], Any], None],
    gradients: Callable[[Any, Any, Sequence[bool]], Sequence[Any]],
) -> Callable[..., Any]:
    """What the dispatcher is to call under the key Autograd, with a key set, to give an operator its gradient.

    Args:
        differentiable: which arguments have one: tensors, None, or a list of tensors.
        save: takes a context, the arguments and the result, and keeps in the former what the gradient needs.
        gradients: from that context, the gradient of the first result, and which are wanted, the gradients of what is
            differentiable: one for each argument, or for each tensor of the list.
    """

    def forward(ctx: Any, keyset: torch._C.DispatchKeySet, args: Sequence[Any], *tensors: Tensor | None) -> Any:
        # The tensors are those among the arguments: here for autograd to see, the differentiable ones first.
        with torch._C._AutoDispatchBelowAutograd(), _differentiable_below():
            result = op.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        save(ctx, args, result)
        return result

    def backward(ctx: Any, grad: Any, *_: Any) -> tuple[Any, ...]:
        _, _, *needed = ctx.needs_input_grad
        results = gradients(ctx, grad, needed)
        return None, None, *results, *[None] * (len(needed) - len(results))

    function: Any = type(
        op.name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise RuntimeError(
                f"{op.name}: forward-mode differentiation (torch.func.jvp, jacfwd, hessian, dual tensors) is not "
                "supported; torch.func.vjp, grad and jacrev are"
            )
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            first = [tensor for i in differentiable for tensor in (args[i] if _is_list(args[i]) else [args[i]])]
            others = [arg for i, arg in enumerate(args) if isinstance(arg, Tensor) and i not in differentiable]
            # The dispatcher calls this for each level of torch.func by itself. Function.apply, which would go through
            # all of them, is left out.
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, function).apply(keyset, args, *first, *others)
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
    return isinstance(value, (list, tuple))


# Computes a batch of calls of an operator, or of its gradient, as one call. It takes the operator, how many calls there
# are, the arguments by name, and of each whether it differs from call to call: then calls are its first dimension, as
# they are of all results. It is NotImplemented where there is no such call.
Fold = Callable[["VisionOp", int, Mapping[str, Any], Mapping[str, bool]], Any]


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
        results = NotImplemented
        if fold is not None:
            results = fold(op, count, dict(zip(op.arguments, args)), dict(zip(op.arguments, differ)))
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


def as_one_batch(*images: str) -> Fold:
    """The fold of an operator that treats images by themselves: calls are further images. So it is of its gradients,
    unless images add up in one that is wanted.

    Args:
        images: the arguments that have images for their first dimension, as results have.
    """

    def fold(op: VisionOp, count: int, args: Mapping[str, Any], differ: Mapping[str, bool]) -> Any:
        of_images = {"grad", *images}
        wanted = args.get("wanted", [True] * len(op.gradient_of))
        adding_up = any(want and name not in images for name, want in zip(op.gradient_of, wanted))
        if adding_up or any(differs and name not in of_images for name, differs in differ.items()):
            return NotImplemented
        folded = {
            name: flattened(arg, differ[name], count) if name in of_images and arg is not None else arg
            for name, arg in args.items()
        }
        if op.gradient_of and "size" in args:
            folded["size"] = of_all_calls(args["size"], count)
        return tree_map(lambda result: unflattened(result, count), op(*folded.values()))

    return fold


def of_all_calls(size: Sequence[Any], count: int) -> list[Any]:
    """The shape of what has the images of all calls."""
    batch, *rest = size
    return [count * batch, *rest]


def flattened(value: Tensor, differs: bool, count: int) -> Tensor:
    """The first dimension for each call, one call after the other."""
    return (value if differs else value.expand(count, *value.shape)).flatten(0, 1)


def unflattened(value: Tensor, count: int) -> Tensor:
    return value.unflatten(0, (count, value.shape[0] // count))
