"""What paste_masks compiles to."""

from __future__ import annotations

import pytest
import torch
from inductor_vision.ops.paste_masks import paste_masks
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import compile_and_run, trace_and_run
from inductor_vision.tests.support.layouts import arrange
from inductor_vision.tests.support.paste_masks import CASES, Case, oracle
from torch import Tensor

pytestmark = pytest.mark.usefixtures("optimized")


def paste(masks: Tensor, boxes: Tensor, like: Tensor) -> Tensor:
    return paste_masks(masks, boxes, like.shape)


def call(case: Case) -> tuple[Tensor, ...]:
    return *case.tensors(), torch.empty(case.image)


def test_values_for_all_sizes():
    """One graph; sizes of 1, for which torch.compile makes one of their own, are in the test of packages."""
    compiled = compile_and_run(paste, *call(Case(image=(30, 45))), dynamic=True)
    assert compiled.kinds == ["template"] and compiled.templates == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in ("any", "large masks", "bands of rows", "wide"):
            assert_close(compiled.function(*call(CASES[name])), oracle(*CASES[name].positional), torch.float32)


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    case = Case(dtype=dtype)
    compiled = compile_and_run(paste, *call(case))
    assert compiled.kinds == ["template"]
    assert_close(compiled.result, oracle(*case.positional), dtype)


@pytest.mark.usefixtures("unoptimized")
def test_every_layout_and_number_of_threads_gives_the_same():
    masks, boxes = Case(image=(150, 50)).tensors()
    inputs = [arrange(masks, layout) for layout in ("contiguous", "transposed", "stepped")]

    def function(boxes: Tensor, *inputs: Tensor) -> list[Tensor]:
        return [paste_masks(input, boxes, (150, 50)) for input in inputs]

    compiled = compile_and_run(function, boxes, *inputs, config={"cpp_wrapper": True})
    assert compiled.kinds == ["template"] * len(inputs)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(result, compiled.result[0]) for result in compiled.function(boxes, *inputs))


@pytest.mark.usefixtures("unoptimized")
def test_a_threshold_is_fused():
    masks, boxes = Case().tensors()
    compiled = compile_and_run(lambda masks, boxes: paste_masks(masks, boxes, (40, 50)) > 0.5, masks, boxes)
    assert (compiled.kinds, compiled.templates, compiled.fused) == (["template"], 1, 1)
    pasted = oracle(*Case().positional)
    clear = (pasted - 0.5).abs() > 1e-4
    assert clear.sum() > 0.9 * clear.numel()
    assert torch.equal(compiled.result[clear], (pasted > 0.5)[clear])


def test_gradients():
    """By aten's operators."""
    masks, boxes = Case().tensors()
    masks.requires_grad_()
    traced = trace_and_run(lambda masks: paste_masks(masks, boxes, (40, 50)), masks)
    (result,) = torch.autograd.grad(traced.result.square().sum(), masks)
    (expected,) = torch.autograd.grad(paste_masks(masks, boxes, (40, 50)).square().sum(), masks)
    torch.testing.assert_close(result, expected)
