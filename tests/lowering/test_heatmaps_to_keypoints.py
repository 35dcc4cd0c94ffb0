"""What heatmaps_to_keypoints compiles to."""

from __future__ import annotations

import pytest
import torch
from inductor_vision import accelerate_torchvision
from inductor_vision.ops.heatmaps_to_keypoints import heatmaps_to_keypoints
from inductor_vision.tests.support.compiled import caches_disabled, compile_and_run
from inductor_vision.tests.support.heatmaps_to_keypoints import CALLS, NAN, NO_BOXES, Heatmaps, assert_keypoints
from torch import Tensor

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture(scope="module")
def compiled():
    return compile_and_run(heatmaps_to_keypoints, *Heatmaps().tensors(), dynamic=True)


def test_takes_the_template(compiled):
    assert compiled.kinds == ["template"]
    assert compiled.templates == 1
    assert_keypoints(compiled.result, *Heatmaps().tensors())


def test_values(compiled):
    """Sizes of 0 and 1, for which torch.compile makes a graph of their own, are in the test of packages."""
    compiled.function(*Heatmaps().tensors())
    with torch.compiler.set_stance("fail_on_recompile"):
        for call in CALLS:
            if min(call.count, call.keypoints, *call.size) > 1:
                assert_keypoints(compiled.function(*call.tensors()), *call.tensors())


def test_every_number_of_threads_gives_the_same(compiled):
    maps, rois = Heatmaps(count=40, keypoints=2, boxes="wide").tensors()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(compiled.function(maps, rois))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result))


def test_boxes_that_are_none(compiled):
    maps, rois = Heatmaps().tensors()
    compiled.function(maps, rois)
    with torch.compiler.set_stance("fail_on_recompile"):
        for box in NO_BOXES:
            wrong = rois.clone()
            wrong[3] = torch.tensor(box)
            with pytest.raises(
                RuntimeError,
                match=r"^heatmaps_to_keypoints: rois must be finite and of less than 2\^31 pixels, rois\[3\] is not$",
            ):
                compiled.function(maps, wrong)
        assert_keypoints(compiled.function(maps, rois), maps, rois)


@pytest.mark.parametrize(
    ("dtype", "rois_dtype", "cpp_wrapper"),
    [
        (torch.float64, torch.float64, False),
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float16, False),
    ],
    ids=str,
)
def test_dtypes(dtype, rois_dtype, cpp_wrapper):
    maps, rois = Heatmaps(dtype=dtype, rois_dtype=rois_dtype).tensors()
    compiled = compile_and_run(heatmaps_to_keypoints, maps, rois, config={"cpp_wrapper": cpp_wrapper})
    assert compiled.kinds == ["template"]
    assert_keypoints(compiled.result, maps, rois)


def test_strided_views_and_neighbours():
    """Boxes are columns of a table, maps are channels_last or a part of others, and are computed in the same graph."""

    def detect(maps: Tensor, part: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        rois = table[:, 1::2]
        return (*heatmaps_to_keypoints(maps, rois), *heatmaps_to_keypoints(part * 2, rois + 1))

    maps, rois = Heatmaps(layout="channels_last").tensors()
    part, _ = Heatmaps(layout="sliced").tensors()
    table = torch.full((len(rois), 9), NAN)
    table[:, 1::2] = rois
    compiled = compile_and_run(detect, maps, part, table)
    assert compiled.kinds == ["template"] * 2
    assert_keypoints(compiled.result[:2], maps, rois)
    assert_keypoints(compiled.result[2:], part * 2, rois + 1)


def test_stock_function_for_as_many_boxes_as_data_say(torchvision_python):
    accelerate_torchvision()

    def best(maps: Tensor, rois: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        good = scores > 0
        return torchvision_python.models.detection.roi_heads.heatmaps_to_keypoints(maps[good], rois[good])

    maps, rois = Heatmaps().tensors()
    scores = torch.tensor([1.0, -1, 1, -1, 1])
    compiled = compile_and_run(best, maps, rois, scores)
    assert compiled.kinds == ["template"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for good in (scores, -scores, scores.abs(), -scores.abs(), scores - scores.new_tensor([0.0, 0, 9, 9, 9])):
            assert_keypoints(compiled.function(maps, rois, good), maps[good > 0], rois[good > 0])


def test_wrong_arguments_are_reported():
    with caches_disabled(), pytest.raises(RuntimeError, match="rois must be one for each of maps; there are 3 and 2"):
        torch.compile(heatmaps_to_keypoints, fullgraph=True)(torch.ones(2, 3, 4, 5), torch.ones(3, 4))
