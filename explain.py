"""Reports which path each operator call of a function takes under ``torch.compile``, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .lowering.installation.installer import why_not_installed
from .ops.registry import TORCHVISION
from .paths import Path, recorded_paths


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`; ``str()`` of it is a report.

    Attributes:
        paths: the path of each operator call, in the order of compilation; calls that were not compiled are listed as
            ``"eager"``, in the order of execution.
        problem: the reason why no operator has a kernel with the installed torch, so that all calls are ``"eager"``;
            None if they have.
    """

    paths: list[Path]
    problem: str | None = None

    def __str__(self) -> str:
        lines = [] if self.problem is None else [f"no operator of inductor_vision has a kernel: {self.problem}"]
        if not self.paths:
            return "\n".join([*lines, "no operator of inductor_vision was called"])
        width = max(len(path.op) for path in self.paths)
        return "\n".join([*lines, *(f"{path.op:{width}}  {path.kind}: {path.detail}" for path in self.paths)])


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Compile and run ``fn(*args, **kwargs)`` once, and report which path each call of this package's operators took.

    A call takes one of these paths:

    * ``template``: a C++ kernel of this package, fused with its neighbours;
    * ``triton``: an aten program with Triton kernels of this package, where Inductor generates Triton code;
    * ``decomposition``: the operator's aten program, lowered by Inductor; the detail says why no template took it;
    * ``eager``: the call was not compiled, because of a graph break or a function that compilation skips.

    Code made by ``torch.jit.script`` is not compiled. If ``fn`` or one of its modules is scripted, torchvision's
    operators in it are listed last, as ``eager``; scripted functions that it calls are not looked into.

    After :func:`inductor_vision.fuse_depthwise_separable` the report also lists every depthwise convolution, and after
    :func:`inductor_vision.fold_norms`, if weights are frozen, every convolution before a norm: as ``fused``, or as
    ``left alone`` with the reason; and every linear layer that reads a convolution's map as it lies, as
    ``fused``. After :func:`inductor_vision.use_direct_convolutions` and :func:`inductor_vision.use_winograd` it lists
    every convolution, and every gradient by the input of one: as ``replaced``, or as ``left alone``. After
    :func:`inductor_vision.accelerate_sampling` it lists each call of an operator of aten's that this package has a
    kernel for: as ``template``, or as ``left alone``.

    ``fn`` is always compiled anew: neither caches on disk nor earlier compilations of it are used or changed.

    Args:
        fn: a function or module, as you would pass it to :func:`torch.compile`, not compiled yet.
        args, kwargs: arguments to call it with.

    Returns:
        An :class:`Explanation`.
    """
    with recorded_paths() as paths:
        # isolate_recompiles is missing from the overloads that type checkers see.
        compiled = torch.compile(fn, backend=_fresh_inductor, isolate_recompiles=True)  # type: ignore[call-overload]
        compiled(*args, **kwargs)
    return Explanation([*paths, *_scripted(fn)], why_not_installed())


def _scripted(fn: Callable[..., Any]) -> list[Path]:
    """torchvision's operators in scripted code; nothing that runs says that they are there."""
    parts = fn.modules() if isinstance(fn, torch.nn.Module) else [fn]
    scripts = [part for part in parts if isinstance(part, (torch.jit.ScriptModule, torch.jit.ScriptFunction))]
    # A list of modules has no forward, and so no graph.
    graphs: list[Any] = [script.inlined_graph for script in scripts if hasattr(script, "inlined_graph")]
    found = {name for graph in graphs for name in TORCHVISION if graph.findAllNodes(f"torchvision::{name}", True)}
    detail = "torchvision's operator, in code that torch.jit.script made and that is not compiled"
    return [Path(name, "eager", detail) for name in sorted(found)]


def _fresh_inductor(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Inductor under another name, as Dynamo shares no compiled code between backends; gradients are compiled at once,
    not when they are first asked for."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(force_disable_caches=True), functorch_config.patch(force_non_lazy_backward_lowering=True):
        return compile_fx(graph, example_inputs)
