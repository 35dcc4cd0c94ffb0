"""Switches of what is compiled, each undone when a test has ended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.compiler.config
from inductor_vision import accelerate_sampling, fuse_depthwise_separable
from inductor_vision.tests.support.switches import passes_switched_off_again, sampling_switched_off_again


@pytest.fixture
def switch() -> Iterator[None]:
    """What the test switches on is undone."""
    with passes_switched_off_again():
        yield


@pytest.fixture
def switched_on(switch) -> None:
    fuse_depthwise_separable()


@pytest.fixture
def sampling() -> Iterator[None]:
    """accelerate_sampling()."""
    with sampling_switched_off_again(), torch.compiler.config.patch(cache_key_tag="before"):
        accelerate_sampling()
        yield
