"""Puts something else in the place of a library's Python functions, whoever holds them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from ..version import __version__

logger = logging.getLogger("inductor_vision")


@dataclasses.dataclass(frozen=True)
class Library:
    """A library whose functions are exchanged.

    Attributes:
        name: what it is imported as.
        tested: the versions that this package is tested with.
    """

    name: str
    tested: str

    def is_as_tested(self, name: str, found: object, expected: object) -> bool:
        """Whether the library declares something as this package knows it; if not, a warning says so."""
        if str(found) == str(expected):
            return True
        version = getattr(sys.modules.get(self.name), "__version__", "of unknown version")
        logger.warning(
            "%s's %s is left as it is: expected %s, got %s (this is %s %s; inductor_vision %s is tested with %s)",
            *(self.name, name, expected, found, self.name, version, __version__, self.tested),
        )
        return False

    def exchange(
        self, path: str, owner: Any, replacement: Callable[..., Any], choose: Callable[..., Callable[..., Any]]
    ) -> None:
        """Have a function of a module, or a method of a class, run what is chosen at each call.

        What is exchanged is the function's code, not the name of the function in a module: who has imported the
        function before, or keeps it in a class, a closure, a default argument or a partial, has the very same object,
        so that there is nobody whom this does not reach. ``__wrapped__`` is the function as it was, which is where its
        signature and the source that torch.jit.script compiles are looked up.

        Args:
            path: what warnings call it; its last part is its name in ``owner``.
            owner: the module or class.
            replacement: what may take its place; has parameters of the same names.
            choose: from the replacement and the function as it was, what runs.
        """
        try:
            function: Any = getattr(owner, path.rpartition(".")[2])
        except AttributeError as error:
            self.is_as_tested(path, error, "a function")
            return
        if not isinstance(function, types.FunctionType) or function.__closure__:
            self.is_as_tested(path, function, "a function that is not decorated")
            return
        chosen = f"_inductor_vision_{function.__qualname__.replace('.', '_')}"  # in the function's module
        if chosen in function.__code__.co_names:
            return
        first = 1 if inspect.isclass(owner) else 0  # `self` has other names here
        found, expected = (list(inspect.signature(of).parameters)[first:] for of in (function, replacement))
        if not self.is_as_tested(path, found, expected):
            return
        stock: Any = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        functools.update_wrapper(stock, function, updated=())
        del stock.__wrapped__
        stock.__kwdefaults__ = function.__kwdefaults__
        function.__globals__[chosen] = functools.partial(choose, replacement, stock)
        function.__code__ = _run_chosen.__code__.replace(co_name=function.__name__, co_names=(chosen,))
        function.__defaults__ = function.__kwdefaults__ = None  # those of what runs count
        function.__wrapped__ = stock  # type: ignore[attr-defined]  # functions take any attribute
        _forget_parameters(function)


def _forget_parameters(function: types.FunctionType) -> None:
    """Dynamo remembers those of functions that it has traced, and would bind arguments as for the code before."""
    dynamo = sys.modules.get("torch._dynamo.variables.functions")
    getattr(dynamo, "_spec_cache", {}).pop(function, None)


def _run_chosen(*args: Any, **kwargs: Any) -> Any:
    return _CHOOSE()(*args, **kwargs)  # type: ignore[name-defined]  # noqa: F821 (a copy of this code names it)


def in_compiled_code(replacement: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """Choose the replacement where Inductor compiles, and the function as it was elsewhere."""
    # Programs for ONNX have no use for this package's operators, and its exporter does not know them.
    for_inductor = torch.compiler.is_compiling() and not torch.onnx.is_in_onnx_export()
    return replacement if for_inductor else stock


def always(replacement: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """Choose the replacement."""
    return replacement
