"""Runs something once Inductor is imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

INDUCTOR_LOWERING = "torch._inductor.lowering"  # every compilation imports it before it does anything


class _Loader(importlib.abc.Loader):
    """Loads Inductor's module as its own loader would, then runs what waits for it."""

    def __init__(self, loader: importlib.abc.Loader, run: Callable[[], None]) -> None:
        self.loader = loader
        self.run = run

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader  # reading its source, reloading it and the like are no business of ours
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        self.run()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and gives it our loader."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run
        self.asking_others = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != INDUCTOR_LOWERING or self.asking_others:
            return None
        self.asking_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking_others = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.run)
        return spec


def when_inductor_is_imported(run: Callable[[], None]) -> None:
    """Have ``run`` called right after Inductor's lowerings are defined: now, if they are."""
    if INDUCTOR_LOWERING in sys.modules:
        run()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(run))
