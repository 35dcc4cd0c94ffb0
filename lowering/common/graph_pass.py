"""Passes over graphs, as Inductor's settings take them."""

from __future__ import annotations

from typing import Any

from ..inductor.tables import custom_graph_pass


class GraphPass(custom_graph_pass.CustomGraphPass):
    """A pass that is known to Inductor's caches by its name and a version."""

    def __init__(self, version: Any) -> None:
        self.version = version

    def uuid(self) -> Any:
        """Part of the key of Inductor's caches."""
        return f"{type(self).__name__}-{self.version}"
