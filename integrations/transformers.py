"""Stock models of transformers, and of others that share their multi-scale deformable attention."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..lowering.installation import installer
from ..lowering.installation.hook import ImportHook
from ..lowering.workarounds.tracing import install_for_tracing
from ..ops.multiscale_deformable_attention import multiscale_deformable_attention
from .exchange import Library, in_compiled_code

# What the operator is called with.
_Call = tuple[Tensor, Any, Tensor, Tensor, Sequence[int] | None, str]


def _of_module(
    self: Any,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> _Call:
    return value, value_spatial_shapes_list, sampling_locations, attention_weights, None, "default"


def _of_function(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> _Call:
    return value, value_spatial_shapes, sampling_locations, attention_weights, None, "default"


def _of_function_v2(
    value: Tensor,
    value_spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> _Call:
    return value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method


def _of_rfdetr(
    value: Tensor,  # [B, H, D, S]
    value_spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    value_spatial_shapes_hw: Any = None,
) -> _Call:
    shapes = value_spatial_shapes if value_spatial_shapes_hw is None else value_spatial_shapes_hw
    # Points of all levels together, as they are where rf-detr exports.
    locations = sampling_locations if sampling_locations.dim() == 5 else sampling_locations.flatten(3, 4)
    return value.permute(0, 3, 1, 2), shapes, locations, attention_weights.flatten(3), None, "default"


def _check(cond: Any, msg: Any, error_type: type[Exception] = ValueError) -> None:
    """What transformers' function does, which breaks the graph for a tensor: many models check the shapes of levels."""
    if os.environ.get("TRANSFORMERS_DISABLE_TORCH_CHECK", "0") == "1":
        return
    if isinstance(cond, Tensor):
        # Its own message may have numbers of tensors in it, which are not known yet.
        torch._assert_async(cond.all(), "a check of transformers failed; the message is there in eager mode")
    else:
        torch._check(cond)


def _checked(replacement: Callable[..., Any], stock: Callable[..., Any], cond: Any, *args: Any, **kwargs: Any) -> Any:
    cond = cond() if callable(cond) else cond
    # On a GPU an assertion that fails ends all that the process does there.
    on_gpu = isinstance(cond, Tensor) and cond.device.type != "cpu"
    return (stock if on_gpu else replacement)(cond, *args, **kwargs)


def _choose_check(replacement: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    return in_compiled_code(functools.partial(_checked, replacement, stock), stock)


def _int(x: Any) -> Any:
    """transformers' ``torch_int``, which makes a constant of a size that is a symbol."""
    return torch.sym_int(x)


@dataclasses.dataclass(frozen=True)
class _Users:
    """Whose modules are looked through.

    Attributes:
        library: where they are from.
        packages: what the names of the modules begin with.
        functions: their functions, and methods of their classes, by name, and what has to do with each: what the
            operator is called with, from its arguments, or what takes its place.
        choose: from both, what runs.
    """

    library: Library
    packages: tuple[str, ...]
    functions: Mapping[str, Callable[..., Any]]
    choose: Callable[..., Callable[..., Any]]

    def have(self, module: str) -> bool:
        return module.startswith(self.packages)


_hook: ImportHook | None = None  # for modules that are imported after accelerate_transformers()
_eager = False


def accelerate_transformers(eager: bool | None = None) -> None:
    """Make models of transformers that have multi-scale deformable attention use this package's operator.

    These are Deformable DETR, Grounding DINO, Mask2Former, OneFormer, RT-DETR, RT-DETRv2, D-FINE, RF-DETR and all
    others in which transformers has the class ``MultiScaleDeformableAttention`` or a function
    ``multi_scale_deformable_attention`` or ``multi_scale_deformable_attention_v2``, whichever module they are in and
    whenever it is imported; models that exist already too. After this call ``torch.compile``, ``torch.export`` and
    AOTInductor compile :func:`inductor_vision.multiscale_deformable_attention` in their place. In what is compiled of
    any model of transformers, checks of tensors on the CPU that would break the graph become assertions in it, which
    raise when it runs, and sizes that are converted to integers stay symbols.

    Where the package ``kernels`` is installed, ``model.set_use_kernels(True)`` has a model on the CPU that has that
    class run the operator's kernel in eager mode too, as with ``eager``.

    The same holds for mmcv's ``multi_scale_deformable_attn_pytorch`` and rf-detr's ``ms_deform_attn_core_pytorch``
    where these packages are installed. Call it before compiling; calling it again does nothing, but may turn ``eager``
    on or off.

    A function that the installed version declares differently from the one that this package is tested with is left as
    it is, with a warning.

    Args:
        eager: whether models on the CPU that are not compiled run the operator's kernel, too; None: as it was, and at
            first False. The kernel is compiled when it is called first, which takes seconds, and again for another
            dtype or number of heads, channels, levels or points, for a batch of one, and for training; not for other
            images, batches or numbers of queries.

    Raises:
        ImportError: none of these packages is installed.
        TypeError: ``eager`` is neither a bool nor None.
    """
    global _hook, _eager
    if not (eager is None or isinstance(eager, bool)):
        raise TypeError(f"accelerate_transformers: eager must be True, False or None, got {eager!r}")
    if not any(importlib.util.find_spec(users.library.name) for users in _USERS):
        raise ImportError("transformers is not installed: pip install 'transformers>=5.20,<6'")
    if eager is not None:
        _eager = eager
    if _hook is not None:
        return
    _hook = ImportHook(lambda name: name == _HUB or any(users.have(name) for users in _USERS), _exchange_in)
    _hook.install()
    for name, module in list(sys.modules.items()):
        if _hook.waits_for(name):
            _exchange_in(module)
    install_for_tracing()
    installer.hide_long_sizes("accelerate_transformers")


def _exchange_in(module: ModuleType) -> None:
    """Exchange what a module defines of the functions that :data:`_USERS` lists."""
    if module.__name__ == _HUB:
        _register_for_hub(module)
    for users in _USERS:
        if not users.have(getattr(module, "__name__", "")):
            continue
        for function, replacement in users.functions.items():
            owner_name, _, name = function.rpartition(".")
            owner: Any = vars(module).get(owner_name) if owner_name else module
            defined = getattr(owner, "__dict__", {}).get(name)
            # What a module has imported from another is exchanged there.
            if defined is not None and getattr(defined, "__module__", None) == module.__name__:
                users.library.exchange(f"{module.__name__}.{function}", owner, replacement, users.choose)


def _choose(translate: Callable[..., _Call], stock: Callable[..., Any]) -> Callable[..., Any]:
    if torch.compiler.is_compiling():
        return in_compiled_code(functools.partial(_run, multiscale_deformable_attention, translate), stock)
    return functools.partial(_run_eagerly, translate, stock) if _eager else stock


def _run(operator: Callable[..., Tensor], translate: Callable[..., _Call], *args: Any, **kwargs: Any) -> Tensor:
    return operator(*translate(*args, **kwargs))


def _run_eagerly(translate: Callable[..., _Call], stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    value, shapes, locations, weights, num_points, method = translate(*args, **kwargs)
    # A tracer records what aten computes, and must not meet compiled code.
    if value.device.type != "cpu" or torch.jit.is_tracing():
        return stock(*args, **kwargs)
    if not isinstance(shapes, Tensor):  # as a tensor, whose numbers are read by the kernel, sizes compile once
        shapes = torch.tensor(shapes)
    return _compiled()(value, shapes, locations, weights, num_points, method)


_HUB = "transformers.integrations.hub_kernels"  # where transformers knows of the kernels hub


class _HubLayer(nn.Module):
    """What the hub's mapping has for the CPU: its ``forward`` becomes that of modules of transformers."""

    can_torch_compile = has_backward = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        stock: Any = type(self).forward
        shapes = value_spatial_shapes, value_spatial_shapes_list, level_start_index
        call = self, value, *shapes, sampling_locations, attention_weights, im2col_step
        # The class's own calls the operator where it is compiled.
        return stock(*call) if torch.compiler.is_compiling() else _run_eagerly(_of_module, stock, *call)


class _HubRepository:
    """Takes the place of a repository on the hub."""

    layer_name = "MultiScaleDeformableAttention"

    def load(self) -> type[nn.Module]:
        return _HubLayer

    def __str__(self) -> str:
        return f"inductor_vision (layer `{self.layer_name}`)"


def _register_for_hub(module: ModuleType) -> None:
    """It runs inside of an import of transformers, which must not fail for it."""
    try:
        if module.is_kernels_available():
            repository = _HubRepository()
            module.register_kernel_mapping({repository.layer_name: {"cpu": repository}})
    except Exception as error:  # whatever another version of transformers or kernels has there
        _TRANSFORMERS.is_as_tested(f"{module.__name__}.register_kernel_mapping", repr(error), "to take a mapping")


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """The operator, compiled for any batch, number of queries and sizes of levels."""

    def operator(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor, *others: Any) -> Tensor:
        tensors = [tensor.view_as(tensor) for tensor in (value, locations, weights)]  # whose marks are our own
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, (0, 1))
        value, locations, weights = tensors
        return compiled(value, shapes, locations, weights, *others)

    # Each model, dtype and mode of autograd compiles once; what comes after the limit would run the decomposition.
    compiled = torch.compile(multiscale_deformable_attention, isolate_recompiles=True, recompile_limit=64)  # type: ignore[call-overload]
    return operator


_TRANSFORMERS = Library("transformers", "5.20.0 and 5.24.0")

_USERS = (
    _Users(
        _TRANSFORMERS,
        ("transformers.models.",),
        {
            "MultiScaleDeformableAttention.forward": _of_module,
            "multi_scale_deformable_attention": _of_function,
            "multi_scale_deformable_attention_v2": _of_function_v2,
        },
        _choose,
    ),
    _Users(
        _TRANSFORMERS,
        ("transformers.utils.import_utils", "transformers.utils.generic"),
        {"torch_compilable_check": _check},
        _choose_check,
    ),
    _Users(
        _TRANSFORMERS,
        ("transformers.utils.import_utils", "transformers.utils.generic"),
        {"torch_int": _int},
        in_compiled_code,
    ),
    _Users(Library("mmcv", "2.2"), ("mmcv.ops.",), {"multi_scale_deformable_attn_pytorch": _of_function}, _choose),
    _Users(Library("rfdetr", "1.3"), ("rfdetr.",), {"ms_deform_attn_core_pytorch": _of_rfdetr}, _choose),
)
