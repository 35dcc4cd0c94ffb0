"""What is going on, for whoever waits."""

from __future__ import annotations

import copy
import sys
import time
from typing import TextIO


class Progress:
    """One line on stderr that is rewritten; where stderr is not a terminal, a line each."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._rewrites = self._stream.isatty()
        self._start = time.monotonic()
        self._prefix = ""

    def part(self, name: str) -> Progress:
        """This line, for one part of the work."""
        part = copy.copy(self)
        part._prefix = f"{name} "
        return part

    def say(self, text: str, *, passing: bool = False) -> None:
        """Show what is being done. ``passing``: a detail that a log can do without."""
        if passing and not self._rewrites:
            return
        text = f"[{time.monotonic() - self._start:4.0f} s] {self._prefix}{text}"
        self._stream.write(f"\r\x1b[K{text[:110]}" if self._rewrites else f"{text}\n")
        self._stream.flush()

    def done(self) -> None:
        """Clear the line."""
        if self._rewrites:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
