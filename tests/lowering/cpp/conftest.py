"""What the tests of all kernels' programs share."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import pytest
from inductor_vision.tests.support.cpp import sanitized_programs


@pytest.fixture(scope="session")
def kept(request: pytest.FixtureRequest) -> pathlib.Path:
    """The folder of what compilers have made, in this run or one before; see tests/support/cpp.py."""
    return request.config.cache.mkdir("cpp")


@pytest.fixture(scope="module")
def program(request: pytest.FixtureRequest, kept: pathlib.Path) -> Iterator[Callable[[str], pathlib.Path]]:
    """A test module's ``SOURCE`` built for a capability, by the name of that, with ``OPTIMIZATION``."""
    with sanitized_programs(request, kept, request.module.SOURCE, request.module.OPTIMIZATION) as programs:
        yield programs
