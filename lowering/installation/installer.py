"""Enters the operators, what is worked around and the passes into Inductor's tables: all of it, or nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.compiler.config

from ...ops.registry import ATEN, OPS, TORCHVISION
from ...paths import logger
from ..common import registry
from ..common.cache_key import TAG, backend_passes, tag_caches
from ..workarounds import adaptive_pooling, data_dependent_convolutions, data_dependent_views, device_assertions
from .hook import INDUCTOR_LOWERING, when_inductor_is_imported

_not_installed: str | None = None


def why_not_installed() -> str | None:
    """Why Inductor could not be told about the operators; None if it was, or has not been imported yet.

    It then takes them for anybody's custom operators: a compiled graph calls them, and their decompositions run as they
    do eagerly.
    """
    return _not_installed


def require_lowerings(caller: str) -> None:
    """Raise RuntimeError if compiled code cannot have this package's kernels, which ``caller`` is nothing without."""
    broken = registry.why_broken("inductor.codegen")  # which has the operators installed, if that was not done before
    broken = why_not_installed() or broken
    if broken:
        raise RuntimeError(f"{caller}: the kernels of inductor_vision cannot be compiled: {broken}")


def install() -> None:
    """Enter every operator into Inductor's tables. Runs once, when Inductor's own lowerings are defined.

    That is inside of an import that every compilation makes, of models too that have none of these operators.
    Therefore nothing is raised: where Inductor's private parts are not as expected they are left as they were, and a
    warning says why.
    """
    global _not_installed
    _not_installed = _enter(
        *(_register_operators, _serve_torchvision, _serve_aten, _hide_long_sizes),
        *(_add_fusion_pass, _add_folding_pass, _add_convolution_pass),
    )
    if _not_installed is not None:
        logger.warning(
            "inductor_vision's operators have no kernels, and run in compiled graphs as they do eagerly: %s",
            _not_installed,
        )


def install_when_inductor_is_imported() -> None:
    """Have :func:`install` run right after Inductor's lowerings are defined: now, if they are."""
    when_inductor_is_imported(install)


def _enter(*steps: Callable[[], None]) -> str | None:
    """Take steps that change Inductor's tables: all of them, or none if one fails, and why."""
    try:
        with _all_or_nothing():
            for step in steps:
                step()
    except Exception as error:  # a newer torch may lack anything, and a user's process must survive that
        return registry.reason(error)
    return None


@contextlib.contextmanager
def _all_or_nothing() -> Iterator[None]:
    """What is changed of Inductor's within this context is as it was if the context is left with an exception."""
    from ..inductor.tables import (
        config,
        decompositions,
        fallbacks,
        fast_random_decomps,
        ir,
        lowerings,
        needs_realized_inputs,
        sizevars,
    )
    from ..workarounds.long_sizes import NAMES

    kernels = (overload.py_kernels for overload in ATEN)
    changed = decompositions, lowerings, fallbacks, needs_realized_inputs, backend_passes(), *kernels
    tables = [(table, table.copy()) for table in changed]
    hooks = "pre_grad_custom_pass", "joint_custom_pre_pass", "post_grad_custom_post_pass"
    passes = {name: getattr(config, name) for name in hooks}
    tag = torch.compiler.config.cache_key_tag
    indexer = ir.View._dynamic_reshape_indexer
    functions = {name: getattr(sizevars, name) for name in NAMES if hasattr(sizevars, name)}
    try:
        yield
        fast_random_decomps.cache_clear()  # it holds a copy of the table
    except BaseException:
        for table, before in tables:
            table.clear()
            table.update(before)
        for overload in ATEN:
            overload._dispatch_cache.clear()
        for name, before in passes.items():
            setattr(config, name, before)
        torch.compiler.config.cache_key_tag = tag
        ir.View._dynamic_reshape_indexer = staticmethod(indexer)
        for name, function in functions.items():
            setattr(sizevars, name, function)
        raise


def _register_operators() -> None:
    from ..inductor.tables import config, decompositions, register_lowering

    for op in OPS.values():
        decompositions[op.overload] = registry.decompose_or_keep(op)
        register_lowering(op.overload, type_promotion_kind=None)(registry.lowering_of(op))
    for workaround in (adaptive_pooling, data_dependent_convolutions, data_dependent_views, device_assertions):
        workaround.install()
    _ = config.cpu_backend  # read in every compilation: let it be missed now
    tag_caches()


def _enter_later(caller: str, step: Callable[[], None]) -> None:
    """Take a step that the user asks for: now if Inductor is there already, else :func:`install` takes it."""
    if INDUCTOR_LOWERING not in sys.modules:
        return
    reason = _not_installed or _enter(step)
    if reason is not None:
        logger.warning("%s() does not change what is compiled: %s", caller, reason)


_accelerated: Sequence[str] = ()  # operators of torchvision


def accelerate_torchvision(names: Sequence[str]) -> None:
    """See :func:`inductor_vision.accelerate_torchvision`; takes effect now, or once Inductor is imported."""
    global _accelerated
    _accelerated = names
    _enter_later("accelerate_torchvision", _serve_torchvision)


def _serve_torchvision() -> None:
    if not _accelerated:
        return
    from ..inductor.tables import decompositions
    from ..passes.concatenations import SkipConcatenations

    for name in _accelerated:
        decompositions[getattr(torch.ops.torchvision, name).default] = TORCHVISION[name]
    _add_pass("post_grad_custom_post_pass", SkipConcatenations(TAG))
    tag_caches("torchvision")  # the same graph compiles to something else from now on


_long_sizes = False


def hide_long_sizes(caller: str) -> None:
    """Have Inductor compile models faster whose sizes are long formulas, as those of detectors are, of whichever
    library; takes effect now, or once Inductor is imported. ``caller`` is what a user has called for it."""
    global _long_sizes
    if not _long_sizes:
        _long_sizes = True
        _enter_later(caller, _hide_long_sizes)


def _hide_long_sizes() -> None:
    if _long_sizes:
        from ..workarounds import long_sizes

        long_sizes.install()


_sampling = False


def accelerate_sampling() -> None:
    """See :func:`inductor_vision.accelerate_sampling`; takes effect now, or once Inductor is imported."""
    global _sampling
    if not _sampling:
        _sampling = True
        _enter_later("accelerate_sampling", _serve_aten)


def _serve_aten() -> None:
    """Have Inductor's entries for aten's operators, where there are any, give way to this package's operators.

    Some of aten's operators have decompositions that run before Inductor's table is looked at, and before gradients are
    derived. These are asked too, but only while a graph is traced for Inductor.
    """
    if not _sampling:
        return
    from ..inductor.tables import decompositions

    for overload, served in ATEN.items():
        name = overload._schema.name.removeprefix("aten::")
        serve = registry.serve_or_leave(name, served, decompositions.get(overload))
        decompositions[overload] = serve
        for key in (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd):
            if key in overload.py_kernels:
                overload.py_kernels[key] = _for_inductor(overload, serve, overload.py_kernels[key])
        overload._dispatch_cache.clear()
    tag_caches("sampling")  # the same graph compiles to something else from now on


def _for_inductor(overload: Any, serve: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """A decomposition of aten's that is ``serve`` in graphs that are traced with Inductor's table."""
    from ..inductor.tables import current_decompositions

    def decompose(*args: Any, **kwargs: Any) -> Any:
        served = serve(*args, **kwargs) if current_decompositions().get(overload) is serve else NotImplemented
        return stock(*args, **kwargs) if served is NotImplemented else served

    return decompose


_fuse_depthwise_separable = False


def fuse_depthwise_separable() -> None:
    """See :func:`inductor_vision.fuse_depthwise_separable`; takes effect now, or once Inductor is imported."""
    global _fuse_depthwise_separable
    _fuse_depthwise_separable = True
    _enter_later("fuse_depthwise_separable", _add_fusion_pass)


def _add_fusion_pass() -> None:
    if _fuse_depthwise_separable:
        from ..passes.depthwise_separable import FuseDepthwiseSeparable

        _add_pass("pre_grad_custom_pass", FuseDepthwiseSeparable(TAG))


_winograd: tuple[int, float] | None = None  # tile and growth
_direct = False


def uses_winograd() -> bool:
    """Whether :func:`use_winograd` was called."""
    return _winograd is not None


def use_winograd(tile: int, growth: float) -> None:
    """See :func:`inductor_vision.use_winograd`; takes effect now, or once Inductor is imported."""
    global _winograd
    _winograd = tile, growth
    _enter_later("use_winograd", _add_convolution_pass)


def use_direct_convolutions() -> None:
    """See :func:`inductor_vision.use_direct_convolutions`; takes effect now, or once Inductor is imported."""
    global _direct
    _direct = True
    _enter_later("use_direct_convolutions", _add_convolution_pass)


def _add_convolution_pass() -> None:
    """One pass has all kernels to choose from."""
    if _winograd is None and not _direct:
        return
    from ..passes.convolution_kernels import Winograd
    from ..passes.convolutions import ChooseConvolutions
    from ..passes.direct_convolution import DirectConvolution

    tile, growth = _winograd or (None, 0.0)
    kernels = [*([DirectConvolution()] if _direct else []), *([] if tile is None else [Winograd(tile)])]
    _add_pass("joint_custom_pre_pass", ChooseConvolutions(TAG, kernels, growth))


_fold_norms = False


def fold_norms() -> None:
    """See :func:`inductor_vision.fold_norms`; takes effect now, or once Inductor is imported."""
    global _fold_norms
    _fold_norms = True
    _enter_later("fold_norms", _add_folding_pass)


def _add_folding_pass() -> None:
    if _fold_norms:
        from ..passes.affine_maps import FoldAffineMaps
        from ..passes.flattened import FlattenAsItLies
        from ..passes.heads import JoinHeads
        from ..workarounds.repeated_constants import MergeConstants

        _add_pass("joint_custom_pre_pass", MergeConstants(TAG))
        _add_pass("joint_custom_pre_pass", FoldAffineMaps(TAG))
        _add_pass("joint_custom_pre_pass", FlattenAsItLies(TAG))
        _add_pass("joint_custom_pre_pass", JoinHeads(TAG))


def _add_pass(hook: str, added: Any) -> None:
    """Have a pass run behind those that are there; in the place of one of its kind, if that has other settings."""
    from ..inductor.tables import config, custom_graph_pass

    passes = [*custom_graph_pass.get_custom_graph_passes(getattr(config, hook))]
    place = next((i for i, other in enumerate(passes) if type(other) is type(added)), len(passes))
    if place == len(passes) or passes[place].uuid() != added.uuid():
        passes[place:] = [added, *passes[place + 1 :]]
        setattr(config, hook, passes)
