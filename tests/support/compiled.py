"""Compiles afresh and keeps what the compiler did, so that a test can prove which path ran."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config
from inductor_vision.paths import Path, recorded_paths
from inductor_vision.tests.support.structs import assert_told_by_name
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling and running a function gave.

    Attributes:
        function: the compiled function.
        result: what it returned.
        paths: of its operator calls.
        source: the generated code of all its graphs.
        templates: how many template kernels were generated.
        fused: how many nodes of Inductor's were fused into them.
    """

    function: Callable[..., Any]
    result: Any
    paths: list[Path]
    source: str
    templates: int
    fused: int

    @property
    def kernels(self) -> int:
        """How many C++ kernels there are, templates included."""
        return len(re.findall(r'extern "C"\s[^;{]*\)\s*\{', self.source))

    @property
    def kinds(self) -> list[str]:
        return [path.kind for path in self.paths]


@contextlib.contextmanager
def caches_disabled() -> Iterator[None]:
    """Graphs are compiled even if a cache on disk has them; compiled C++ of the same text is taken from disk."""
    with (
        inductor_config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def compile_and_run(
    fn: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    config: dict[str, Any] | None = None,
    run: Callable[..., Any] = lambda function, *args: function(*args),
) -> Compiled:
    """Compile ``fn`` as one graph, under Inductor's ``config``, and ``run`` what it becomes on ``args``: call it, or
    train a step, and what that compiles belongs to it."""
    counters.clear()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic)
    with caches_disabled(), inductor_config.patch(config or {}), recorded_paths() as paths:
        result, sources = run_and_get_code(run, compiled, *args)
    source = "\n".join(sources)
    assert_told_by_name(source)
    counts = counters["inductor"]
    return Compiled(
        compiled,
        result,
        list(paths),
        source,
        templates=counts["cpp_templated_kernel_counter"],
        fused=counts["cpp_epilogue_fusion_counter"],
    )


@dataclasses.dataclass(frozen=True)
class Traced:
    """What tracing a function gave.

    Attributes:
        function: what was traced.
        result: what it returned.
        paths: of its operator calls but those that became internal operators, which only templates have: "eager"
            is one that stays for its template, any other is refused.
        graphs: what would be compiled; frozen if the config says so.
    """

    function: Callable[..., Any]
    result: Any
    paths: list[Path]
    graphs: list[torch.fx.Graph]


def trace_and_run(
    fn: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    config: dict[str, Any] | None = None,
    run: Callable[..., Any] = lambda function, *args: function(*args),
) -> Traced:
    """As :func:`compile_and_run`, but only traced for Inductor, which decides about each operator then. What takes
    most of the time is left out: no code is generated, and operators that stay in the graph run as they do eagerly."""

    graphs: list[torch.fx.Graph] = []

    def as_it_is(graph: torch.fx.GraphModule, *args: Any, **options: Any) -> Callable[..., Any]:
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    backend = functools.partial(compile_fx, inner_compile=as_it_is)
    traced = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend=backend)
    with caches_disabled(), inductor_config.patch(config or {}), recorded_paths() as paths:
        result = run(traced, *args)
    return Traced(traced, result, list(paths), graphs)


def source_of_package(path: os.PathLike | str) -> str:
    """The program of an AOTInductor package, without its kernels."""
    with zipfile.ZipFile(path) as archive:
        (wrapper,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".wrapper.cpp"))
    return wrapper


def constants_of_package(path: os.PathLike | str) -> list[str]:
    """The shapes of the constants that an AOTInductor package holds, as they stand in its source."""
    return re.findall(r"constants_info_\[\d+\]\.shape = \{(.*?)\}", source_of_package(path))


def run_python(program: str, *args: str, **environment: str) -> str:
    """What a program prints that runs in a Python of its own; it must exit with 0."""
    result = subprocess.run(
        [sys.executable, "-c", program, *args],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=600,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


_RUN_PACKAGE = """
import sys
import torch

model = torch._inductor.aoti_load_package(sys.argv[1])
results = [model(*call) for call in torch.load(sys.argv[2])]
present = {name.partition(".")[0] for name in sys.modules}
assert not present & {"inductor_vision", "torchvision", "transformers"}, present
torch.save(results, sys.argv[3])
"""


def run_alone(package: pathlib.Path, calls: list[Any], folder: pathlib.Path) -> list[Any]:
    """The results of calls of a package, in a process that has neither this package nor a library with models."""
    arguments, results = (str(folder / name) for name in ("calls.pt", "results.pt"))
    torch.save(calls, arguments)
    run_python(_RUN_PACKAGE, str(package), arguments, results)
    return torch.load(results)
