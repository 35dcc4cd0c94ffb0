"""What the tests of all kernels' programs share."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import pytest
from inductor_vision.tests.support.cpp import sanitized_programs


@pytest.fixture(scope="module")
def program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], pathlib.Path]]:
    """A test module's ``SOURCE`` built for a capability, by the name of that, with ``OPTIMIZATION``."""
    source = request.module.SOURCE
    folder = tmp_path_factory.mktemp(source.stem)
    with sanitized_programs(request, folder, source, request.module.OPTIMIZATION) as programs:
        yield programs
