"""``python -m inductor_vision.doctor``: does this machine run compiled kernels as fast as it could?

Nothing is assumed. The doctor compiles a kernel without caches and reports what it observes: the instructions in its
machine code, its time on one thread and on all, the OpenMP runtimes that are loaded after it has run. The exit status
is non-zero if something is wrong, and each such line says what to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import mmap
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from .memory import why_not_glibc
from .ops.deform_conv2d import DeformConv2d
from .paths import recorded_paths
from .version import NEWEST_TORCH, OLDEST_TORCH, __version__, tested_torch


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``status`` is ``"ok"``, ``"warn"`` or ``"fail"``; only the last is an error."""

    name: str
    status: str
    found: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A deformable convolution that was compiled here and now."""

    run: Callable[[], Any]
    eager: Callable[[], Any]  # computes the same, uncompiled
    seconds: float  # that compiling it took
    path: str  # "template", "decomposition" or "eager", see paths.py
    detail: str
    libraries: list[pathlib.Path]


def check_versions() -> Check:
    """Versions of everything that takes part."""
    try:
        triton = f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        triton = "no triton (not needed)"
    python = f"Python {platform.python_version()}"
    found = f"inductor_vision {__version__}, torch {torch.__version__}, {python}, {triton}"
    if _release(torch.__version__) < _release(OLDEST_TORCH):
        return Check("versions", "fail", found, f"install a newer torch: pip install 'torch>={OLDEST_TORCH}'")
    if _release(torch.__version__) > _release(NEWEST_TORCH):
        remedy = f"{tested_torch()}: compare compiled results with eager ones, or use a newer inductor_vision"
        return Check("versions", "warn", found, remedy)
    return Check("versions", "ok", found)


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def check_operators() -> Check:
    """The operators are registered with Inductor, which has everything that their kernels need."""
    from .lowering.installation.installer import require_lowerings

    try:
        require_lowerings("doctor")
    except RuntimeError as error:
        remedy = "use a torch that this release of inductor_vision is tested with, or a newer inductor_vision"
        return Check("operators", "fail", str(error), remedy)
    return Check("operators", "ok", "registered with Inductor")


def usable_cores() -> int:
    """Physical cores that this process may run on."""
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(logical, torch.cpu.get_capabilities().get("num_physical_cores") or logical)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _core_quota() -> float | None:
    """Cores' worth of time that a container's limit leaves to this process."""
    try:
        quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def check_processor() -> Check:
    """Model, cores, caches, and how many threads torch will use."""
    capabilities = torch.cpu.get_capabilities()
    cores, threads, quota = usable_cores(), torch.get_num_threads(), _core_quota()
    found = f"{capabilities.get('cpu_name', platform.processor() or platform.machine())}, {_count(cores, 'core')}"
    for name, key in (("L1d", "l1d_cache_size"), ("L2", "l2_cache_size")):
        if capabilities.get(key):
            found += f", {name} {capabilities[key] // 1024} KiB"
    found += f", torch uses {_count(threads, 'thread')}"
    if quota is not None and quota < threads:
        remedy = f"the container's limit leaves {quota:g} cores to {threads} threads: raise it, or set OMP_NUM_THREADS"
        return Check("processor", "warn", found, remedy)
    if threads == 1 < cores:
        return Check("processor", "warn", found, "unset OMP_NUM_THREADS, or call torch.set_num_threads")
    return Check("processor", "ok", found)


def check_bf16() -> Check:
    """Whether the CPU multiplies bfloat16 natively; without, bfloat16 saves memory but no time."""
    capabilities = torch.cpu.get_capabilities()
    have = [name for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16") if capabilities.get(name)]
    return Check("bf16", "ok", f"dot products: {', '.join(have)}" if have else "no dot products: as slow as float32")


def find_compiler() -> str:
    """The C++ compiler that Inductor will call. Raises RuntimeError if there is none."""
    from .lowering.inductor.codegen import get_cpp_compiler

    return get_cpp_compiler()


def check_compiler() -> Check:
    """The compiler is there and says its version."""
    try:
        compiler = find_compiler()
        version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        wanted = os.environ.get("CXX", "g++")
        remedy = "install g++ (Debian, Ubuntu: apt install g++), or let CXX name the one that is there"
        return Check("compiler", "fail", f"{wanted} cannot be run", remedy)
    return Check("compiler", "ok", f"{shutil.which(compiler) or compiler}: {version.splitlines()[0]}")


OPENMP_PROGRAM = """
#include <omp.h>
#include <cstdio>
int main() {
  int threads = 0;
  #pragma omp parallel reduction(+ : threads)
  threads += 1;
  std::printf("%d", threads);
}
"""


def check_openmp() -> Check:
    """The compiler builds OpenMP programs, and they start as many threads as there are cores."""
    cores = usable_cores()
    with tempfile.TemporaryDirectory() as folder:
        source, program = pathlib.Path(folder, "threads.cpp"), pathlib.Path(folder, "threads")
        source.write_text(OPENMP_PROGRAM)
        try:
            command = [find_compiler(), "-fopenmp", str(source), "-o", str(program)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
            threads = int(subprocess.run([program], check=True, capture_output=True, text=True, env=environment).stdout)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            remedy = "install g++ with its OpenMP runtime, libgomp, and let CXX name it; that of clang++ is another one"
            return Check("openmp", "fail", f"an OpenMP program does not build or run: {_last_line(error)}", remedy)
    if threads < cores:
        remedy = "unset OMP_THREAD_LIMIT and OMP_DYNAMIC, or raise the limit on processes (ulimit -u)"
        return Check("openmp", "fail", f"a program got {_count(threads, 'thread')} on {cores} cores", remedy)
    return Check("openmp", "ok", f"a program got {_count(threads, 'thread')}")


def _last_line(error: BaseException) -> str:
    text = getattr(error, "stderr", None) or str(error) or type(error).__name__
    errors = [line.strip() for line in text.splitlines() if "error" in line.lower()]
    return (errors or text.strip().splitlines())[0][:200]


def compile_kernel(folder: pathlib.Path) -> Kernel:
    """Compile a deformable convolution; ``folder`` is where Inductor puts what it builds."""
    torch.manual_seed(0)
    module = DeformConv2d(128, 128, 3, padding=1).eval()
    image, offset, mask = torch.randn(1, 128, 64, 64), torch.randn(1, 18, 64, 64), torch.rand(1, 9, 64, 64)
    # With its guards Dynamo would compile anew for another number of threads; this very kernel is to be measured.
    compiled = torch.compile(module, options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe})

    @torch.no_grad()
    def run() -> Any:
        return compiled(image, offset, mask)

    @torch.no_grad()
    def eager() -> Any:
        return module(image, offset, mask)

    start = time.perf_counter()
    with recorded_paths() as paths:
        run()
    seconds = time.perf_counter() - start
    path, detail = (paths[-1].kind, paths[-1].detail) if paths else ("unknown", "")
    return Kernel(run, eager, seconds, path, detail, sorted(folder.rglob("*.so")))


def check_kernel(folder: pathlib.Path) -> tuple[Check, Kernel | None]:
    """A deformable convolution compiles, and takes its fast path."""
    try:
        kernel = compile_kernel(folder)
    except Exception as error:  # whatever breaks a compilation is what this check is to report
        remedy = "see the compiler's message with TORCH_LOGS=+inductor"
        if "Python.h" in str(error):
            remedy = "install Python's headers (Debian, Ubuntu: apt install python3-dev)"
        return Check("kernel", "fail", f"deform_conv2d does not compile: {_last_line(error)}", remedy), None
    found = f"deform_conv2d compiled in {kernel.seconds:.0f} s, path: {kernel.path}"
    if kernel.path == "template":
        return Check("kernel", "ok", found), kernel
    return Check("kernel", "fail", found, f"the fast path refused: {kernel.detail}"), kernel


# What the registers of each instruction set look like in a disassembly.
REGISTERS = {"avx512": r"%zmm\d", "avx2": r"%ymm\d", "asimd": r"\b(v\d+\.\d+|z\d+\.)[bhsd]\b"}


def count_vector_instructions(libraries: list[pathlib.Path], isa: str) -> int | None:
    """Instructions of the compiled code that touch a vector register; None if that cannot be seen."""
    objdump = shutil.which("objdump")
    pattern = next((pattern for name, pattern in REGISTERS.items() if name in isa), None)
    if objdump is None or pattern is None or not libraries:
        return None
    count = 0
    for library in libraries:
        code = subprocess.run([objdump, "-d", str(library)], capture_output=True, text=True).stdout
        count += sum(1 for line in code.splitlines() if re.search(pattern, line))
    return count


def picked_isa() -> str:
    """The vector instructions that Inductor compiles for; empty if none."""
    from .lowering.inductor.codegen import pick_vec_isa

    isa = pick_vec_isa()
    return str(isa) if isa else ""


def check_vectors(kernel: Kernel | None) -> Check:
    """The kernel was compiled to vector instructions, and to the widest that the CPU has."""
    if kernel is None:
        return Check("vectors", "warn", "not measured: no kernel", "first mend what is above")
    isa = picked_isa()
    remedy = "unset ATEN_CPU_CAPABILITY, leave torch._inductor.config.cpp.simdlen alone, and use a recent compiler"
    if not isa:
        return Check("vectors", "fail", "scalar code: Inductor picked no vector instructions", remedy)
    count = count_vector_instructions(kernel.libraries, isa)
    if count is None:
        return Check(
            "vectors", "warn", f"{isa}; not seen in the machine code", "install objdump (apt install binutils)"
        )
    found = f"{isa}: {count} such instructions in the compiled kernel"
    if count == 0:
        return Check("vectors", "fail", found, remedy)
    capabilities = torch.cpu.get_capabilities()
    if "avx2" in isa and all(capabilities.get(f"avx512_{part}") for part in ("f", "bw", "dq", "vl")):
        return Check("vectors", "warn", f"{found}; the CPU has AVX-512", remedy)
    return Check("vectors", "ok", found)


def compile_sum() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A sum as Inductor compiles it without this package, for any number of threads, and as it is in eager mode."""
    torch.manual_seed(0)
    numbers = torch.rand(1 << 18, dtype=torch.float64)

    def eager() -> Any:
        return (numbers * numbers).sum()

    options: dict[str, Any] = {"cpp.dynamic_threads": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    return torch.compile(eager, options=options), eager


def check_values(kernel: Kernel | None) -> Check:
    """Compiled code computes what eager mode does: this package's kernel, and a sum that is Inductor's alone."""
    if kernel is None:
        return Check("values", "warn", "not compared: no kernel", "first mend what is above")
    before = torch.get_num_threads()
    try:
        for name, compiled, eager in (("a sum", *compile_sum()), ("deform_conv2d", kernel.run, kernel.eager)):
            torch.set_num_threads(1)
            expected = eager()
            for threads in (1, 2):
                torch.set_num_threads(threads)
                error = ((compiled() - expected).abs().max() / expected.abs().max()).item()
                if not error < 1e-3:  # NaN is none of these
                    found = (
                        f"compiled on {_count(threads, 'thread')}, {name} is off by {error:.2g} of its largest value"
                    )
                    return Check("values", "fail", found, _remedy_of_values(loaded_openmp_runtimes() or []))
    finally:
        torch.set_num_threads(before)
    return Check("values", "ok", "on one thread and on two, a sum and deform_conv2d are what they are in eager mode")


def _remedy_of_values(runtimes: list[str]) -> str:
    if len(runtimes) < 2:
        return "compile with another compiler or release of it (CXX), and report what was found"
    return (
        f"{' and '.join(runtimes)} do not know each other's threads, as with clang++ beside a torch that uses libgomp: "
        "compile with g++ (CXX=g++), or preload the compiler's runtime (LD_PRELOAD)"
    )


def measure_scaling(run: Callable[[], Any], threads: int, rounds: int = 20) -> tuple[float, float]:
    """Seconds on one thread and on ``threads``: the best of ``rounds``, sides interleaved."""
    before, best = torch.get_num_threads(), {1: float("inf"), threads: float("inf")}
    try:
        for count in list(best) * rounds:
            torch.set_num_threads(count)
            run()
            start = time.perf_counter()
            run()
            best[count] = min(best[count], time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return best[1], best[threads]


def _seconds_of_others() -> float:
    """CPU time that the machine has spent on all but this process, from a fixed point; 0 if it does not say."""
    try:
        user, nice, system, _, _, *rest = map(int, pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def check_threads(kernel: Kernel | None) -> Check:
    """The kernel is faster on all cores than on one."""
    cores = usable_cores()
    if cores == 1:
        return Check("threads", "ok", "only one core")
    if kernel is None:
        return Check("threads", "warn", "not measured: no kernel", "first mend what is above")
    start, others = time.perf_counter(), _seconds_of_others()
    one, all_cores = measure_scaling(kernel.run, cores)
    others = (_seconds_of_others() - others) / (time.perf_counter() - start)
    speedup = one / all_cores
    found = f"{speedup:.2f}x faster on {cores} threads than on one ({1e3 * one:.1f} ms, {1e3 * all_cores:.1f} ms)"
    if speedup > max(1.2, cores / 4):
        return Check("threads", "ok", found)
    if others > (os.cpu_count() or 1) - cores + 0.3:
        remedy = f"run this again when other programs are quiet: they kept {others:.1f} cores busy meanwhile"
        return Check("threads", "warn", found, remedy)
    remedy = "check OMP_PROC_BIND, GOMP_CPU_AFFINITY, and the container's CPU limit"
    return Check("threads", "fail" if speedup < 1.2 else "warn", found, remedy)


def loaded_openmp_runtimes() -> list[str] | None:
    """Paths of the OpenMP runtimes in this process; None if the system does not say."""
    try:
        maps = pathlib.Path("/proc/self/maps").read_text()
    except OSError:
        return None
    files = {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    return sorted(file for file in files if re.match(r"lib([gi]?omp|omp\d)\d?[-.]", os.path.basename(file)))


def check_runtimes() -> Check:
    """One OpenMP runtime is loaded: two have a pool of threads each, and may compute wrong values, see check_values."""
    runtimes = loaded_openmp_runtimes()
    if runtimes is None:
        return Check("runtimes", "ok", "unknown on this system")
    found = ", ".join(runtimes) or "none"
    if not runtimes:
        return Check("runtimes", "fail", "no OpenMP runtime is loaded", "install a build of torch with OpenMP")
    if len(runtimes) > 1:
        remedy = "several OpenMP runtimes: use torch's compiler (CXX=g++), unless one was preloaded to take all calls"
        return Check("runtimes", "warn", found, remedy)
    return Check("runtimes", "ok", found)


def measure_fresh_page(megabytes: int = 16, rounds: int = 4) -> float:
    """Seconds that the first use of a page costs more than the next: the best of ``rounds``."""
    pages, best = (megabytes << 20) // mmap.PAGESIZE, [float("inf")] * 2
    for _ in range(rounds):
        with mmap.mmap(-1, megabytes << 20) as block:  # such as malloc makes for a large block
            for use in (0, 1):
                start = time.perf_counter()
                for position in range(0, len(block), mmap.PAGESIZE):
                    block[position] = 1
                best[use] = min(best[use], time.perf_counter() - start)
    return max(0.0, best[0] - best[1]) / pages


def check_memory() -> Check:
    """What it costs that memory which a model has freed goes back to the system."""
    seconds = measure_fresh_page()
    hundred = 1e3 * seconds * ((100 << 20) // mmap.PAGESIZE)
    found = f"a fresh page costs {1e6 * seconds:.2f} us, {hundred:.0f} ms in 100 MB"
    if why_not_glibc() is None:
        found += "; inductor_vision.keep_memory() saves that from the second call of a model on"
    return Check("memory", "ok", found)


def examine() -> Iterator[Check]:
    """All checks, each as soon as it is done."""
    yield check_versions()
    yield check_processor()
    yield check_bf16()
    yield check_memory()
    operators = check_operators()
    yield operators
    if operators.status == "fail":
        return  # there are no kernels to look at
    compiler = check_compiler()
    yield compiler
    kernel = None
    with (
        tempfile.TemporaryDirectory(prefix="inductor-vision-doctor-") as folder,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        if compiler.status != "fail":
            yield check_openmp()
            check, kernel = check_kernel(pathlib.Path(folder))
            yield check
        yield check_values(kernel)
        yield check_vectors(kernel)
        yield check_threads(kernel)
    yield check_runtimes()


def show(check: Check) -> None:
    label = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}[check.status]
    print(f"{label:5} {check.name:10} {check.found}", flush=True)
    if check.remedy:
        print(f"{'':16} -> {check.remedy}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m inductor_vision.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    arguments = parser.parse_args(argv)
    checks = []
    for check in examine():
        checks.append(check)
        if not arguments.json:
            show(check)
    failed, warned = ([check.name for check in checks if check.status == status] for status in ("fail", "warn"))
    if arguments.json:
        print(json.dumps({"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    elif failed:
        print(f"\nto mend: {', '.join(failed)}")
    else:
        print(f"\nnothing is broken; look at: {', '.join(warned)}" if warned else "\nall is well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
