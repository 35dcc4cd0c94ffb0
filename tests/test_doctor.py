"""The doctor finds what is off, says what to do, and says so in its exit status."""

import json
import os
import pathlib
import platform
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch
from inductor_vision import doctor
from inductor_vision.doctor import Check, Kernel
from inductor_vision.lowering.installation import installer
from inductor_vision.tests.support.compiled import run_python
from inductor_vision.version import NEWEST_TORCH, OLDEST_TORCH


def kernel(run=lambda: None, eager=lambda: None, path="template", libraries=()) -> Kernel:
    return Kernel(run, eager, seconds=1.0, path=path, detail="", libraries=list(libraries))


def run_doctor(**environment: str) -> tuple[int, dict[str, Check]]:
    command = [sys.executable, "-m", "inductor_vision.doctor", "--json"]
    environment = {**os.environ, **environment}
    for name in ("AOT_INDUCTOR_DEBUG_COMPILE", "TORCHINDUCTOR_VEC_ISA_OK"):  # as users run it
        environment.pop(name, None)
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    report = json.loads(result.stdout)
    assert report["ok"] == (result.returncode == 0)
    return result.returncode, {check["name"]: Check(**check) for check in report["checks"]}


def assert_off(check: Check, status: str = "fail") -> None:
    assert check.status == status, check
    assert check.remedy, check


def executable(path: pathlib.Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_no_compiler():
    status, checks = run_doctor(CXX="/nonexistent")
    assert status == 1
    assert_off(checks["compiler"])
    assert "/nonexistent" in checks["compiler"].found
    assert "g++" in checks["compiler"].remedy
    for name in ("values", "vectors", "threads"):
        assert checks[name].status == "warn" and "no kernel" in checks[name].found


@pytest.mark.slow
def test_this_machine_is_well():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status, checks = run_doctor()
    assert status == 0, checks
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert used.ru_utime - before.ru_utime < 60  # seconds, whatever else the machine does
    assert "path: template" in checks["kernel"].found


@pytest.mark.slow
def test_scalar_code():
    status, checks = run_doctor(ATEN_CPU_CAPABILITY="default")
    assert status == 1
    assert_off(checks["vectors"])
    assert "scalar" in checks["vectors"].found
    assert checks["kernel"].status == "ok"


def test_old_torch(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.9.1+cpu")
    check = doctor.check_versions()
    assert_off(check)
    assert "2.13" in check.remedy


def test_torch_that_is_newer_than_the_tests(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.99.0")
    check = doctor.check_versions()
    assert_off(check, "warn")
    assert f"tested with torch {OLDEST_TORCH} to {NEWEST_TORCH}" in check.remedy


def test_torch_that_the_operators_are_not_for(monkeypatch):
    import torch._inductor.lowering  # noqa: F401  (what it installs is not to undo the following)

    monkeypatch.setattr(installer, "_not_installed", "AttributeError: it has moved")
    *_, check = doctor.examine()
    assert_off(check)
    assert "it has moved" in check.found and "torch" in check.remedy


def test_one_thread_for_many_cores(monkeypatch):
    monkeypatch.setattr(doctor, "usable_cores", lambda: 4)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    check = doctor.check_processor()
    assert_off(check, "warn")
    assert "OMP_NUM_THREADS" in check.remedy


def test_container_limit(monkeypatch):
    monkeypatch.setattr(doctor, "_core_quota", lambda: 0.5)
    check = doctor.check_processor()
    assert_off(check, "warn")
    assert "0.5" in check.remedy


def test_compiler_that_breaks(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "find_compiler", lambda: executable(tmp_path / "c++", "exit 1"))
    assert_off(doctor.check_compiler())


def test_compiler_without_openmp(monkeypatch, tmp_path):
    script = "echo 'error: unsupported option -fopenmp' >&2; exit 1"
    monkeypatch.setattr(doctor, "find_compiler", lambda: executable(tmp_path / "c++", script))
    check = doctor.check_openmp()
    assert_off(check)
    assert "unsupported option -fopenmp" in check.found


def test_openmp_short_of_threads(monkeypatch):
    monkeypatch.setattr(doctor, "usable_cores", lambda: 2)
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    check = doctor.check_openmp()
    assert_off(check)
    assert "1 thread on 2 cores" in check.found


@pytest.mark.parametrize(
    ("message", "remedy"),
    [("fatal error: Python.h: No such file or directory", "python3-dev"), ("error: expected ';'", "TORCH_LOGS")],
)
def test_kernel_that_does_not_compile(monkeypatch, tmp_path, message, remedy):
    def compile_kernel(folder):
        raise RuntimeError(f"C++ compile error\n{message}\n")

    monkeypatch.setattr(doctor, "compile_kernel", compile_kernel)
    check, none = doctor.check_kernel(tmp_path)
    assert_off(check)
    assert none is None
    assert remedy in check.remedy


def test_kernel_off_its_fast_path(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "compile_kernel", lambda folder: kernel(path="decomposition"))
    check, _ = doctor.check_kernel(tmp_path)
    assert_off(check)
    assert "decomposition" in check.found


RUNTIMES = ["/a/libgomp.so.1", "/b/libomp.so.5"]


@pytest.mark.parametrize("wrong", ["a sum", "deform_conv2d", None])
@pytest.mark.parametrize("runtimes", [RUNTIMES, RUNTIMES[:1]])
def test_values_that_depend_on_threads(monkeypatch, wrong, runtimes):
    """As with two OpenMP runtimes, of which each takes both threads for the first."""

    def eager():
        return torch.tensor([3.0, 4.0])

    def half_is_lost():
        return eager() * (1 if torch.get_num_threads() == 1 else torch.tensor([1, 0.5]))

    def compiled(name):
        return half_is_lost if name == wrong else eager

    monkeypatch.setattr(doctor, "loaded_openmp_runtimes", lambda: runtimes)
    monkeypatch.setattr(doctor, "compile_sum", lambda: (compiled("a sum"), eager))
    before = torch.get_num_threads()
    check = doctor.check_values(kernel(compiled("deform_conv2d"), eager))
    assert torch.get_num_threads() == before
    if wrong is None:
        assert check.status == "ok"
        return
    assert_off(check)
    assert check.found == f"compiled on 2 threads, {wrong} is off by 0.5 of its largest value"
    assert ("CXX=g++" in check.remedy and RUNTIMES[1] in check.remedy) == (runtimes == RUNTIMES)


def test_values_that_are_not_numbers(monkeypatch):
    monkeypatch.setattr(doctor, "compile_sum", lambda: (lambda: torch.tensor(float("nan")), lambda: torch.tensor(1.0)))
    assert_off(doctor.check_values(kernel()))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
def test_clang_beside_libgomp(tmp_path):
    """The sum alone is compiled by clang++; preloading is one of the cures that are given."""
    program = """
from inductor_vision import doctor
total = doctor.compile_sum()
doctor.compile_sum = lambda: total
print(doctor.check_values(doctor.Kernel(*total, 0, "template", "", [])).status, *doctor.loaded_openmp_runtimes())
"""
    # Inductor keeps precompiled headers in the folder of temporary files, and knows them by their text. clang++ refuses
    # one that an older installation of the same torch made at the same path.
    environment = {"CXX": "clang++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    status, *runtimes = run_python(program, **environment).split()
    if len(runtimes) == 1:
        pytest.skip(f"torch and clang++ share a runtime, {runtimes[0]}")
    assert status == "fail"
    (runtime,) = (path for path in runtimes if pathlib.Path(path).name.startswith("libomp"))
    assert run_python(program, **environment, LD_PRELOAD=runtime).split()[0] == "ok"


def test_vectors_not_picked(monkeypatch):
    monkeypatch.setattr(doctor, "picked_isa", lambda: "")
    assert_off(doctor.check_vectors(kernel()))


@pytest.mark.parametrize(("count", "status"), [(0, "fail"), (None, "warn")])
def test_vectors_not_in_the_machine_code(monkeypatch, count, status):
    monkeypatch.setattr(doctor, "picked_isa", lambda: "avx512")
    monkeypatch.setattr(doctor, "count_vector_instructions", lambda libraries, isa: count)
    assert_off(doctor.check_vectors(kernel()), status)


def test_narrower_vectors_than_the_cpu_has(monkeypatch):
    capabilities = {f"avx512_{part}": True for part in ("f", "bw", "dq", "vl")}
    monkeypatch.setattr(doctor, "picked_isa", lambda: "avx2")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    monkeypatch.setattr(doctor, "count_vector_instructions", lambda libraries, isa: 100)
    check = doctor.check_vectors(kernel())
    assert_off(check, "warn")
    assert "AVX-512" in check.found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 machine code")
@pytest.mark.parametrize(("options", "found"), [(["-O3", "-mavx2"], True), (["-O0"], False)])
def test_counts_vector_instructions(tmp_path, options, found):
    source, library = tmp_path / "add.cpp", tmp_path / "add.so"
    source.write_text("void add(float *a, float *b) { for (int i = 0; i < 1024; i++) a[i] += b[i]; }")
    subprocess.run(["g++", *options, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    count = doctor.count_vector_instructions([library], "avx2")
    if count is None:
        pytest.skip("objdump is not installed")
    assert (count > 0) == found


def test_one_core(monkeypatch):
    monkeypatch.setattr(doctor, "usable_cores", lambda: 1)
    assert doctor.check_threads(kernel()) == Check("threads", "ok", "only one core")


def test_threads_that_do_not_help(monkeypatch):
    monkeypatch.setattr(doctor, "usable_cores", lambda: 2)
    monkeypatch.setattr(doctor, "_seconds_of_others", lambda: 0.0)
    assert_off(doctor.check_threads(kernel(run=lambda: time.sleep(0.001))))


def test_busy_machine(monkeypatch):
    monkeypatch.setattr(doctor, "usable_cores", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(doctor, "_seconds_of_others", lambda: 10 * time.perf_counter())
    check = doctor.check_threads(kernel(run=lambda: time.sleep(0.001)))
    assert_off(check, "warn")
    assert "cores busy" in check.remedy


@pytest.mark.parametrize(("seconds", "status"), [((16, 1), "ok"), ((2, 1), "warn"), ((1, 1), "fail")])
def test_threads(monkeypatch, seconds, status):
    monkeypatch.setattr(doctor, "usable_cores", lambda: 16)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(doctor, "measure_scaling", lambda run, threads: seconds)
    monkeypatch.setattr(doctor, "_seconds_of_others", lambda: 0.0)
    assert doctor.check_threads(kernel()).status == status


@pytest.mark.parametrize(
    ("runtimes", "status"),
    [(["/a/libgomp.so.1"], "ok"), (["/a/libgomp.so.1", "/b/libiomp5.so"], "warn"), ([], "fail"), (None, "ok")],
)
def test_runtimes(monkeypatch, runtimes, status):
    monkeypatch.setattr(doctor, "loaded_openmp_runtimes", lambda: runtimes)
    check = doctor.check_runtimes()
    assert check.status == status
    assert bool(check.remedy) == (status != "ok")


OK = Check("compiler", "ok", "g++ 12")
WARN = Check("vectors", "warn", "avx2", "use a recent compiler")
FAIL = Check("openmp", "fail", "no program builds", "install libgomp")


@pytest.mark.parametrize(
    ("checks", "status", "last"),
    [
        ([OK], 0, "all is well"),
        ([OK, WARN], 0, "nothing is broken; look at: vectors"),
        ([WARN, FAIL, OK], 1, "to mend: openmp"),
    ],
)
def test_exit_status_and_lines(monkeypatch, capsys, checks, status, last):
    monkeypatch.setattr(doctor, "examine", lambda: iter(checks))
    assert doctor.main([]) == status
    output = capsys.readouterr().out
    for check in checks:
        assert check.found in output and check.remedy in output
    assert output.splitlines()[-1] == last


def test_a_fresh_page_costs_something():
    assert 0 < doctor.measure_fresh_page() < 1e-3
    assert "keep_memory" in doctor.check_memory().found
