"""No stale kernel is served: what decides the code is part of the keys of both of Inductor's caches."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import re
import shutil
from typing import Any

import inductor_vision
import pytest
import torch
from inductor_vision.lowering.common import cache_key
from inductor_vision.tests.support.compiled import run_python

PACKAGE = pathlib.Path(inductor_vision.__file__).parent


def key_of_a_graph() -> bytes:
    """That AOTAutograd's cache has the same in its key, and that both look it up, is seen below."""
    from torch._inductor import codecache, lowering  # noqa: F401  (lowering: has the operators installed)

    return pickle.dumps(codecache.FxGraphHashDetails(torch.fx.GraphModule({}, torch.fx.Graph()), [], {}, []))


def test_every_source_is_in_the_digest():
    """Also those of new folders: whoever adds one need not think of it."""
    folders = [PACKAGE / name for name in ("ops", "integrations", "lowering")]
    sources = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".h")]
    assert {"common", "cpp", "inductor", "passes", "triton", "workarounds"} <= {path.parent.name for path in sources}
    assert sorted(cache_key.source_files()) == sorted(sources)


def test_a_tag_that_is_assigned_does_not_drop_the_key():
    with torch.compiler.config.patch(cache_key_tag="mine"):
        assert cache_key.TAG.encode() in key_of_a_graph()


def test_tags_are_added(monkeypatch):
    key_of_a_graph()
    before = cache_key.backend_passes().copy()
    with torch.compiler.config.patch(cache_key_tag="mine"):
        try:
            for tag in ("b tag", "another", "b tag"):
                cache_key.tag_caches(tag)
            assert torch.compiler.config.cache_key_tag == "mine+b tag+another"
            torch.compiler.config.cache_key_tag = ""
            key = key_of_a_graph()
            assert all(tag.encode() in key for tag in ("b tag", "another", cache_key.TAG))
        finally:
            cache_key.backend_passes().update(before)


def test_the_public_tag_does_where_the_private_place_is_gone(monkeypatch):
    key_of_a_graph()
    with torch.compiler.config.patch(cache_key_tag="mine"), monkeypatch.context() as gone:
        gone.delattr("torch._inductor.codegen.common.custom_backend_passes")
        cache_key.tag_caches()
        assert torch.compiler.config.cache_key_tag == f"mine+{cache_key.TAG}"


@pytest.mark.parametrize("capability", ["l2_cache_size", "avx512_bf16"])
def test_what_decides_the_code_is_in_the_tag(capability, monkeypatch):
    """Block sizes follow from the cache; the order of weights from the vector instructions."""
    known = torch.cpu.get_capabilities()
    changed = 123 << 10 if capability == "l2_cache_size" else not known.get(capability, False)
    program = f"""
import torch
known = torch.cpu.get_capabilities()
torch.cpu.get_capabilities = lambda: {{**known, {capability!r}: {changed!r}}}
from inductor_vision.lowering.common import cache_key
print(cache_key.TAG)
"""
    changed_tag = run_python(program).strip()
    assert changed_tag != cache_key.TAG
    for same in (inductor_vision.__version__, cache_key.source_digest()):
        assert same in changed_tag and same in cache_key.TAG


COMPILE = """
import json, sys
import torch

import torch._inductor.lowering
import torch._functorch.config
from torch._dynamo.utils import counters
import inductor_vision

assert inductor_vision.__file__.startswith(sys.argv[1]), inductor_vision.__file__
torch.compiler.config.cache_key_tag = "mine"  # drops what was there
torch.manual_seed(0)
x, weight, bias = torch.randn(1, 4, 5, 6), torch.randn(4, 4, 3, 3), torch.tensor([1000.0, 2000.0, 3000.0, 4000.0])

def ours(x, w, b):
    return inductor_vision.deform_conv2d(x, torch.zeros(1, 18, 5, 6), w, b, padding=1)

def theirs(x, w, b):
    return torch.conv2d(x, w, b).relu()

def compile_and_run(program, autograd_cache):
    torch._dynamo.reset()
    counters.clear()
    with torch._functorch.config.patch(enable_autograd_cache=autograd_cache):
        result = torch.compile(program)(x, weight, bias)
    cache, what = ("aot_autograd", "autograd") if autograd_cache else ("inductor", "fxgraph")
    return counters[cache][what + "_cache_hit"] == 1, result.mean((0, 2, 3)).div(1000).round().tolist()

# In this order, as what AOTAutograd's cache does not have is looked up in that of graphs, and left there.
calls = [compile_and_run(program, autograd_cache) for autograd_cache in (False, True) for program in (ours, theirs)]
hits, biases = zip(*calls)
print(json.dumps({"hits": hits, "biases": biases[::2]}))
"""


def edit(path: pathlib.Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text())
    assert count == 1, f"{path.name} has {count} places that look like {pattern}"
    path.write_text(text)


@pytest.fixture
def copied_package(tmp_path) -> pathlib.Path:
    """A copy of the package's sources, to change."""
    package = tmp_path / "inductor_vision"
    package.mkdir()
    for name in sorted({folder.partition("/")[0] for folder, _ in cache_key.SOURCES}):
        shutil.copytree(PACKAGE / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in PACKAGE.glob("*.py"):
        shutil.copy(path, package)
    return package


@pytest.mark.slow
def test_no_stale_kernel_is_served(copied_package, tmp_path):
    def run() -> tuple[list[bool], list[Any]]:
        printed = run_python(
            COMPILE,
            str(tmp_path),
            PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
        )
        found = json.loads(printed)
        return found["hits"], found["biases"]

    miss, hit = [False] * 4, [True] * 4  # in both caches, of this package's operators and of torch's
    once, twice = [[1, 2, 3, 4]] * 2, [[2, 4, 6, 8]] * 2
    assert run() == (miss, once)
    assert run() == (hit, once)
    edit(copied_package / "lowering/cpp/deform_conv2d.h", r"\(op_\.bias\[o\]\)", "(2 * op_.bias[o])")
    assert run() == (miss, twice)
