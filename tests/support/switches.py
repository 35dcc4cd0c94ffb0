"""Undoing what a test switches on for all of its process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch.compiler.config
from inductor_vision.lowering.installation import installer
from inductor_vision.ops.registry import ATEN

# What is off as long as nobody has called the functions of this package that switch passes on.
_PASSES = {"_fuse_depthwise_separable": False, "_fold_norms": False, "_winograd": None, "_direct": False}


@contextlib.contextmanager
def passes_switched_off_again() -> Iterator[None]:
    """Within it no pass over graphs is on, but those that are switched on there; afterwards it is as it was."""
    from torch._inductor import config

    with (
        patch.multiple(installer, **_PASSES),
        config.patch(pre_grad_custom_pass=None, joint_custom_pre_pass=None),
    ):
        yield


@contextlib.contextmanager
def sampling_switched_off_again() -> Iterator[None]:
    """Within it accelerate_sampling() may be called; afterwards aten's operators are Inductor's again."""
    from torch._inductor.decomposition import decompositions, fast_random_decomps

    tables = [decompositions, *(overload.py_kernels for overload in ATEN)]
    before = [table.copy() for table in tables]
    tag = torch.compiler.config.cache_key_tag
    with patch.object(installer, "_sampling", False), torch.compiler.config.patch(cache_key_tag=tag):
        yield
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)
    for overload in ATEN:
        overload._dispatch_cache.clear()
    fast_random_decomps.cache_clear()
