"""Switches of passes, each undone when a test has ended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from inductor_vision import fuse_depthwise_separable
from inductor_vision.lowering.installation import installer


@pytest.fixture
def switch(monkeypatch) -> Iterator[None]:
    """What the test switches on is undone."""
    for name, off in (("_fuse_depthwise_separable", False), ("_fold_norms", False), ("_winograd", None)):
        monkeypatch.setattr(installer, name, off)
    from torch._inductor import config

    with config.patch(pre_grad_custom_pass=None, joint_custom_pre_pass=None):
        yield


@pytest.fixture
def switched_on(switch) -> None:
    fuse_depthwise_separable()
