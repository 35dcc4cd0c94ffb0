"""Switches of what is compiled, each undone when a test has ended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.compiler.config
from inductor_vision import accelerate_sampling, fuse_depthwise_separable
from inductor_vision.lowering.installation import installer
from inductor_vision.ops.registry import ATEN


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


@pytest.fixture
def sampling(monkeypatch) -> Iterator[None]:
    """accelerate_sampling()."""
    from torch._inductor.decomposition import decompositions, fast_random_decomps

    monkeypatch.setattr(installer, "_sampling", False)
    tables = [decompositions, *(overload.py_kernels for overload in ATEN)]
    before = [table.copy() for table in tables]
    with torch.compiler.config.patch(cache_key_tag="before"):
        accelerate_sampling()
        yield
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)
    for overload in ATEN:
        overload._dispatch_cache.clear()
    fast_random_decomps.cache_clear()
