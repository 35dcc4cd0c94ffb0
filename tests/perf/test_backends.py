"""Contenders that are one function, compiled in several ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inductor_vision.advisor import replace
from inductor_vision.paths import recorded_paths
from inductor_vision.perf import backends
from inductor_vision.perf.spec import Case, Job, Suite
from inductor_vision.perf.suites import box_iou_rotated, patch_conv2d, patch_conv2d_backward
from inductor_vision.perf.verify import relative_error
from inductor_vision.tests.support.compiled import caches_disabled
from inductor_vision.tests.support.oldest_torch import with_oldest_torch
from inductor_vision.tests.support.triton import active, launched_kernels
from torch import nn
from torch._inductor import config

SMALL = {
    "forward": (box_iou_rotated.SUITE, lambda: box_iou_rotated.Overlaps(7)),
    "backward": (
        patch_conv2d_backward.SUITE,
        lambda: patch_conv2d_backward._build(patch_conv2d.Shape(8, 4, 3, 5)),
    ),
}


def sees_its_weight_change(call, layer: nn.Linear) -> bool:
    before = call().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    return not torch.equal(call(), before)


@pytest.mark.parametrize("freezing", [True, False])
def test_frozen_weights_are_constants(freezing: bool):
    layer = nn.Linear(3, 4)
    prepared = backends.compiled(layer, [torch.rand(2, 3)], freezing=freezing)
    assert sees_its_weight_change(prepared.call, layer) is not freezing


def test_advisors_layers_are_frozen():
    class Layer(nn.Linear):  # those of torch itself are not compiled alone
        def forward(self, input):
            return super().forward(input)

    layer, x = Layer(3, 4), torch.rand(2, 3)
    with config.patch(freezing=False), torch.no_grad():
        compiled = replace.compiled(layer)
        assert not sees_its_weight_change(lambda: compiled(x), layer)


@with_oldest_torch
def test_as_an_option_freezing_comes_too_late():
    """Where this fails, torch.compile(options={"freezing": True}) does what the documents set the configuration for."""
    layer, x = nn.Linear(3, 4), torch.rand(2, 3)
    program = torch.compile(layer, options={"freezing": True})
    with torch.no_grad():
        assert sees_its_weight_change(lambda: program(x), layer)


@pytest.mark.parametrize("name", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
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
