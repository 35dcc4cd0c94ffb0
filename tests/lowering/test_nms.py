"""What nms and batched_nms compile to."""

from __future__ import annotations

import pytest
import torch
from inductor_vision import accelerate_torchvision, batched_nms, nms
from inductor_vision.tests.support.boxes import CALLS, Boxes, nms_oracle
from inductor_vision.tests.support.compiled import caches_disabled, compile_and_run
from torch import Tensor, nn
from torch.export import Dim

pytestmark = pytest.mark.usefixtures("optimized")

LARGE = Boxes(6000)  # enough for more than one thread, with gaps for several grids


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
    return nms(boxes, scores, 0.3), batched_nms(boxes, scores, classes, 0.5), nms(boxes, scores, -0.5)


def expected(boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[list[int], ...]:
    return (
        nms_oracle(boxes, scores, 0.3),
        nms_oracle(boxes, scores, 0.5, classes),
        nms_oracle(boxes, scores, -0.5),
    )


@pytest.fixture(scope="module")
def compiled():
    return compile_and_run(suppress, *Boxes(17).tensors(), dynamic=True)


def test_takes_the_template(compiled):
    assert compiled.kinds == ["template"] * 3
    assert compiled.templates == 3
    assert tuple(indices.tolist() for indices in compiled.result) == expected(*Boxes(17).tensors())


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_values(compiled, call):
    tensors = call.tensors()
    for indices, right in zip(compiled.function(*tensors), expected(*tensors)):
        assert indices.dtype == torch.int64
        assert indices.tolist() == right


@pytest.mark.parametrize("kind", ["uniform", "tied", "far"])
def test_every_number_of_threads_gives_the_same(compiled, torchvision, kind):
    boxes, scores, classes = Boxes(LARGE.count, kind).tensors()
    results = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results[threads] = compiled.function(boxes, scores, classes)
    assert torch.equal(results[2][0], torchvision.ops.nms(boxes, scores, 0.3))
    for one, two, three in zip(*results.values()):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_dtypes(dtype, cpp_wrapper):
    boxes, scores, _ = Boxes(90, dtype=dtype).tensors()
    compiled = compile_and_run(lambda *call: nms(*call, 0.3), boxes, scores, config={"cpp_wrapper": cpp_wrapper})
    assert compiled.kinds == ["template"]
    assert compiled.result.tolist() == nms_oracle(boxes, scores, 0.3)


def test_strided_views_and_neighbours():
    """Boxes and scores are columns of one tensor, and are computed in the same graph."""

    def detect(table: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores = table[:, 1:5], table[:, 6]
        kept = nms(boxes, scores, 0.3)
        return kept, (table[:, 6] * 2)[kept] + nms(boxes * 2, scores.sigmoid(), 0.3)

    boxes, scores, _ = Boxes(90).tensors()
    table = torch.cat([scores[:, None], boxes, scores[:, None], scores[:, None]], dim=1)
    compiled = compile_and_run(detect, table)
    assert compiled.kinds == ["template"] * 2
    for ours, eager in zip(compiled.result, detect(table)):
        assert torch.equal(ours, eager)


def test_classes_that_are_floating_numbers():
    boxes, scores = torch.tensor([[0.0, 0, 1, 1]] * 4), torch.tensor([4.0, 3.0, 2.0, 1.0])
    compiled = compile_and_run(
        lambda *call: batched_nms(*call, 0.5), boxes, scores, torch.tensor([0.25, 0.5, 0.0, -0.0])
    )
    assert compiled.kinds == ["template"]
    assert compiled.result.tolist() == [0, 1, 2]


def test_memory_that_is_viewed_as_another_dtype():
    boxes, scores, _ = Boxes(90).tensors()
    compiled = compile_and_run(lambda bits, s: nms(bits.view(torch.float32), s, 0.3), boxes.view(torch.int32), scores)
    assert compiled.kinds == ["template"]
    assert compiled.result.tolist() == nms_oracle(boxes, scores, 0.3)


def test_as_many_boxes_as_data_say():
    def best(boxes: Tensor, scores: Tensor, least: Tensor) -> Tensor:
        good = scores > least
        return nms(boxes[good], scores[good], 0.3)

    boxes, scores, _ = Boxes(90).tensors()
    compiled = compile_and_run(best, boxes, scores, torch.tensor(0.5))
    assert compiled.kinds == ["template"]
    for least in (-1.0, 0.5, scores.max().item() - 1e-6, 2.0):
        assert torch.equal(
            compiled.function(boxes, scores, torch.tensor(least)), best(boxes, scores, torch.tensor(least))
        )


def test_results_of_a_fixed_size():
    boxes, scores, classes = Boxes(90).tensors()

    def best(boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        kept, count = batched_nms(boxes, scores, classes, 0.1, max_detections=100)
        return boxes[kept].where(kept[:, None] >= 0, 0), count

    compiled = compile_and_run(best, boxes, scores, classes)
    assert compiled.kinds == ["template"]
    for ours, eager in zip(compiled.result, best(boxes, scores, classes), strict=True):
        assert torch.equal(ours, eager)


class Stock(nn.Module):
    def __init__(self, ops) -> None:
        super().__init__()
        self.ops = ops

    def forward(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        return self.ops.nms(boxes, scores, 0.1), self.ops.boxes.batched_nms(boxes, scores, classes, 0.1)


def test_stock_functions(torchvision_python):
    accelerate_torchvision()
    boxes, scores, classes = Boxes(90).tensors()
    compiled = compile_and_run(
        lambda *call: (torch.ops.torchvision.nms(*call[:2], 0.1), *Stock(torchvision_python.ops)(*call)),
        boxes,
        scores,
        classes,
    )
    assert compiled.kinds == ["template"] * 3
    right = nms_oracle(boxes, scores, 0.1)
    assert [indices.tolist() for indices in compiled.result] == [right, right, nms_oracle(boxes, scores, 0.1, classes)]


@pytest.mark.parametrize("count", [0, 1, 90])
def test_stock_functions_export_for_any_number_of_boxes_kept(torchvision_python, count):
    """torchvision's own say that at least two are."""
    accelerate_torchvision()
    many = {0: Dim.DYNAMIC}
    exported = torch.export.export(
        Stock(torchvision_python.ops), Boxes(17).tensors(), dynamic_shapes=(many, many, many)
    )
    boxes, scores, classes = Boxes(count, "same").tensors()
    plain, batched = exported.module()(boxes, scores, classes)
    assert plain.tolist() == nms_oracle(boxes, scores, 0.1) and len(plain) == min(count, 1)
    assert batched.tolist() == nms_oracle(boxes, scores, 0.1, classes)


def test_wrong_arguments_are_reported():
    with (
        caches_disabled(),
        pytest.raises(RuntimeError, match=r"scores must be one for each box; there are 3 and 2 boxes"),
    ):
        torch.compile(nms, fullgraph=True)(torch.ones(2, 4), torch.ones(3), 0.5)
