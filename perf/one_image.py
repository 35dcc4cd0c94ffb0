"""Contenders for models that take one image: a case's inputs have such a module, ``detector``, and an ``image``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..export import export_detector
from ..integrations.models import accelerate
from . import backends
from .spec import Case, Job, Prepared

MULTIPLYING = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)

TEMPLATE_KERNEL = r"graph_\d+_((?!cpp_)\w+?)_(?:kernel|cpp_\w*)"  # see KernelTemplate.source
_PROFILED_CALLS = 3


def case(name: str, problem: Any) -> Case:
    """A case of a suite; ``name`` says which model it is. ``problem``, a dataclass, is the case's inputs, and has the
    image's ``size`` besides.

    Of coordinates a few hundredths of a pixel are let off.
    """
    height, width = problem.size
    return Case(name, f"1 image of {height}x{width}", functools.partial(_build, problem), 1e-4)


def _build(problem: Any) -> Any:
    problem = dataclasses.replace(problem)  # what a case holds is pickled: without the detector
    _ = problem.detector
    return problem


def reference(problem: Any) -> dict[str, Tensor]:
    """What the model detects in eager mode."""
    with torch.no_grad():
        return problem.detector(problem.image)


def detector(
    job: Job, channels_last: bool, bfloat16: bool = False, converted: bool = False
) -> tuple[nn.Module, tuple[Tensor]]:
    """The model of a job, and its image; ``bfloat16``: under autocast; ``converted``: both are in bfloat16."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = job.inputs.detector.to(memory_format=layout)
    if converted:
        return model.bfloat16(), (job.inputs.image.bfloat16(),)
    return backends.Autocast(model) if bfloat16 else model, (job.inputs.image,)


def eager(job: Job, channels_last: bool = False) -> Prepared:
    """The model as it is."""
    return backends.eager(*detector(job, channels_last))


def stock_compiled(job: Job, pattern: str, bfloat16: bool = False) -> Prepared:
    """Compiled without this package, with graph breaks if there are; ``pattern``: see :func:`shares`."""
    prepared = backends.compiled(*detector(job, False, bfloat16), freezing=False, fullgraph=False)
    return dataclasses.replace(prepared, shares=functools.partial(shares, prepared.call, pattern))


def compiled(
    job: Job,
    *,
    channels_last: bool = False,
    freezing: bool = True,
    bfloat16: bool = False,
    converted: bool = False,
    winograd: bool = False,
) -> Prepared:
    """Compiled as one graph after ``accelerate()``."""
    accelerate(winograd=winograd)
    with kernels_named():
        prepared = backends.compiled(*detector(job, channels_last, bfloat16, converted), freezing=freezing)
    return dataclasses.replace(prepared, shares=functools.partial(shares, prepared.call, TEMPLATE_KERNEL))


def packaged(model: nn.Module, image: Tensor, **options: Any) -> Prepared:
    """Exported for images of this size, and loaded."""
    with tempfile.TemporaryDirectory(prefix="inductor_vision_perf_") as folder:
        with kernels_named():
            path = export_detector(model, image, Path(folder, "model.pt2"), any_size=False, **options)
        prepared = backends.eager(torch._inductor.aoti_load_package(path), (image,))
    return dataclasses.replace(prepared, shares=functools.partial(shares, prepared.call, TEMPLATE_KERNEL))


def multiplications(job: Job) -> Prepared:
    """The convolutions and matrix products of the model, channels_last, each on what it was given."""
    model, (image,) = detector(job, True)
    calls = []
    for layer in model.modules():
        if isinstance(layer, MULTIPLYING):
            layer.register_forward_hook(lambda layer, inputs, output: calls.append((layer.forward, *inputs)))
    with torch.no_grad():
        model(image)

    def multiply() -> list[int]:
        return [layer(input).dim() for layer, input in calls]

    return backends.eager(multiply, ())


@contextlib.contextmanager
def kernels_named() -> Iterator[None]:
    """Have compiled kernels tell a profiler their names, where there is one; else it costs them nothing."""
    import torch._inductor.config

    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        yield


def shares(call: Callable[[], Any], pattern: str) -> dict[str, float]:
    """Share of a call's time in the events whose names match; the operator is the first group."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(_PROFILED_CALLS):
            call()
        seconds = time.perf_counter() - start
    shares: dict[str, float] = {}
    for event in profiler.key_averages():
        if match := re.fullmatch(pattern, event.key):
            shares[match[1]] = shares.get(match[1], 0.0) + event.cpu_time_total / 1e6 / seconds
    return shares
