"""Tells Inductor about this package's operators.

Each operator has an entry among Inductor's decompositions. While a graph is traced for Inductor it decides, call by
call. Where Inductor generates C++, the operator stays as it is if a template takes the call; what stays has an entry
among Inductor's lowerings, which makes the template. Where it generates Triton code, the operator is replaced by an
aten program with Triton kernels in it, if there is one. Everywhere else it is replaced by its decomposition. A call
whose decomposition cannot be traced, because it loops over data, stays too, and is run as it is eagerly.

A family's templates are in ``lowering/<family>.py`` and its programs with Triton kernels in
``lowering/triton/<family>.py``, which are imported when the first call needs them, and declare them with
:func:`template_for` and :func:`triton_program_for`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.compiler.config
from torch.utils._pytree import tree_leaves

from ..ops.registry import NAMESPACE, OPS, TORCHVISION, VisionOp
from ..paths import logger, record_path
from ..version import tested_torch
from . import assertions, data_dependent_sizes
from .caches import TAG, backend_passes, tag_caches
from .hook import INDUCTOR_LOWERING


@dataclasses.dataclass(frozen=True)
class Template:
    """A template for one operator.

    Attributes:
        refusal: from the operator's arguments (fake tensors), why the template cannot take them; None if it can.
        lower: the operator's lowering, from Inductor IR to Inductor IR.
        prepack: instead of ``lower``, for operators with weights: a function of the operator's arguments (fake tensors)
            that brings the weight into the kernel's order with aten operators and calls an internal operator that
            takes it so (:func:`define_internal_op`). Where the weight is a constant, the former runs at compile time.
    """

    refusal: Callable[..., str | None]
    lower: Callable[..., Any] | None = None
    prepack: Callable[..., Any] | None = None


def serve_all(*args: Any) -> str | None:
    """The refusal of templates that take every call."""
    return None


def constant_geometry(*pairs: Sequence[Any]) -> str | None:
    """The refusal of kernels that are compiled for a stride, padding and dilation."""
    constant = all(isinstance(number, int) for pair in pairs for number in pair)
    return None if constant else "stride, padding and dilation must be constants"


@dataclasses.dataclass(frozen=True)
class TritonProgram:
    """An operator as an aten program with Triton kernels.

    Attributes:
        program: takes the operator's arguments, and computes what its decomposition does.
        refusal: from the operator's arguments (fake tensors), why the program cannot take them; None if it can.
    """

    program: Callable[..., Any]
    refusal: Callable[..., str | None] = serve_all


_templates: dict[str, Template] = {}
_triton_programs: dict[str, TritonProgram] = {}
_internal = torch.library.Library(NAMESPACE, "FRAGMENT")


def template_for(op: str, template: Template) -> None:
    """Declare the template of an operator.

    Raises:
        ValueError: the operator has one, or there is no such operator.
    """
    _declare(_templates, "template", op, template)


def triton_program_for(op: str, program: TritonProgram) -> None:
    """Declare the program with Triton kernels of an operator.

    Raises:
        ValueError: the operator has one, or there is no such operator.
    """
    _declare(_triton_programs, "Triton program", op, program)


def _declare(declared: dict[str, Any], kind: str, op: str, what: Any) -> None:
    if op in declared:
        raise ValueError(f"operator {op!r} has two {kind}s")
    if op not in OPS:
        raise ValueError(f"no operator {op!r}; defined are: {', '.join(sorted(OPS))}")
    declared[op] = what


def define_internal_op(
    schema: str, *, body: Callable[..., Any], fake: Callable[..., Any], lower: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Define an operator that stands in graphs in the place of another, and how Inductor lowers it.

    Others than Inductor use its table of decompositions too, and run what they get: its debugging backends, minifiers,
    :meth:`torch.export.ExportedProgram.run_decompositions`.

    Args:
        body: computes it by aten, usually as the decomposition of the other one, with the weight put back in order.
        fake: shapes, strides and dtypes of the result.
        lower: from Inductor IR to Inductor IR.
    """
    from torch._inductor.lowering import register_lowering

    name = schema.partition("(")[0]
    _internal.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _internal.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_internal)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    register_lowering(overload, type_promotion_kind=None)(lower)
    return overload


_broken: dict[str, str] = {}  # modules here that could not be imported, and why


def _template(op: VisionOp) -> Template | None:
    return _templates.get(op.name) if _import_if_there(op.family) else None


def _triton_program(op: VisionOp) -> TritonProgram | None:
    return _triton_programs.get(op.name) if _import_if_there(f"triton.{op.family}") else None


def _import_if_there(name: str) -> bool:
    """Import a module of this folder, of which there may be none. False where it does not load, as with a torch that
    lacks what it uses: a user's graph is compiled without it then."""
    module = f"{__package__}.{name}"
    if name not in _broken and importlib.util.find_spec(module) is not None:
        try:
            importlib.import_module(module)
        except Exception as error:  # of whatever kind: it is not the user's graph that is at fault
            _broken[name] = _reason(error)
            logger.warning("%s cannot be used: %s", module, _broken[name])
    return name not in _broken


def _why_missing(name: str, what: str) -> str | None:
    """Why what a module here declares is not there, if the module does not load."""
    return f"its {what} does not load: {_broken[name]}" if name in _broken else None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error} (this is torch {torch.__version__}; {tested_torch()})"


def _decompose_or_keep(op: VisionOp) -> Callable[..., Any]:
    def decompose(*args: Any, **kwargs: Any) -> Any:
        refused = refusal(op, *args, **kwargs)
        if refused is None:
            template = _template(op)
            return template.prepack(*args, **kwargs) if template and template.prepack else NotImplemented
        generated = ""
        if _generates_triton(_device(args)):
            program = _triton_program(op)
            if program is not None:
                cannot = program.refusal(*args, **kwargs)
            else:
                cannot = _why_missing(f"triton.{op.family}", "kernel") or "no kernel of its own"
            if program is not None and cannot is None:
                record_path(op.name, "triton", f"an aten program with Triton kernels of its own; {refused}")
                return program.program(*args, **kwargs)
            generated = f"Triton code, {cannot}; "
        untraceable = op.untraceable(*args, **kwargs)
        if untraceable is not None:
            detail = f"{generated}{refused}; {untraceable}: the compiled graph runs the aten decomposition"
            record_path(op.name, "eager", detail)
            return NotImplemented
        record_path(op.name, "decomposition", f"{generated}{refused}")
        return op.decomposition(*args, **kwargs)

    return decompose


def refusal(op: VisionOp, *args: Any, **kwargs: Any) -> str | None:
    """Why a call of the operator would not get its template; None if it would."""
    template = _template(op)
    if template is not None:
        return _refusal(template, *args, **kwargs)
    return _why_missing(op.family, "template") or "this operator has no template"


def _refusal(template: Template, *args: Any, **kwargs: Any) -> str | None:
    from torch._inductor import config

    device = _device(args)
    if device.type != "cpu":
        return f"the templates are C++ for the CPU, the tensors are on {device}"
    if config.cpu_backend != "cpp":
        return f"torch._inductor.config.cpu_backend is {config.cpu_backend!r}, not 'cpp'"
    return template.refusal(*args, **kwargs)


def _device(args: Any) -> torch.device:
    return next(arg.device for arg in tree_leaves(args) if isinstance(arg, torch.Tensor))


def _generates_triton(device: torch.device) -> bool:
    """Whether Inductor generates Triton code for a device, and has Triton for it."""
    from torch._inductor import config

    setting = f"{device.type}_backend"  # of MPS and others there is none
    return getattr(config, setting, None) == "triton" and importlib.util.find_spec("triton") is not None


def _lower(op: VisionOp) -> Callable[..., Any]:
    def lower(*args: Any, **kwargs: Any) -> Any:
        from torch._inductor.lowering import fallback_handler
        from torch._inductor.virtualized import V

        template, node = _template(op), V.graph.current_node
        fakes = torch.fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
        if template is None or template.lower is None or _refusal(template, *fakes[0], **fakes[1]) is not None:
            return fallback_handler(op.overload, add_to_fallback_set=False)(*args, **kwargs)
        return template.lower(*args, **kwargs)

    return lower


_not_installed: str | None = None


def why_not_installed() -> str | None:
    """Why Inductor could not be told about the operators; None if it was, or has not been imported yet.

    It then takes them for anybody's custom operators: a compiled graph calls them, and their decompositions run as they
    do eagerly.
    """
    return _not_installed


def require_lowerings(caller: str) -> None:
    """Raise RuntimeError if compiled code cannot have this package's kernels, which ``caller`` is nothing without."""
    import torch._inductor.lowering  # noqa: F401  (has the operators installed, if it was not imported before)

    _import_if_there("inductor")
    broken = why_not_installed() or _broken.get("inductor")
    if broken:
        raise RuntimeError(f"{caller}: the kernels of inductor_vision cannot be compiled: {broken}")


def install() -> None:
    """Register every operator with Inductor. Runs once, when Inductor's own lowerings are defined.

    That is inside of an import that every compilation makes, of models too that have none of these operators.
    Therefore nothing is raised: where Inductor's private parts are not as expected they are left as they were, and a
    warning says why.
    """
    global _not_installed
    _not_installed = _enter(_register_operators, _serve_torchvision, _add_fusion_pass)
    if _not_installed is not None:
        logger.warning(
            "inductor_vision's operators have no kernels, and run in compiled graphs as they do eagerly: %s",
            _not_installed,
        )


def _enter(*steps: Callable[[], None]) -> str | None:
    """Take steps that change Inductor's tables: all of them, or none if one fails, and why."""
    try:
        with _all_or_nothing():
            for step in steps:
                step()
    except Exception as error:  # a newer torch may lack anything, and a user's process must survive that
        return _reason(error)
    return None


@contextlib.contextmanager
def _all_or_nothing() -> Iterator[None]:
    """What is changed of Inductor's within this context is as it was if the context is left with an exception."""
    from torch._inductor import config, ir
    from torch._inductor.decomposition import decompositions, fast_random_decomps
    from torch._inductor.lowering import fallbacks, lowerings, needs_realized_inputs

    changed = decompositions, lowerings, fallbacks, needs_realized_inputs, backend_passes()
    tables = [(table, table.copy()) for table in changed]
    passes, tag = config.pre_grad_custom_pass, torch.compiler.config.cache_key_tag
    indexer = ir.View._dynamic_reshape_indexer
    try:
        yield
        fast_random_decomps.cache_clear()  # it holds a copy of the table
    except BaseException:
        for table, before in tables:
            table.clear()
            table.update(before)
        config.pre_grad_custom_pass, torch.compiler.config.cache_key_tag = passes, tag
        ir.View._dynamic_reshape_indexer = staticmethod(indexer)
        raise


def _register_operators() -> None:
    from torch._inductor import config
    from torch._inductor.decomposition import decompositions
    from torch._inductor.lowering import register_lowering

    for op in OPS.values():
        decompositions[op.overload] = _decompose_or_keep(op)
        register_lowering(op.overload, type_promotion_kind=None)(_lower(op))
    data_dependent_sizes.install()
    assertions.install()
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
    from torch._inductor.decomposition import decompositions

    if not _accelerated:
        return
    for name in _accelerated:
        decompositions[getattr(torch.ops.torchvision, name).default] = TORCHVISION[name]
    tag_caches("torchvision")  # the same graph compiles to something else from now on


_fuse_depthwise_separable = False


def fuse_depthwise_separable() -> None:
    """See :func:`inductor_vision.fuse_depthwise_separable`; takes effect now, or once Inductor is imported."""
    global _fuse_depthwise_separable
    _fuse_depthwise_separable = True
    _enter_later("fuse_depthwise_separable", _add_fusion_pass)


def _add_fusion_pass() -> None:
    if not _fuse_depthwise_separable:
        return
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import get_custom_graph_passes

    from .depthwise_separable_pass import FuseDepthwiseSeparable

    passes = get_custom_graph_passes(config.pre_grad_custom_pass)
    if not any(isinstance(other, FuseDepthwiseSeparable) for other in passes):
        config.pre_grad_custom_pass = [*passes, FuseDepthwiseSeparable(TAG)]
