"""What the numbers depend on besides the code: processor, threads, versions, date."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import subprocess
from typing import Any

import torch

_PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "openvino", "numpy")


def describe_machine() -> dict[str, Any]:
    """Read once per run; goes into the report as it is."""
    from ..version import __version__

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "compiler": _compiler(),
        "versions": {"inductor_vision": __version__, **_versions()},
    }


def foreign_seconds() -> float | None:
    """Processor time that other programs have taken on all cores so far; None where the system does not say.

    The difference between two calls tells whether a measurement had the machine to itself.
    """
    with contextlib.suppress(OSError), open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return busy - own.user - own.system - sum(_seconds_of(child.pid) for child in multiprocessing.active_children())
    return None


def _seconds_of(process: int | None) -> float:
    """Processor time that a process has taken so far; 0 for one that has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()  # behind the name, which may hold anything
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # user and system
    return 0.0


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name = fields.get("model name") or fields.get("CPU part", "")
        if name:
            return (
                f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name
            )
    return platform.processor() or platform.machine()


def _compiler() -> str:
    """The first line of what Inductor's C++ compiler says of itself."""
    from ..lowering.inductor.codegen import get_cpp_compiler

    try:
        command = [get_cpp_compiler(), "--version"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except Exception as error:  # whatever Inductor raises where it finds none: the rest of the report is still good
        return f"none ({error})"
