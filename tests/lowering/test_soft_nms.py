"""What soft_nms and batched_soft_nms compile to."""

from __future__ import annotations

import pytest
import torch
from inductor_vision import batched_soft_nms, soft_nms
from inductor_vision.tests.support.boxes import CALLS, Boxes, assert_taken, soft_nms_oracle
from inductor_vision.tests.support.compiled import caches_disabled, compile_and_run
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("optimized")

GAUSSIAN = {"sigma": 0.4, "min_score": 0.05, "method": "gaussian"}


class Suppress(nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        return (*soft_nms(boxes, scores), *batched_soft_nms(boxes, scores, classes, **GAUSSIAN))


def assert_right(results: tuple[Tensor, ...], boxes: Tensor, scores: Tensor, classes: Tensor) -> None:
    assert_taken(results[:2], soft_nms_oracle(boxes, scores))
    assert_taken(results[2:], soft_nms_oracle(boxes, scores, **GAUSSIAN, classes=classes))


@pytest.fixture(scope="module")
def compiled():
    return compile_and_run(Suppress(), *Boxes(17).tensors(), dynamic=True)


def test_takes_the_template(compiled):
    assert compiled.kinds == ["template"] * 2
    assert compiled.templates == 2
    assert_right(compiled.result, *Boxes(17).tensors())


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_values(compiled, call):
    tensors = call.tensors()
    assert_right(compiled.function(*tensors), *tensors)


@pytest.mark.parametrize("kind", ["uniform", "far"])
def test_every_number_of_threads_gives_the_same(compiled, kind):
    tensors = Boxes(6000, kind).tensors()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(compiled.function(*tensors))
    torch.testing.assert_close(results[1:], results[:1] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_dtypes(dtype, cpp_wrapper):
    boxes, scores, _ = Boxes(90, dtype=dtype).tensors()
    compiled = compile_and_run(soft_nms, boxes, scores, config={"cpp_wrapper": cpp_wrapper})
    assert compiled.kinds == ["template"]
    assert compiled.result[1].dtype == dtype
    assert_taken(compiled.result, soft_nms_oracle(boxes, scores))


def test_strided_views_and_neighbours():
    """Boxes and scores are columns of one tensor, and both results are of one size."""

    def detect(table: Tensor) -> Tensor:
        indices, scores = soft_nms(table[:, 1:5], table[:, 6] * 2)
        return table[indices, 1:5] * scores[:, None]

    boxes, scores, _ = Boxes(90).tensors()
    table = torch.cat([scores[:, None], boxes, scores[:, None], scores[:, None]], dim=1)
    compiled = compile_and_run(detect, table)
    assert compiled.kinds == ["template"]
    torch.testing.assert_close(compiled.result, detect(table))


def test_a_result_that_nothing_reads():
    boxes, scores, _ = Boxes(90).tensors()

    def both(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        op = torch.ops.inductor_vision.soft_nms
        rule = 0.3, 0.5, 1e-3, "linear"
        return op(boxes, scores, None, *rule)[0], op(boxes * 2, scores, None, *rule)[1]

    compiled = compile_and_run(both, boxes, scores)
    assert compiled.kinds == ["template"] * 2
    torch.testing.assert_close(compiled.result, both(boxes, scores))


def test_wrong_arguments_are_reported():
    with caches_disabled(), pytest.raises(RuntimeError, match=r"method must be one of linear, gaussian; got 'hard'"):
        torch.compile(soft_nms, fullgraph=True)(torch.ones(2, 4), torch.ones(2), method="hard")
