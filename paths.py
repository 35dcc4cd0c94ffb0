"""Which path each operator call took: a C++ template, Triton kernels, the lowered decomposition, or eager mode."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

logger = logging.getLogger("inductor_vision")


@dataclasses.dataclass(frozen=True)
class Path:
    """The path one call took.

    Attributes:
        op: the operator's name.
        kind: ``"template"``, ``"triton"``, ``"decomposition"`` (lowered by Inductor) or ``"eager"``; from a pass over
            graphs, ``"fused"``, ``"replaced"`` or ``"left alone"``, which says what happened to operators that are not
            this package's; also of aten's operators, if they are not served, ``"left alone"``.
        detail: which template, or why none; what was fused or replaced, or why it was left alone.
    """

    op: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.op}: {self.kind} ({self.detail})"


_recorders: list[list[Path]] = []


def record_path(op: str, kind: str, detail: str) -> None:
    """Log a path and hand it to whoever is inside :func:`recorded_paths`."""
    level = logging.DEBUG if kind == "eager" else logging.INFO  # eager mode would log every call
    if not _recorders and not logger.isEnabledFor(level):
        return
    path = Path(op, kind, detail)
    logger.log(level, "%s", path)
    for recorder in _recorders:
        recorder.append(path)


@contextlib.contextmanager
def recorded_paths() -> Iterator[list[Path]]:
    """Collect the paths that calls take inside the ``with`` block."""
    recorder: list[Path] = []
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders[:] = [other for other in _recorders if other is not recorder]  # equal is not the same
