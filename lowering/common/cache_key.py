"""What Inductor's caches on disk are told of this package, whose sources and decisions they do not see."""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any

import torch
import torch.compiler.config

from ...ops.registry import NAMESPACE
from ...version import __version__
from .machine import cache_bytes_here, instructions_here

_PACKAGE = pathlib.Path(__file__).parents[2]

# The sources that decide what a graph is compiled to, folders in folders too.
SOURCES = (("ops", "*.py"), ("integrations", "*.py"), ("lowering", "*.py"), ("lowering", "*.h"))


def source_digest() -> str:
    """Digest of all these sources: a changed kernel must not be answered from a cache."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.relative_to(_PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def source_files() -> list[pathlib.Path]:
    """The files of :data:`SOURCES`."""
    return [path for folder, pattern in SOURCES for path in sorted((_PACKAGE / folder).rglob(pattern))]


# What else code is generated for is among Inductor's settings, which are in its keys.
TAG = f"{NAMESPACE}-{__version__}-{source_digest()}-{instructions_here()}-{cache_bytes_here()}"


def tag_caches(tag: str = TAG) -> None:
    """Make a tag part of the keys of Inductor's caches on disk, both that of graphs and that of AOTAutograd.

    It goes to two places. ``torch.compiler.config.cache_key_tag`` is public, but whoever assigns to it drops what was
    there. The passes of backends, whose ``uuid()`` is in the keys too, are left alone by users, but private.
    """
    tags = [tag for tag in torch.compiler.config.cache_key_tag.split("+") if tag]
    if tag not in tags:
        torch.compiler.config.cache_key_tag = "+".join([*tags, tag])
    passes = backend_passes()
    passes[NAMESPACE] = _nothing_but_a_key(sorted({tag, *passes[NAMESPACE].uuid()} if NAMESPACE in passes else {tag}))


def backend_passes() -> dict[str, Any]:
    """Inductor's passes by the kind of device whose graphs they are for. Where a newer torch has none, the public tag
    must do."""
    from ..inductor.tables import codegen_common

    return getattr(codegen_common, "custom_backend_passes", {})


def _nothing_but_a_key(key: list[str]) -> Any:
    from ..inductor.tables import custom_graph_pass

    class Key(custom_graph_pass.CustomGraphModulePass):
        def __call__(self, gm: torch.fx.GraphModule) -> None:
            """Never called: there are no devices of this package's name."""

        def uuid(self) -> list[str]:
            return key

    return Key()
