"""Each test here runs on each Triton that there is: interpreted, compiled for the CPU, compiled for a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from inductor_vision.tests.support.triton import BACKENDS, active
from torch._inductor import config


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where kernels run, while Inductor generates Triton code."""
    changes: dict[str, object] = {"cpu_backend": "triton"}
    if request.param == "interpreter":  # nothing is measured there, and other processes have no such backend
        changes |= {"compile_threads": 1, "triton.autotune_pointwise": False}
    with active(request.param) as device, config.patch(changes):
        yield device
