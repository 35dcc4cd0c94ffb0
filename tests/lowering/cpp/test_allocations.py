"""A kernel that runs out of memory, wherever it does, is an exception and not the end of the process."""

from __future__ import annotations

import pathlib

import pytest
from inductor_vision.lowering.common.registry import has_template
from inductor_vision.ops.registry import OPS
from inductor_vision.tests.support.cpp import CAPABILITIES, build, run

SOURCE = pathlib.Path(__file__).parent / "allocations_test.cpp"

IN_PARALLEL = ("nms_of_classes", "nms_pair_by_pair", "nms_rotated_of_classes", "soft_nms_of_classes")


@pytest.fixture(scope="module")
def figures(kept: pathlib.Path) -> dict[str, float]:
    return run(build(kept, SOURCE, CAPABILITIES["no vector instructions"], "-O1", "-Wno-psabi"))


def test_every_failed_allocation_is_an_exception(figures):
    kernels = {name.removesuffix("_calls") for name in figures if name.endswith("_calls")}
    for op in OPS:
        assert not has_template(OPS[op]) or any(kernel.startswith(op) for kernel in kernels), op
    for kernel in kernels:
        assert figures[f"{kernel}_calls"] == figures[f"{kernel}_thrown"] > 0, kernel


def test_also_of_those_in_parallel_regions(figures):
    assert {name for name in IN_PARALLEL if figures[f"{name}_in_parallel"] > 0} == set(IN_PARALLEL)
