"""Switches of what is compiled, each undone when a test has ended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.compiler.config
from inductor_vision import accelerate_sampling, fuse_depthwise_separable
from inductor_vision.lowering.installation import installer
from inductor_vision.tests.support.switches import sampling_switched_off_again


@pytest.fixture
def switch(monkeypatch) -> Iterator[None]:
    """What the test switches on is undone."""
    for name, off in (
        ("_fuse_depthwise_separable", False),
        ("_fold_norms", False),
        ("_winograd", None),
        ("_direct", False),
    ):
        monkeypatch.setattr(installer, name, off)
    from torch._inductor import config

    with config.patch(pre_grad_custom_pass=None, joint_custom_pre_pass=None):
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
