"""Contenders that are one function, compiled in several ways."""

from __future__ import annotations

from typing import Any

import pytest
from inductor_vision.paths import recorded_paths
from inductor_vision.perf.spec import Case, Job, Suite
from inductor_vision.perf.suites import box_iou_rotated, patch_conv2d, patch_conv2d_backward
from inductor_vision.perf.verify import relative_error
from inductor_vision.tests.support.compiled import caches_disabled
from inductor_vision.tests.support.triton import active, launched_kernels
from torch._inductor import config

SMALL = {
    "forward": (box_iou_rotated.SUITE, lambda: box_iou_rotated.Overlaps(7)),
    "backward": (
        patch_conv2d_backward.SUITE,
        lambda: patch_conv2d_backward._build(patch_conv2d.Shape(8, 4, 3, 5)),
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_code_of_one_contender_is_not_anothers(name: str):
    suite, build = SMALL[name]
    problem = build()
    with active("interpreter"), config.patch({"compile_threads": 1, "triton.autotune_pointwise": False}):
        first, kernels = prepare(suite, "ours-compiled", problem)
        assert kernels == []
        second, kernels = prepare(suite, "ours-triton-cpu", problem)
        assert kernels
        with launched_kernels() as again:
            first.call()
        assert again == []
        with launched_kernels() as again:
            second.call()
        assert again == kernels[-len(again) :]
    assert relative_error(second.output, first.output) <= 1e-5


def prepare(suite: Suite, name: str, problem: Any) -> tuple[Any, list[str]]:
    """What a contender is to be timed by, and the Triton kernels that ran meanwhile."""
    (contender,) = (contender for contender in suite.contenders if contender.name == name)
    with caches_disabled(), launched_kernels() as kernels, recorded_paths() as paths:
        prepared = contender.prepare(Job(Case("small", "", lambda: problem, 0.0), problem, 1))
    assert paths  # it was compiled
    return prepared, kernels
