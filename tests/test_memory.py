"""keep_memory(): what a process frees, it uses again; where that cannot be had, it says so."""

import shutil
import subprocess
import sys

import pytest
from inductor_vision import keep_memory, memory
from inductor_vision.tests.support.compiled import run_python

# Page faults of four calls that each make and free 2 blocks of 40 MB, after some that have touched the memory.
FAULTS = """
import resource, sys, threading
import torch
import inductor_vision

torch.set_num_threads(2)
kept = inductor_vision.keep_memory() if "keep" in sys.argv else None

def call():
    return sum(block.sum().item() for block in [torch.ones(10 << 20) for _ in range(2)])

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def measure():
    for _ in range(8):  # the heap takes a few calls to find its form
        call()
    before = faults()
    for _ in range(4):
        assert call() == 2 * (10 << 20)
    print(kept, faults() - before)

measure()
thread = threading.Thread(target=measure)
thread.start()
thread.join()
"""

PAGES = 4 * 2 * (40 << 20) // 4096

needs_glibc = pytest.mark.skipif(memory.why_not_glibc() is not None, reason="malloc is not glibc's")


def run(*arguments: str) -> list[tuple[str, int]]:
    """What was returned, and the page faults, of the main thread and of another one."""
    printed = run_python(FAULTS, *arguments).split()
    return [(kept, int(faults)) for kept, faults in zip(printed[::2], printed[1::2])]


@needs_glibc
def test_memory_is_used_again():
    for kept, faults in run("keep"):
        assert kept == "True"
        assert faults < PAGES // 10
    assert all(faults > PAGES // 2 for _, faults in run()), "nothing needs to be kept here"


OTHER_MALLOC = """
#include <stddef.h>
void* __libc_malloc(size_t);
void* malloc(size_t size) { return __libc_malloc(size); }
"""


@needs_glibc
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_other_malloc_is_named(tmp_path):
    source, library = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text(OTHER_MALLOC)
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library], check=True)
    program = "import inductor_vision, logging; logging.basicConfig(stream=__import__('sys').stdout)\n"
    printed = run_python(f"{program}print(inductor_vision.keep_memory())", LD_PRELOAD=str(library))
    assert printed.splitlines()[-1] == "False"
    assert "no effect" in printed and str(library) in printed


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems(platform, caplog, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    assert keep_memory() is False
    assert platform in caplog.text and "no effect" in caplog.text
