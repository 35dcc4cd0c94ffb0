"""What heatmaps_to_keypoints means."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from hypothesis import given, strategies as st
from inductor_vision.ops.heatmaps_to_keypoints import heatmaps_to_keypoints
from inductor_vision.tests.support.heatmaps_to_keypoints import CALLS, INF, NAN, NO_BOXES, Heatmaps, assert_keypoints
from inductor_vision.tests.support.layouts import LAYOUTS
from torch._subclasses import FakeTensorMode

OP = torch.ops.inductor_vision.heatmaps_to_keypoints.default
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def original(torchvision_python):
    """torchvision's function; in eager mode it is what it was, also where another takes its place in compiled code."""
    return torchvision_python.models.detection.roi_heads.heatmaps_to_keypoints


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_values(call):
    maps, rois = call.tensors()
    assert_keypoints(heatmaps_to_keypoints(maps, rois), maps, rois)


@pytest.mark.parametrize("call", [call for call in CALLS if call.keypoints > 0], ids=str)  # else torchvision's fails
def test_torchvisions_values(call, original):
    maps, rois = call.tensors()
    theirs = original(maps, rois)
    assert_keypoints(theirs, maps, rois)
    for our, their in zip(heatmaps_to_keypoints(maps, rois), theirs):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rois_dtype", DTYPES, ids=str)
def test_dtypes(dtype, rois_dtype):
    maps, rois = Heatmaps(dtype=dtype, rois_dtype=rois_dtype).tensors()
    result = heatmaps_to_keypoints(maps, rois)
    assert_keypoints(result, maps, rois)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, heatmaps_to_keypoints(maps, rois), result))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(default):
    maps, rois = Heatmaps(boxes="wide").tensors()
    result = heatmaps_to_keypoints(maps, rois)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert all(map(torch.equal, heatmaps_to_keypoints(maps, rois), result))
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    maps, rois = Heatmaps(layout=layout).tensors()
    table = torch.full((len(rois), 9), NAN)
    table[:, 1::2] = rois
    assert_keypoints(heatmaps_to_keypoints(maps, table[:, 1::2]), maps, rois)


def test_known_places():
    """Resized from 2 x 3 to 4 x 9, and each pixel of that is half a pixel and a third of one."""
    maps = torch.zeros(1, 2, 2, 3)
    maps[0, 0, 1, 2], maps[0, 1, 0, 1] = 1, 2
    points, scores = heatmaps_to_keypoints(maps, torch.tensor([[10.0, 20, 18.1, 23.2]]))
    # Beyond the border are copies: the weights of the pixel at it are summed up.
    torch.testing.assert_close(points[0, 0], torch.tensor([10 + 8.5 * 0.9, 20 + 3.5 * 0.8, 1]))
    torch.testing.assert_close(points[0, 1], torch.tensor([10 + 4.5 * 0.9, 20 + 0.5 * 0.8, 1]))
    third, quarter = (-0.75 * (x**3 - 5 * x**2 + 8 * x - 4) for x in (4 / 3, 5 / 4))
    torch.testing.assert_close(scores[0], torch.tensor([(1 - third) * (1 - quarter), 2 * (1 - quarter)]))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_the_first_of_equal_maxima(value):
    maps = torch.full((1, 1, 4, 8), value)
    for width, height in ((4, 2), (8, 4), (32, 8)):  # the weights are exact
        points, scores = heatmaps_to_keypoints(maps, torch.tensor([[0.0, 0, width, height]]))
        assert (points.tolist(), scores.tolist()) == ([[[0.5, 0.5, 1]]], [[value]])


def test_nan_is_the_greatest():
    maps = torch.full((1, 2, 4, 4), INF)
    maps[0, 1], maps[0, 1, 2, 1] = 5.0, NAN
    points, scores = heatmaps_to_keypoints(maps, torch.tensor([[0.0, 0, 4, 4]]))
    assert points.tolist() == [[[0.5, 0.5, 1], [0.5, 0.5, 1]]]  # a weight of zero times NaN is NaN, as in aten
    assert scores.isnan().all()


@given(st.data())
def test_any_call(data):
    size = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    values = st.lists(st.integers(-3, 3), min_size=size[0] * size[1], max_size=size[0] * size[1])
    maps = torch.tensor(data.draw(values), dtype=torch.float32).reshape(1, 1, *size)
    rois = torch.tensor([data.draw(st.tuples(*[st.floats(-20, 20, width=16)] * 4))])
    assert_keypoints(heatmaps_to_keypoints(maps, rois), maps, rois)


def test_opcheck():
    pytest.importorskip("expecttest")
    torch.library.opcheck(OP, Heatmaps().tensors())


def test_results_have_no_gradient():
    maps, rois = Heatmaps().tensors()
    points, scores = heatmaps_to_keypoints(maps.requires_grad_(), rois.requires_grad_())
    assert not points.requires_grad and not scores.requires_grad


MAPS, ROIS = torch.ones(2, 3, 4, 5), torch.ones(2, 4)

WRONG = {
    "maps must be [K, N, H, W], got (3, 4, 5)": (MAPS[0], ROIS),
    "maps must have a positive height and width, got (2, 3, 0, 5)": (MAPS[:, :, :0], ROIS),
    "maps must have a positive height and width, got (2, 3, 4, 0)": (MAPS[..., :0], ROIS),
    "rois must be [K, 4], got (2, 5)": (MAPS, torch.ones(2, 5)),
    "rois must be [K, 4], got (4,)": (MAPS, ROIS[0]),
    "rois must be one for each of maps; there are 3 and 2 maps": (MAPS, torch.ones(3, 4)),
    "maps must be of a floating dtype, got torch.int64": (MAPS.long(), ROIS),
    "rois must be of a floating dtype, got torch.complex64": (MAPS, ROIS.to(torch.complex64)),
    "rois must be on cpu, got meta": (MAPS, ROIS.to("meta")),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    """The fake kernel raises what eager mode raises."""
    for mode in (contextlib.nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, pytest.raises(RuntimeError, match=f"^heatmaps_to_keypoints: {re.escape(message)}"):
            heatmaps_to_keypoints(*WRONG[message])


@pytest.mark.parametrize("rois_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("keypoints", [0, 3])
def test_boxes_that_are_none(rois_dtype, keypoints):
    maps, rois = Heatmaps(keypoints=keypoints, rois_dtype=rois_dtype).tensors()
    for box in NO_BOXES:
        rois[3] = torch.tensor(box)
        with pytest.raises(RuntimeError, match=r"^heatmaps_to_keypoints: rois must be finite .*, rois\[3\] is not"):
            heatmaps_to_keypoints(maps, rois)
