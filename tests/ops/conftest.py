"""The tests of what operators mean run small aten programs, one after the other."""

import pytest


@pytest.fixture
def threads() -> int:
    return 1
