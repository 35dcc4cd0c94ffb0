"""Which operators have templates and Triton programs, and what becomes of each call: it is kept, or decomposed.

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

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ...ops.registry import OPS, Served, VisionOp
from ...paths import logger, record_path
from ...version import tested_torch


@dataclasses.dataclass(frozen=True)
class Template:
    """A template for one operator.

    Attributes:
        refusal: from the operator's arguments (fake tensors), why the template cannot take them; None if it can.
        lower: the operator's lowering, from Inductor IR to Inductor IR.
        prepack: instead of ``lower``, for operators with weights: a function of the operator's arguments (fake tensors)
            that brings the weight into the kernel's order with aten operators and calls an internal operator that
            takes it so (:func:`define_internal_op`). Where the weight is a constant, the former runs at compile time.
        leaves: from the operator's arguments (fake tensors), why a call of aten's operator that this one can compute
            (:func:`~inductor_vision.ops.registry.serves_aten`) is better left to Inductor; None if it is not.
    """

    refusal: Callable[..., str | None]
    lower: Callable[..., Any] | None = None
    prepack: Callable[..., Any] | None = None
    leaves: Callable[..., str | None] = lambda *args: None


def serve_all(*args: Any) -> str | None:
    """The refusal of templates that take every call."""
    return None


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


_LOWERING = __package__.rpartition(".")[0]
_broken: dict[str, str] = {}  # modules of lowering/ that could not be imported, and why


def _template(op: VisionOp) -> Template | None:
    return _templates.get(op.name) if _import_if_there(op.family) else None


def has_template(op: VisionOp) -> bool:
    """Whether an operator has a template, whatever calls that takes."""
    return _template(op) is not None


def _triton_program(op: VisionOp) -> TritonProgram | None:
    return _triton_programs.get(op.name) if _import_if_there(f"triton.{op.family}") else None


def _import_if_there(name: str) -> bool:
    """Import a module of lowering/, of which there may be none. False where it does not load, as with a torch that
    lacks what it uses: a user's graph is compiled without it then."""
    module = f"{_LOWERING}.{name}"
    if name not in _broken and importlib.util.find_spec(module) is not None:
        try:
            importlib.import_module(module)
        except Exception as error:  # of whatever kind: it is not the user's graph that is at fault
            _broken[name] = reason(error)
            logger.warning("%s cannot be used: %s", module, _broken[name])
    return name not in _broken


def why_broken(name: str) -> str | None:
    """Why a module of lowering/ cannot be imported; None if it can."""
    _import_if_there(name)
    return _broken.get(name)


def _why_missing(name: str, what: str) -> str | None:
    """Why what a module of lowering/ declares is not there, if the module does not load."""
    return f"its {what} does not load: {_broken[name]}" if name in _broken else None


def reason(error: Exception) -> str:
    """What went wrong, with which torch."""
    return f"{type(error).__name__}: {error} (this is torch {torch.__version__}; {tested_torch()})"


def decompose_or_keep(op: VisionOp) -> Callable[..., Any]:
    """What decides, call by call, as the operator's entry among Inductor's decompositions."""

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


def serve_or_leave(name: str, served: Served, stock: Callable[..., Any] | None) -> Callable[..., Any]:
    """What decides about one of aten's operators, call by call, as its entry among Inductor's decompositions.

    Args:
        name: the operator's, for reports.
        stock: the entry as it was; None if there was none.
    """

    def serve(*args: Any, **kwargs: Any) -> Any:
        call = served.arguments(*args, **kwargs)
        template = _template(served.op)
        left = refusal(served.op, *call)
        if torch._C._are_functorch_transforms_active():
            left = "it is within a transform of torch.func, which may want derivatives that this package has not"
        if left is None and template is not None:
            left = template.leaves(*call)
        if left is None:
            return served.op(*call)
        record_path(name, "left alone", left)
        return NotImplemented if stock is None else stock(*args, **kwargs)

    return serve


def _refusal(template: Template, *args: Any, **kwargs: Any) -> str | None:
    from ..inductor.tables import config

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
    from ..inductor.tables import config

    setting = f"{device.type}_backend"  # of MPS and others there is none
    return getattr(config, setting, None) == "triton" and importlib.util.find_spec("triton") is not None


def lowering_of(op: VisionOp) -> Callable[..., Any]:
    """What lowers the calls that stay, as the operator's entry among Inductor's lowerings."""

    def lower(*args: Any, **kwargs: Any) -> Any:
        from ..inductor.tables import V, fallback_handler

        template, node = _template(op), V.graph.current_node
        fakes = torch.fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
        if template is None or template.lower is None or _refusal(template, *fakes[0], **fakes[1]) is not None:
            return fallback_handler(op.overload, add_to_fallback_set=False)(*args, **kwargs)
        return template.lower(*args, **kwargs)

    return lower
