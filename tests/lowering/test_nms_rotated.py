"""What nms_rotated and batched_nms_rotated compile to."""

from __future__ import annotations

import pytest
import torch
from inductor_vision import batched_nms_rotated, nms_rotated
from inductor_vision.tests.support.boxes import ROTATED_CALLS, RotatedBoxes, nms_rotated_oracle
from inductor_vision.tests.support.compiled import caches_disabled, compile_and_run
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("optimized")


class Suppress(nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        return nms_rotated(boxes, scores, 0.3), batched_nms_rotated(boxes, scores, classes, 0.6)


def expected(boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[list[int], ...]:
    return nms_rotated_oracle(boxes, scores, 0.3), nms_rotated_oracle(boxes, scores, 0.6, classes)


@pytest.fixture(scope="module")
def compiled():
    return compile_and_run(Suppress(), *RotatedBoxes(17).tensors(), dynamic=True)


def test_takes_the_template(compiled):
    assert compiled.kinds == ["template"] * 2
    assert compiled.templates == 2
    assert tuple(indices.tolist() for indices in compiled.result) == expected(*RotatedBoxes(17).tensors())


@pytest.mark.parametrize("call", [*ROTATED_CALLS, RotatedBoxes(0)], ids=str)
def test_values(compiled, call):
    tensors = call.tensors()
    assert tuple(indices.tolist() for indices in compiled.function(*tensors)) == expected(*tensors)


def test_every_number_of_threads_gives_the_same(compiled):
    tensors = RotatedBoxes(6000).tensors()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(compiled.function(*tensors))
    torch.testing.assert_close(results[1:], results[:1] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    boxes, scores, _ = RotatedBoxes(90, dtype=dtype).tensors()
    compiled = compile_and_run(lambda *call: nms_rotated(*call, 0.3), boxes, scores, config={"cpp_wrapper": True})
    assert compiled.kinds == ["template"]
    assert compiled.result.tolist() == nms_rotated_oracle(boxes, scores, 0.3)


def test_strided_views():
    boxes, scores, _ = RotatedBoxes(90).tensors()
    table = torch.cat([scores[:, None], boxes, scores[:, None]], dim=1)
    compiled = compile_and_run(lambda table: nms_rotated(table[:, 1:6], table[:, 6], 0.3), table)
    assert compiled.kinds == ["template"]
    assert compiled.result.tolist() == nms_rotated_oracle(boxes, scores, 0.3)


def test_wrong_arguments_are_reported():
    with caches_disabled(), pytest.raises(RuntimeError, match=r"boxes must be \[N, 5\].*got \(2, 4\)"):
        torch.compile(nms_rotated, fullgraph=True)(torch.ones(2, 4), torch.ones(2), 0.5)
