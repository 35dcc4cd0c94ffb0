"""What multiscale_roi_align means: on which map each box is, values and gradients of all maps, checks, the module."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from typing import Any

import inductor_vision
import pytest
import torch
from hypothesis import given, strategies as st
from inductor_vision import MultiScaleRoIAlign, multiscale_roi_align, roi_align
from inductor_vision.ops.multiscale_roi_align import _infer_scales, assign_levels
from inductor_vision.ops.registry import TORCHVISION_PYTHON
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.layouts import LAYOUTS
from inductor_vision.tests.support.regions import (
    PYRAMIDS,
    Pyramid,
    PyramidSample,
    pyramid,
    pyramid_gradient_oracle,
    pyramid_oracle,
)
from torch import Tensor, nn
from torch.export import Dim

OP = torch.ops.inductor_vision.roi_align.default

LOW_DTYPES = (torch.bfloat16, torch.float16)
# torchvision's kernels fail on NaN, and do not know aligned=True here.
OF_TORCHVISION = [name for name, case in PYRAMIDS.items() if case.boxes != "hostile" and not case.aligned]

every_pyramid = pytest.mark.parametrize("name", PYRAMIDS)


def call(s: PyramidSample) -> Tensor:
    return multiscale_roi_align(*s.arguments, **s.kwargs)


def as_module(s: PyramidSample, library: Any) -> Tensor:
    """The call with torchvision's interface."""
    case = s.case
    names = [f"level {level}" for level in case.levels]
    module = library.MultiScaleRoIAlign(
        names,
        case.bins,
        case.sampling_ratio,
        canonical_scale=case.canonical_scale,
        canonical_level=case.canonical_level,
    )
    return module(dict(zip(names, s.features)), s.boxes, [case.image] * case.batch)


def gradients(s: PyramidSample, of=call) -> tuple[Tensor, ...]:
    features = [feature.detach().requires_grad_() for feature in s.features]
    return torch.autograd.grad(of(dataclasses.replace(s, features=features)), features, s.gradient)


def assert_same_gradients(actual, expected, dtype: torch.dtype) -> None:
    assert len(actual) == len(expected)
    for level, (a, b) in enumerate(zip(actual, expected)):
        assert_close(a, b, dtype, f"gradient of map {level}")


# Levels


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_levels_are_torchvisions(torchvision, name):
    """A box on no level has there the level of NaN as an integer."""
    s = pyramid(name)
    finest, coarsest = s.case.levels[0], s.case.levels[-1]
    theirs = torchvision.ops.poolers.LevelMapper(finest, coarsest, s.case.canonical_scale, s.case.canonical_level)
    expected = theirs(s.boxes)
    expected = torch.where((expected >= 0) & (expected <= coarsest - finest), expected, -1)
    actual = assign_levels(s.rois, finest, coarsest, s.case.canonical_scale, s.case.canonical_level)
    assert actual.dtype == torch.int64 and torch.equal(actual, expected)
    if finest < coarsest:  # one map has all boxes
        assert torch.equal(s.levels, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("width", "height", "level"),
    [
        (224, 224, 4),
        (448, 112, 4),
        (223, 224, 3),
        (223.999, 223.999, 3),
        (223.9999, 223.9999, 4),
        (447, 447, 4),
        (448, 448, 5),
        (112, 112, 3),
        (111, 112, 2),
        (1, 1, 2),
        (0, 50, 2),
        (0, 0, 2),
        (1e4, 1e4, 5),
        (1e30, 1e30, 5),
        (math.inf, 5, 5),
        (-300, -300, 4),
        (-5, 5, None),
        (5, -1e9, None),
        (math.nan, 5, None),
        (math.inf, 0, None),
        (math.inf, -5, None),
    ],
)
def test_which_level(width, height, level, dtype):
    rois = torch.tensor([[0, 0, 0, width, height]], dtype=dtype)
    assert assign_levels(rois, 2, 5, 224, 4).item() == (-1 if level is None else level - 2)


@pytest.mark.parametrize("name", [name for name, case in PYRAMIDS.items() if case.regions > 10])
def test_samples_are_on_all_levels(name):
    s = pyramid(name)
    on_one_map = len(s.features) == 1
    assert sorted(set(s.levels.tolist())) == list(range(0 if on_one_map else -1, len(s.features)))


def test_with_one_map_all_boxes_are_on_it():
    s = pyramid("one_level", torch.float64)
    assert torch.equal(call(s), roi_align(s.features[0], s.rois, s.case.bins, s.scales[0], s.case.sampling_ratio))


# Values and gradients


@every_pyramid
def test_decomposition_is_the_oracle(name):
    s = pyramid(name, torch.float64)
    with recorded_paths() as paths:
        out = call(s)
    assert [(path.op, path.kind) for path in paths] == [("roi_align", "eager")]
    assert_close(out, pyramid_oracle(s), torch.float64)
    assert_same_gradients(gradients(s), pyramid_gradient_oracle(s), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_values_and_gradients_are_torchvisions(torchvision, name, dtype):
    s = pyramid(name, dtype)
    theirs = as_module(s, torchvision.ops)
    assert_close(call(s), theirs, dtype)
    assert_close(as_module(s, inductor_vision), theirs, dtype)
    expected = gradients(s, lambda s: as_module(s, torchvision.ops))
    assert_same_gradients(gradients(s), expected, dtype)
    assert_same_gradients(gradients(s, lambda s: as_module(s, inductor_vision)), expected, dtype)


@st.composite
def pyramids(draw: st.DrawFn) -> Pyramid:
    levels = draw(st.integers(1, 4))
    finest = draw(st.integers(1, 3))
    batch = draw(st.integers(1, 3))
    return Pyramid(
        batch=batch,
        channels=draw(st.integers(1, 4)),
        levels=tuple(range(finest, finest + levels)),
        bins=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        regions=draw(st.integers(0, 8)),
        sampling_ratio=draw(st.integers(-1, 3)),
        canonical_scale=draw(st.integers(8, 64)),
        canonical_level=draw(st.integers(1, 5)),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@given(case=pyramids())
def test_any_pyramid_is_the_oracle(case):
    s = pyramid(case, torch.float64)
    assert_close(call(s), pyramid_oracle(s), torch.float64)
    assert_same_gradients(gradients(s), pyramid_gradient_oracle(s), torch.float64)


@pytest.mark.parametrize("dtype", (torch.float32, *LOW_DTYPES), ids=str)
@pytest.mark.parametrize("name", ["plain", "aligned", "adaptive", "one_level", "channels_last", "hostile"])
def test_values_and_gradients_in_each_dtype(name, dtype):
    s = pyramid(name, dtype)
    out, grads = call(s), gradients(s)
    assert {out.dtype, *(grad.dtype for grad in grads)} == {dtype}
    assert_close(out, pyramid_oracle(s), dtype)
    assert_same_gradients(grads, pyramid_gradient_oracle(s), dtype)


def test_boxes_as_one_tensor():
    s = pyramid("plain", torch.float64)
    by_image = [s.rois[s.rois[:, 0] == image] for image in (1, 0)]
    out = multiscale_roi_align(s.features, torch.cat(by_image), *s.arguments[2:], **s.kwargs)
    assert torch.equal(out, torch.cat(call(s).split([len(boxes) for boxes in s.boxes])[::-1]))


def test_defaults():
    """As in the paper: a box of 224 pixels is on level 4."""
    features = [torch.full((1, 1, 512 >> level, 512 >> level), float(level)) for level in (2, 3, 4, 5)]
    boxes = [torch.tensor([[0, 0, side, side] for side in (100.0, 112, 223, 224, 448)])]
    scales = [2.0**-level for level in (2, 3, 4, 5)]
    out = multiscale_roi_align(features, boxes, 7, scales)
    assert out[:, 0, 3, 3].round().tolist() == [2, 3, 3, 4, 5]
    assert torch.equal(out, multiscale_roi_align(features, boxes, (7, 7), scales, -1, aligned=False))


def test_a_box_on_no_level_is_zero_and_has_no_gradient():
    s = pyramid("plain", torch.float64)
    nowhere = s.levels == -1
    assert nowhere.any() and call(s)[nowhere].eq(0).all() and call(s)[~nowhere].flatten(1).any(1).any()
    s = dataclasses.replace(s, gradient=s.gradient.masked_fill(~nowhere[:, None, None, None], 0))
    assert all(not grad.any() for grad in gradients(s))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_each_gradient_alone(wanted):
    s = pyramid("plain", torch.float64)
    features = [feature.requires_grad_(level == wanted) for level, feature in enumerate(s.features)]
    out = call(s)
    with recorded_paths() as paths:
        out.backward(s.gradient)
    assert [path.op for path in paths] == ["roi_align_backward"]
    assert [feature.grad is not None for feature in features] == [level == wanted for level in range(3)]
    assert_close(features[wanted].grad, pyramid_gradient_oracle(s)[wanted], torch.float64)


def test_gradcheck():
    s = pyramid(Pyramid(channels=2, image=(24, 32), canonical_scale=16), torch.float64)
    features = [feature.requires_grad_() for feature in s.features]
    assert torch.autograd.gradcheck(
        lambda *features: call(dataclasses.replace(s, features=list(features))), features, fast_mode=True
    )


def test_double_backward_says_that_it_is_not_supported():
    s = pyramid("plain")
    features = [feature.requires_grad_() for feature in s.features]
    (grad, *_) = torch.autograd.grad(call(s).square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="roi_align: double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_follows_the_first_map(layout):
    s = pyramid(Pyramid(layout=layout))
    channels_last = layout in ("channels_last", "sliced_channels_last")
    assert call(s).is_contiguous(memory_format=torch.channels_last) == channels_last
    s.features[1] = s.features[1].contiguous()
    assert call(s).is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("low", LOW_DTYPES, ids=str)
def test_autocast_does_not_touch_the_boxes(low):
    s = pyramid("plain")
    rounded = dataclasses.replace(s, features=[feature.to(low) for feature in s.features])
    with torch.autocast("cpu", low):
        out, from_low = call(s), call(rounded)
    assert out.dtype == torch.float32 and torch.equal(out, call(s))
    assert from_low.dtype == low and torch.equal(from_low, call(rounded))


@pytest.mark.parametrize("name", ["plain", "adaptive"])
def test_exported_with_any_number_of_boxes(name):
    s = pyramid(name)

    class Model(nn.Module):
        def forward(self, features: list[Tensor], boxes: list[Tensor]) -> Tensor:
            return multiscale_roi_align(features, boxes, *s.arguments[2:], **s.kwargs)

    model = Model()
    shapes = ([{2: Dim.AUTO, 3: Dim.AUTO}] * 3, [{0: Dim.AUTO}] * 2)
    program = torch.export.export(model, (s.features, s.boxes), dynamic_shapes=shapes)
    assert [node.target for node in program.graph.nodes].count(OP) == 1
    for case in (s.case, Pyramid(regions=9), Pyramid(image=(70, 130), regions=40)):
        other = pyramid(case)
        assert min(map(len, other.boxes)) > 1
        assert torch.equal(program.module()(other.features, other.boxes), model(other.features, other.boxes))


# Wrong arguments


def _changed(s: PyramidSample, level: int, feature: Tensor) -> dict[str, Any]:
    return {"features": [feature if i == level else other for i, other in enumerate(s.features)]}


PLAIN = pyramid("plain")
FLOATS = "torch.float32, torch.float64, torch.bfloat16, torch.float16"
MISTAKEN_SCALES = "multiscale_roi_align: spatial_scales must be powers of two, each the half of the one before, got "
WRONG_NUMBER = "multiscale_roi_align: there must be a spatial scale for each feature map, and at least one, got "

# What is changed in a right call, and the error.
WRONG = {
    "fewer_scales": (
        {"spatial_scales": [0.25, 0.125]},
        ValueError,
        f"{WRONG_NUMBER}3 maps and 2 scales",
    ),
    "no_maps": (
        {"features": [], "spatial_scales": []},
        ValueError,
        f"{WRONG_NUMBER}0 maps and 0 scales",
    ),
    "equal_scales": (
        {"spatial_scales": [0.25, 0.25, 0.25]},
        ValueError,
        f"{MISTAKEN_SCALES}[0.25, 0.25, 0.25]",
    ),
    "a_level_is_missing": (
        {"spatial_scales": [0.25, 0.125, 0.03125]},
        ValueError,
        f"{MISTAKEN_SCALES}[0.25, 0.125, 0.03125]",
    ),
    "from_coarse_to_fine": (
        {"spatial_scales": [0.0625, 0.125, 0.25]},
        ValueError,
        f"{MISTAKEN_SCALES}[0.0625, 0.125, 0.25]",
    ),
    "boxes_of_four_columns": (
        {"boxes": torch.zeros(3, 4)},
        AssertionError,
        "multiscale_roi_align: boxes as one tensor must be [K, 5], rows of (image, x1, y1, x2, y2); got (3, 4)",
    ),
    "no_boxes": (
        {"boxes": None},
        AssertionError,
        "multiscale_roi_align: boxes must be a [K, 5] tensor or a list of [L, 4] tensors, got NoneType",
    ),
    "rank": (
        _changed(PLAIN, 0, torch.zeros(5, 13, 18)),
        RuntimeError,
        "roi_align: features[0] must have 4 dimensions, got shape (5, 13, 18)",
    ),
    "rank_of_another": (
        _changed(PLAIN, 2, torch.zeros(5, 4, 5)),
        RuntimeError,
        "roi_align: features[2] must have 4 dimensions, got shape (5, 4, 5)",
    ),
    "integers": (
        _changed(PLAIN, 1, torch.zeros(2, 5, 7, 9, dtype=torch.int64)),
        RuntimeError,
        f"roi_align: features[1] must be one of {FLOATS}, got torch.int64",
    ),
    "dtype": (
        _changed(PLAIN, 1, torch.zeros(2, 5, 7, 9, dtype=torch.bfloat16)),
        RuntimeError,
        "roi_align: features[1] must have the dtype of the first map, torch.float32, got torch.bfloat16",
    ),
    "device": (
        _changed(PLAIN, 1, torch.zeros(2, 5, 7, 9, device="meta")),
        RuntimeError,
        "roi_align: features[1] must have the device of the first map, cpu, got meta",
    ),
    "batch": (
        _changed(PLAIN, 2, torch.zeros(3, 5, 4, 5)),
        RuntimeError,
        "roi_align: features[2] must have the batch of the first map, 2, got 3",
    ),
    "channels": (
        _changed(PLAIN, 1, torch.zeros(2, 6, 7, 9)),
        RuntimeError,
        "roi_align: features[1] must have the number of channels of the first map, 5, got 6",
    ),
    "no_height": (
        _changed(PLAIN, 1, torch.zeros(2, 5, 0, 9)),
        RuntimeError,
        "roi_align: features[1] must have a positive height and width, got shape (2, 5, 0, 9)",
    ),
    "output_size": (
        {"output_size": 0},
        RuntimeError,
        "roi_align: output_size must be positive, got (0, 0)",
    ),
    "images": (
        {"boxes": [torch.zeros(1, 4)] * 3},
        RuntimeError,
        "roi_align: boxes name an image that does not exist",
    ),
    "dtype_of_boxes": (
        {"boxes": torch.zeros(1, 5, dtype=torch.float64)},
        RuntimeError,
        "roi_align: boxes must be float32, bfloat16 or float16, or have input's dtype torch.float32, got torch.float64",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    changes, error, message = WRONG[wrong]
    right = {
        "features": PLAIN.features,
        "boxes": PLAIN.boxes,
        "output_size": 2,
        "spatial_scales": PLAIN.scales,
    }
    multiscale_roi_align(**right)
    with pytest.raises(error, match=re.escape(message)):
        multiscale_roi_align(**{**right, **changes})


# The module


def test_signature_is_torchvisions(torchvision):
    def described(function) -> list[tuple]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert described(MultiScaleRoIAlign) == described(torchvision.ops.MultiScaleRoIAlign)
    assert described(MultiScaleRoIAlign.forward) == described(torchvision.ops.MultiScaleRoIAlign.forward)


@pytest.mark.parametrize("options", [(["0", "1"], 7, 2), (["0"], (3, 5), -1)], ids=str)
def test_module_is_torchvisions(torchvision, options):
    ours, theirs = MultiScaleRoIAlign(*options), torchvision.ops.MultiScaleRoIAlign(*options)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict() == theirs.state_dict() == {}
    for name in ("featmap_names", "output_size", "sampling_ratio", "canonical_scale", "canonical_level"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_module_takes_the_maps_that_it_is_told_to():
    """In the order in which they are given, which must be from fine to coarse."""
    s = pyramid("plain", torch.float64)
    maps = dict(zip("abc", s.features))
    maps = {"not used": torch.zeros(1), "a": maps["a"], "b": maps["b"], "pool": torch.zeros(1), "c": maps["c"]}
    module = MultiScaleRoIAlign(["c", "a", "b"], s.case.bins, 2, canonical_scale=32, canonical_level=3)
    assert torch.equal(module(maps, s.boxes, [s.case.image] * 2), call(s))


def test_the_largest_image_decides_the_scales(torchvision):
    s = pyramid("plain", torch.float64)
    names = list("abc")
    images = [(30, 70), (50, 20)]
    for library in (MultiScaleRoIAlign, torchvision.ops.MultiScaleRoIAlign):
        module = library(names, s.case.bins, 2, canonical_scale=32, canonical_level=3)
        assert_close(module(dict(zip(names, s.features)), s.boxes, images), call(s), torch.float64)


def test_module_on_images_of_another_size():
    """The scales are of each call; torchvision's module keeps those of its first."""
    s = pyramid("plain", torch.float64)
    names = list("abc")
    module = MultiScaleRoIAlign(names, s.case.bins, 2, canonical_scale=32, canonical_level=3)
    maps = dict(zip(names, s.features))
    half = module(maps, s.boxes, [(25, 35)] * 2)
    assert torch.equal(module(maps, s.boxes, [(50, 70)] * 2), call(s))
    scales = [2 * scale for scale in s.scales]
    expected = multiscale_roi_align(s.features, s.boxes, s.case.bins, scales, 2, canonical_scale=32, canonical_level=3)
    assert torch.equal(half, expected) and not torch.equal(half, call(s))


def test_module_without_maps_or_images():
    s = pyramid("plain")
    module = MultiScaleRoIAlign(["c"], 2, 2)
    with pytest.raises(ValueError, match=re.escape("MultiScaleRoIAlign: none of ['c'] is among the maps ['a', 'b']")):
        module(dict(zip("ab", s.features)), s.boxes, [s.case.image] * 2)
    with pytest.raises(ValueError, match="MultiScaleRoIAlign: image_shapes must not be empty"):
        module(dict(zip("abc", s.features)), s.boxes, [])


def test_module_on_maps_with_a_level_missing():
    """torchvision's module puts boxes on wrong maps then, or on none."""
    s = pyramid("plain")
    module = MultiScaleRoIAlign(["a", "c"], 2, 2)
    with pytest.raises(ValueError, match=re.escape(MISTAKEN_SCALES + "[0.25, 0.0625]")):
        module(dict(zip("abc", s.features)), s.boxes, [s.case.image] * 2)


# What stands for torchvision's module in compiled code

replacement = TORCHVISION_PYTHON["ops.poolers.MultiScaleRoIAlign.forward"]


@pytest.fixture
def stock(torchvision_python):
    """Makes modules of torchvision, whose forward is its own in eager mode."""

    def make(names: str, case: Any, ratio: int = 2) -> nn.Module:
        scale, level = case.canonical_scale, case.canonical_level
        return torchvision_python.ops.MultiScaleRoIAlign(
            list(names), case.bins, ratio, canonical_scale=scale, canonical_level=level
        )

    return make


@pytest.mark.parametrize("maps", [(0,), (0, 1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("images", [[(50, 70)], [(30, 70), (50, 20)], [(57, 70)], [(40, 61)]], ids=str)
def test_scales_of_torchvisions_module(torchvision_python, images, maps):
    features = [pyramid("plain").features[i] for i in maps]
    assert _infer_scales(features, images) == torchvision_python.ops.poolers._setup_scales(features, images, 32, 3)[0]


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_values_of_torchvisions_module(stock, name):
    s = pyramid(name, torch.float64)
    names = "abcdef"[: len(s.features)]
    module = stock(names, s.case, s.case.sampling_ratio)
    arguments = (dict(zip(names + "x", [*s.features, s.features[0]])), s.boxes, [s.case.image])
    out = replacement(module, *arguments)
    assert module.scales is None  # nothing for which a compiled model would have to be compiled again
    assert_close(out, module(*arguments), torch.float64)
    assert module.scales is not None
    assert torch.equal(out, replacement(module, *arguments))


def test_scales_that_torchvisions_module_has_already(stock):
    s = pyramid("plain", torch.float64)
    module = stock("abc", s.case)
    maps = dict(zip("abc", s.features))
    first = module(maps, s.boxes, [s.case.image])
    other_image = [tuple(2 * length for length in s.case.image)]
    assert torch.equal(first, module(maps, s.boxes, other_image))
    assert_close(replacement(module, maps, s.boxes, other_image), first, torch.float64)


def test_values_of_torchvisions_module_with_a_level_missing(stock):
    """Boxes of the second level are on the second map, which is of the third; boxes of the third are on none."""
    s = pyramid("plain", torch.float64)
    module = stock("ac", s.case)
    arguments = (dict(zip("abc", s.features)), s.boxes, [s.case.image])
    out = replacement(module, *arguments)
    assert out[s.levels == 2].eq(0).all() and out[s.levels == 1].any()
    assert_close(out, module(*arguments), torch.float64)


def test_values_of_torchvisions_module_on_maps_of_different_dtypes(stock):
    """As autocast makes them. torchvision pools from each in its own; boxes here in the first's."""
    s = pyramid("plain")
    module = stock("abc", s.case)
    features = [s.features[0], s.features[1].bfloat16(), s.features[2]]
    rounded = [feature.float() for feature in features]
    out = replacement(module, dict(zip("abc", features)), s.boxes, [s.case.image])
    assert out.dtype == torch.float32
    assert torch.equal(out, replacement(module, dict(zip("abc", rounded)), s.boxes, [s.case.image]))


def test_torchvisions_module_without_images(stock):
    s = pyramid("plain")
    with pytest.raises(ValueError, match="image_shapes must not be empty"):
        replacement(stock("abc", s.case), dict(zip("abc", s.features)), s.boxes, [])
