"""What box_iou_rotated compiles to."""

from __future__ import annotations

import pytest
import torch
from inductor_vision import box_iou_rotated
from inductor_vision.ops.registry import OPS
from inductor_vision.tests.support.boxes import ROTATED_CALLS, RotatedBoxes
from inductor_vision.tests.support.compiled import caches_disabled, compile_and_run
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("optimized")


class Overlaps(nn.Module):
    def forward(self, boxes1: Tensor, boxes2: Tensor) -> Tensor:
        return box_iou_rotated(boxes1, boxes2)


def lists(call: RotatedBoxes) -> tuple[Tensor, Tensor]:
    """Two lists, of different lengths and strides."""
    boxes = call.tensors()[0]
    return boxes, torch.cat([boxes, boxes], dim=1)[: len(boxes) // 2 + 1, 5:]


@pytest.fixture(scope="module")
def compiled():
    return compile_and_run(Overlaps(), *lists(RotatedBoxes(17)), dynamic=True)


def test_takes_the_template(compiled):
    assert compiled.kinds == ["template"]
    assert compiled.templates == 1


@pytest.mark.parametrize("call", [*ROTATED_CALLS, RotatedBoxes(0)], ids=str)
def test_values(compiled, call):
    boxes1, boxes2 = lists(call)
    result = compiled.function(boxes1, boxes2)
    torch.testing.assert_close(result, box_iou_rotated(boxes1, boxes2), rtol=0, atol=1e-6)


def test_every_number_of_threads_gives_the_same(compiled):
    tensors = lists(RotatedBoxes(500))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(compiled.function(*tensors))
    torch.testing.assert_close(results[1:], results[:1] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_neighbours(dtype):
    boxes1, boxes2 = lists(RotatedBoxes(60, dtype=dtype))

    def best(boxes1: Tensor, boxes2: Tensor) -> Tensor:
        return (1 - box_iou_rotated(boxes1 * 2, boxes2 * 2)).amin(dim=1)

    compiled = compile_and_run(best, boxes1, boxes2)
    assert compiled.kinds == ["template"]
    assert compiled.result.dtype == dtype
    torch.testing.assert_close(compiled.result, best(boxes1, boxes2))


def test_the_decomposition_compiles():
    boxes1, boxes2 = lists(RotatedBoxes(30, dtype=torch.float64))
    compiled = compile_and_run(OPS["box_iou_rotated"].decomposition, boxes1, boxes2)
    assert compiled.templates == 0
    torch.testing.assert_close(compiled.result, box_iou_rotated(boxes1, boxes2), rtol=0, atol=1e-12)


def test_wrong_arguments_are_reported():
    with caches_disabled(), pytest.raises(RuntimeError, match=r"boxes2 must be \[N, 5\].*got \(2, 4\)"):
        torch.compile(box_iou_rotated, fullgraph=True)(torch.ones(2, 5), torch.ones(2, 4))
