"""Same conditions for every test: poisoned fresh memory, fixed seeds and threads, nothing compiled before."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pathlib
import random
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

# Threads that wait leave the cores to the other processes of a test run. Before torch is imported, which loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# C++ is not optimized, which compiles in half of the time, but for tests that ask for kernels as users get them.
os.environ.setdefault("AOT_INDUCTOR_DEBUG_COMPILE", "1")
# The processor's vectors are what they are said to be: to try them takes a second of every process that compiles.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

# How many examples of what may be anything: "make test" is content with few, "make test-all" takes many.
for profile, max_examples in (("few", 20), ("many", 100)):
    settings.register_profile(profile, max_examples=max_examples, derandomize=True, deadline=None, database=None)
settings.load_profile("few")

_M_PERTURB = -6  # of glibc's mallopt


def _poison_fresh_memory() -> bool:
    """Have every byte that malloc hands out set to 0xFF: NaN in each floating dtype, -1 in each integer dtype.

    torch.empty, the buffers of compiled programs and the scratch of kernels all come from malloc. glibc fills them with
    the complement of the low byte of what it is given, and fills nothing if it is given 0.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_PERTURB, 0x100) == 1 and bool(torch.empty(1 << 16).isnan().all())


MEMORY_IS_POISONED = _poison_fresh_memory()

# Why a test is skipped, and what to do about it.
TRANSFORMERS_IS_MISSING = "transformers is not installed: pip install 'inductor_vision[transformers]'"
TORCHVISION_IS_MISSING = "torchvision is not installed: pip install --no-deps the torchvision that goes with this torch"
KERNELS_DO_NOT_LOAD = (
    "torchvision's compiled operators do not load beside this torch: install torch and torchvision from one source, "
    "both for CPUs or both for CUDA"
)


class _RootIsThePackage:
    """Keeps pytest from importing the root's __init__.py, the package's, a second time under the folder's name."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: pathlib.Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == parent.config.rootpath else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_RootIsThePackage())  # hooks of this file itself see only what is below it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need torchvision, or its kernels, are marked so. Files with slow tests come first, and last those that
    compile nothing, where several processes take one file after the other: so they are done at about the same time."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        for fixture, marker in (("torchvision", "torchvision_kernels"), ("torchvision_python", "torchvision_python")):
            if fixture in fixtures:
                item.add_marker(marker)
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (item.path not in slow, item.path.parent.name == "ops"))


def pytest_collection_finish() -> None:
    """What Inductor asks of the compiler beside code takes a third of the time, of hundreds of compilations."""
    if "torch._inductor.codecache" not in sys.modules:
        return
    from torch._inductor import codecache, cpp_builder

    # No debug information, which comes with code that is not optimized.
    cpp_builder._get_inductor_debug_symbol_cflags = lambda: ([], [])
    # With cpp_wrapper, kernels are in the wrapper's source: headers of both are precompiled, not the wrapper's alone.
    header_of = getattr(codecache, "_get_cpp_wrapper_header", None)
    if header_of is None:  # of a newer torch, whose own way is slower, and as right
        return
    both = pathlib.Path(__file__).parent / "support" / "wrapper_and_kernels.h"
    codecache.CppWrapperCodeCache._get_uncompiled_header = classmethod(
        lambda cls, device: str(both) if device == "cpu" else header_of(device)
    )


def pytest_report_header() -> str:
    memory = "filled with NaN" if MEMORY_IS_POISONED else "not poisoned: this C library has no M_PERTURB"
    return f"torch {torch.__version__}, fresh memory: {memory}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The last lines say what was not tested, and what it takes to test it."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    if reasons:
        terminalreporter.section(f"{reasons.total()} tests were skipped")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5}  {reason.removeprefix('Skipped: ')}")


@pytest.fixture
def threads() -> int:
    """How many threads torch has; a folder or file may say otherwise with a fixture of this name."""
    return 2


@pytest.fixture(autouse=True)
def _same_conditions(threads: int) -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def optimized(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels are compiled as users get them, if "make test-all" runs; for the file that tests them."""
    if request.config.getoption("--hypothesis-profile") != "many":
        yield
        return
    from torch._inductor import config

    # What calls the kernels is a source of its own then, whose optimization is half of the time.
    with config.patch({"aot_inductor.debug_compile": False, "cpp_wrapper_build_separate": True}):
        yield


@pytest.fixture
def unoptimized() -> Iterator[None]:
    """For many cases of kernels that other tests of the same file run optimized."""
    from torch._inductor import config

    with config.patch({"aot_inductor.debug_compile": True}):
        yield


@pytest.fixture
def poisoned_memory() -> None:
    """For tests that mean something only with poisoned memory."""
    if not MEMORY_IS_POISONED:
        pytest.skip("fresh memory cannot be poisoned: this C library has no M_PERTURB")


def _torchvision() -> ModuleType | None:
    """torchvision, where its own compiled operators load; the test is skipped where it is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip(TORCHVISION_IS_MISSING)
    try:
        import torchvision
        import torchvision.ops
    except RuntimeError:  # "operator torchvision::nms does not exist"
        return None
    has_kernels = torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::deform_conv2d", "CPU")
    return torchvision if has_kernels else None


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision with its own compiled CPU kernels, the reference for values."""
    module = _torchvision()
    if module is None:
        pytest.skip(KERNELS_DO_NOT_LOAD)
    return module


@pytest.fixture(scope="session")
def torchvision_python() -> ModuleType:
    """torchvision for tests of its models and its Python: on its own operators or, where these do not load, on those
    that accelerate_torchvision() defines."""
    module = _torchvision()
    if module is None:
        from inductor_vision import accelerate_torchvision

        accelerate_torchvision()
        import torchvision as module
        import torchvision.ops
    return module


@pytest.fixture(scope="session")
def transformers(request: pytest.FixtureRequest) -> ModuleType:
    """transformers, whose models need nothing from the network here."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip(TRANSFORMERS_IS_MISSING)
    if importlib.util.find_spec("torchvision") is not None:  # transformers imports it then
        request.getfixturevalue("torchvision_python")
    import transformers

    return transformers


@pytest.fixture(scope="session")
def detector_package(torchvision_python: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The small Mask R-CNN as a package, for images of any size; it takes a while to make."""
    from inductor_vision import export_detector
    from inductor_vision.tests.support.detectors import small_detector
    from inductor_vision.tests.support.shared import made_once

    def make(folder: pathlib.Path) -> None:
        labels = ["background", "cat", "dog", "cup"]
        detector, image = small_detector("MaskRCNN"), torch.rand(3, 90, 120)
        export_detector(detector, image, folder / "detector.pt2", labels=labels)

    return made_once(tmp_path_factory, "detector", make) / "detector.pt2"


@pytest.fixture(scope="session")
def transformers_package(transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The small RT-DETRv2 as a package, for images of any size; each of its queries is a detection."""
    from inductor_vision import export_detector
    from inductor_vision.tests.support.shared import made_once
    from inductor_vision.tests.support.transformers_models import small_model

    def make(folder: pathlib.Path) -> None:
        labels = ["cat", "dog", "cup", "car", "bus"]
        model, image = small_model("rt_detr_v2"), torch.rand(3, 128, 160)
        export_detector(model, image, folder / "detector.pt2", labels=labels, threshold=-2.0)

    return made_once(tmp_path_factory, "transformers_detector", make) / "detector.pt2"


@pytest.fixture(scope="session")
def cpp_program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """examples/cpp, built."""
    from inductor_vision.tests.support.cpp_program import build
    from inductor_vision.tests.support.shared import made_once

    return made_once(tmp_path_factory, "cpp_program", lambda folder: build(folder / "run")) / "run"
