"""One module per suite, each with a ``SUITE``; found by looking into this folder."""

from __future__ import annotations

import importlib
import pkgutil

from ..spec import Suite


def load_suites() -> dict[str, Suite]:
    """All suites, by the name of their module."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").SUITE for name in names}
