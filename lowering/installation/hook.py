"""Runs something once a module is imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

INDUCTOR_LOWERING = "torch._inductor.lowering"  # every compilation imports it before it does anything


class _Loader(importlib.abc.Loader):
    """Loads a module as its own loader would, then runs what waits for it."""

    def __init__(self, loader: importlib.abc.Loader, run: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.run = run

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # get_code, get_data: what else a loader can do

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader  # reading its source, reloading it and the like are no business of ours
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.run(module)


class ImportHook(importlib.abc.MetaPathFinder):
    """Finds some modules as the other finders do, and gives them our loader.

    Args:
        waits_for: whether a module of this name is one of those.
        run: what is called with each of them, right after it was imported.
    """

    def __init__(self, waits_for: Callable[[str], bool], run: Callable[[ModuleType], None]) -> None:
        self.waits_for = waits_for
        self.run = run
        self.asked: set[str] = set()  # what the other finders are being asked for

    def install(self) -> None:
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in self.asked or not self.waits_for(fullname):
            return None
        self.asked.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asked.discard(fullname)  # another thread may have been asking, too
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.run)
        return spec


def when_inductor_is_imported(run: Callable[[], None]) -> None:
    """Have ``run`` called right after Inductor's lowerings are defined: now, if they are."""
    if INDUCTOR_LOWERING in sys.modules:
        run()
        return

    def run_once(_: ModuleType) -> None:
        hook.remove()
        run()

    hook = ImportHook(lambda name: name == INDUCTOR_LOWERING, run_once)
    hook.install()
