"""Says which path each operator call of a function takes under ``torch.compile``, and why."""

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
    """What :func:`explain` found; ``str()`` of it is a report.

    Attributes:
        paths: the path of each operator call, in the order of compilation; calls that were not compiled come as
            ``"eager"``, in the order of execution.
        problem: why no operator at all has a kernel with this torch, so that all calls are ``"eager"``; else None.
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
    """Compile and run ``fn(*args, **kwargs)`` once, and say which path each call of this package's operators took.

    A call takes one of these paths:

    * ``template``: a C++ kernel of this package, fused with its neighbours;
    * ``triton``: an aten program with Triton kernels of this package, where Inductor generates Triton code;
    * ``decomposition``: the operator's aten program, lowered by Inductor; the detail says why no template took it;
    * ``eager``: the call was not compiled, because of a graph break or a function that compilation skips.

    What ``torch.jit.script`` made is not compiled: torchvision's operators in it stay torchvision's, and come last, as
    ``eager``, where ``fn`` or a module of it is scripted. (Of a scripted function that others call, nothing is said.)

    After :func:`inductor_vision.fuse_depthwise_separable` it is also said of every depthwise convolution whether it was
    ``fused``, or ``left alone`` and why.

    The compilation is a fresh one: caches on disk, and what ``fn`` was compiled to before, are left alone.

    Args:
        fn: a function or module, as you would give it to :func:`torch.compile`; not compiled yet.
        args, kwargs: what to call it with.

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
