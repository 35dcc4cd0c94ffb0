"""Builds the test programs of the kernel headers, which know nothing of Inductor.

What was built, or found to compile, is kept in pytest's cache folder, by a digest of all that it was made from: the
compiler, its flags, the source and the headers that it includes. CI may keep that folder too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import inductor_vision
import pytest
import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths, library_paths

HEADERS = pathlib.Path(inductor_vision.__file__).parent / "lowering" / "cpp"

# A torch header computes (1 << 31) - 1 as int.
_UNDEFINED_IN_TORCH = "signed-integer-overflow:vec512_bfloat16.h\n"

_RUN_ENVIRONMENT = {
    # Fresh memory is NaN; waiting threads leave the cores to others.
    "ASAN_OPTIONS": "malloc_fill_byte=255:max_malloc_fill_size=1000000000:detect_stack_use_after_return=1",
    "OMP_WAIT_POLICY": "passive",
}


@dataclasses.dataclass(frozen=True)
class Capability:
    """A set of vector instructions to compile for, with the flags that Inductor gives.

    Attributes:
        name: what torch.backends.cpu.get_cpu_capability() calls it; "DEFAULT": at::vec in plain C++.
        lanes: floats in a vector.
    """

    name: str
    lanes: int
    flags: tuple[str, ...] = ()

    def skip_unless_it_runs_here(self) -> None:
        if self.name == "DEFAULT":
            return
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip(f"{self.name} is for x86-64, this machine is {platform.machine()}")
        order = ["DEFAULT", "AVX2", "AVX512"]
        here = torch.backends.cpu.get_cpu_capability()
        if here not in order or order.index(here) < order.index(self.name):
            pytest.skip(f"this CPU has no {self.name}, only {here}")


CAPABILITIES = {
    "AVX-512": Capability("AVX512", 16, ("-march=native", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512")),
    "AVX2": Capability("AVX2", 8, ("-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2")),
    "no vector instructions": Capability("DEFAULT", 8),
}

# Not in the table above: few CPUs run it.
BF16_DOT_PRODUCTS = Capability(
    "AVX512",
    16,
    (
        *(f"-mavx512{part}" for part in ("f", "dq", "vl", "bw", "bf16")),
        *("-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ),
)

_COMMON = ("-std=c++17", "-fopenmp", f"-I{HEADERS}", *(f"-isystem{path}" for path in include_paths()))
# What Inductor's math flags come to, without those that cancel each other.
_MATH = ("-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=off", "-fno-tree-loop-vectorize")
_SANITIZED = (
    "-g1",
    "-fsanitize=address,undefined,float-cast-overflow",
    # These are half of the time of compilation. What is read or written by a wrong pointer AddressSanitizer sees, and
    # instructions that want an alignment fault without it.
    "-fno-sanitize=alignment,pointer-overflow,null,object-size,vptr,nonnull-attribute,returns-nonnull-attribute",
    "-fno-sanitize-recover=all",
    "-fsanitize-recover=signed-integer-overflow",  # only what may continue can be excused, see UBSAN_OPTIONS
    "--param=asan-instrumentation-with-call-threshold=0",  # compiles in two thirds of the time
)


def _run(command: Sequence[str | os.PathLike], **environment: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env={**os.environ, **environment}, timeout=600
    )
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
    return result.stdout


def _compiler(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@functools.cache
def _texts(source: pathlib.Path) -> bytes:
    """A source and the headers of this package and its tests that it includes, one after the other."""
    text = source.read_bytes()
    for name in re.findall(rb'^ *# *include "([^"]+)"', text, flags=re.MULTILINE):
        beside, kernel = source.with_name(name.decode()), HEADERS / name.decode()
        text += _texts(beside if beside.exists() else kernel)
    return text


def _made_once(
    kept: pathlib.Path,
    name: str,
    compiler: str,
    source: pathlib.Path,
    flags: Sequence[str],
    libraries: Sequence[str] = (),
) -> pathlib.Path:
    """What a compiler makes of a source, or made of it in a run before.

    The next version of a file takes the place of the last of the same name.
    """
    path = _compiler(compiler)
    target = (flag for flag in flags if flag.startswith("-m"))
    compiler_and_machine = _run(
        [path, *target, "-dM", "-E", "-xc++", os.devnull]
    )  # -march=native is not the same for all
    made_from = "\0".join([compiler_and_machine, torch.__version__, *flags, *libraries]).encode() + _texts(source)
    made = kept / f"{name}-{hashlib.sha256(made_from).hexdigest()[:16]}"
    with FileLock(kept / f"{name}.lock"):
        if not made.exists():
            for last in kept.glob(f"{name}-*"):
                last.unlink()
            unfinished = kept / f"{name}.unfinished"
            _run([path, *flags, source, "-o", unfinished, *libraries])
            unfinished.touch()  # which -fsyntax-only does not
            unfinished.rename(made)
    return made


def build(kept: pathlib.Path, source: pathlib.Path, capability: Capability, *flags: str) -> pathlib.Path:
    """The program of a source, with the math flags that Inductor gives."""
    paths = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    flags = (*_COMMON, *_MATH, *flags, *capability.flags)
    libraries = [*paths, "-lc10", "-Wl,--as-needed", "-ltorch_cpu"]
    return _made_once(kept, f"{source.stem}-{capability.name}", "g++", source, flags, libraries)


def build_sanitized(
    kept: pathlib.Path, source: pathlib.Path, capability: Capability, optimization: str
) -> pathlib.Path:
    """:func:`build` with AddressSanitizer and UndefinedBehaviorSanitizer."""
    # g++ 12.2 takes the frames that find uses after a return for aligned to 64 bytes, which they are to 32.
    frames = ("--param=asan-use-after-return=0",) if capability.lanes == 16 else ()
    return build(kept, source, capability, optimization, *_SANITIZED, *frames)


@contextlib.contextmanager
def sanitized_programs(
    request: pytest.FixtureRequest, kept: pathlib.Path, source: pathlib.Path, optimization: str
) -> Iterator[Callable[[str], pathlib.Path]]:
    """The program of a source for a capability, by the name of that, for a fixture called ``program``.

    All that this session needs, for tests that are parametrized by ``name``, are built at once, on two cores.
    """

    def build(name: str) -> pathlib.Path:
        CAPABILITIES[name].skip_unless_it_runs_here()
        return build_sanitized(kept, source, CAPABILITIES[name], optimization)

    wanted = [
        item.callspec.params["name"]
        for item in request.session.items
        if "program" in item.fixturenames and item.path == request.path
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        builds = {name: pool.submit(build, name) for name in wanted}
        yield lambda name: builds[name].result()


def run(program: pathlib.Path, *args: str, **environment: str) -> dict[str, float]:
    """Run it; the figures ``name=number`` that it prints."""
    output = _run([program, *args], **_RUN_ENVIRONMENT, **environment)
    return {name: float(value) for name, _, value in (word.partition("=") for word in output.split())}


def run_sanitized(program: pathlib.Path, *args: str) -> dict[str, float]:
    """:func:`run` what was built with sanitizers."""
    with tempfile.NamedTemporaryFile("w", suffix=".supp") as excused:
        excused.write(_UNDEFINED_IN_TORCH)
        excused.flush()
        return run(program, *args, UBSAN_OPTIONS=f"halt_on_error=1:print_stacktrace=1:suppressions={excused.name}")


def compile_only(
    kept: pathlib.Path, compiler: str, source: pathlib.Path, capability: Capability, *flags: str
) -> pathlib.Path:
    """Compile without running, warnings being errors; the ``flags`` say what to: a program, a header, or nothing."""
    probe = subprocess.run(
        [_compiler(compiler), "-fopenmp", "-E", "-xc++", "-"], input="#include <omp.h>", text=True, capture_output=True
    )
    if probe.returncode != 0:
        pytest.skip(f"{compiler} is installed without its OpenMP runtime (clang++: libomp-dev)")
    flags = (*_COMMON, "-Wall", "-Wextra", "-Werror", *capability.flags, *flags)
    return _made_once(kept, f"{compiler}-{source.stem}-{capability.name}", compiler, source, flags)
