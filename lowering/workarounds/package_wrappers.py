"""Exchanges methods of the class with which Inductor writes packages, for those workarounds that change these."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from ...version import tested_torch


@contextlib.contextmanager
def method_exchanged(
    name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]], package: str
) -> Iterator[None]:
    """Within this context a method of ``CppWrapperCpu`` is what ``make`` makes of it.

    Args:
        package: what cannot be made where there is no such method, for the error's message.

    Raises:
        RuntimeError: there is none.
    """
    from ..inductor.packaging import CppWrapperCpu

    original = getattr(CppWrapperCpu, name, None)
    if original is None:
        raise not_as_tested(package, f"CppWrapperCpu has no {name}")
    with patch.object(CppWrapperCpu, name, make(original)):
        yield


def not_as_tested(package: str, difference: str) -> RuntimeError:
    """The error where Inductor differs from the releases of torch that this is tested with."""
    return RuntimeError(f"{package} cannot be made: {difference} (this is torch {torch.__version__}; {tested_torch()})")
