"""What is fused into a template's store is computed for the right elements, whatever the sizes.

Sizes cannot tell a result from the same result transposed where they coincide, which they do for square images, square
bins, and as many channels as images.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from inductor_vision import (
    deform_conv2d,
    depthwise_separable_conv2d,
    multiscale_roi_align,
    patch_conv2d,
    ps_roi_align,
    ps_roi_pool,
    roi_align,
    roi_pool,
)
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import compile_and_run
from torch import Tensor

Size = tuple[int, int, int, int]  # of a result: B or K, C, H, W


def _rois(count: int, images: int) -> Tensor:
    corners = torch.rand(count, 2) * 12
    image = torch.arange(count).remainder(images)[:, None].float()
    return torch.cat([image, corners, corners + 1 + torch.rand(count, 2) * 8], 1)


# Of each template, what has a result of a given size: a function and its arguments, the first of them an image.
TEMPLATES: dict[str, Callable[..., tuple[Callable[..., Tensor], list[Tensor]]]] = {
    "deform_conv2d": lambda b, c, h, w: (
        lambda x, offset, weight: deform_conv2d(x, offset, weight, padding=1),
        [torch.randn(b, 3, h, w), torch.randn(b, 18, h, w), torch.randn(c, 3, 3, 3)],
    ),
    "depthwise_deform_conv2d": lambda b, c, h, w: (
        lambda x, offset, weight: deform_conv2d(x, offset, weight, padding=1),
        [torch.randn(b, c, h, w), torch.randn(b, 18, h, w), torch.randn(c, 1, 3, 3)],
    ),
    "depthwise_separable_conv2d": lambda b, c, h, w: (
        lambda x, depthwise, pointwise: depthwise_separable_conv2d(x, depthwise, pointwise, padding=1),
        [torch.randn(b, 3, h, w), torch.randn(3, 1, 3, 3), torch.randn(c, 3, 1, 1)],
    ),
    "patch_conv2d": lambda b, c, h, w: (
        lambda x, weight: patch_conv2d(x, weight, padding=1)[0],
        [torch.randn(1, b, 3, h, w), torch.randn(c, 3, 3, 3)],
    ),
    "roi_align": lambda b, c, h, w: (
        lambda x, rois: roi_align(x, rois, (h, w), 0.5, 2),
        [torch.randn(2, c, 9, 11), _rois(b, 2)],
    ),
    "roi_pool": lambda b, c, h, w: (
        lambda x, rois: roi_pool(x, rois, (h, w), 0.5),
        [torch.randn(2, c, 9, 11), _rois(b, 2)],
    ),
    "ps_roi_align": lambda b, c, h, w: (
        lambda x, rois: ps_roi_align(x, rois, (h, w), 0.5, 2),
        [torch.randn(2, c * h * w, 9, 11), _rois(b, 2)],
    ),
    "ps_roi_pool": lambda b, c, h, w: (
        lambda x, rois: ps_roi_pool(x, rois, (h, w), 0.5),
        [torch.randn(2, c * h * w, 9, 11), _rois(b, 2)],
    ),
    "multiscale_roi_align": lambda b, c, h, w: (
        lambda x, coarse, rois: multiscale_roi_align([x, coarse], rois, (h, w), [0.5, 0.25], 2),
        [torch.randn(2, c, 9, 11), torch.randn(2, c, 5, 6), _rois(b, 2)],
    ),
}


def call(template: str, size: Size, layout: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    function, (image, *others) = TEMPLATES[template](*size)
    if layout == "channels_last":
        image = image.movedim(-3, -1).contiguous().movedim(-1, -3)
    return function, [image, *others]


def shapes_of(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """What a tensor of this size may be viewed as: neighbours merged, the last split, ones in between."""
    b, c, h, w = size
    shapes = [size, (b * c, h, w), (b, c * h * w), (b, c * h, w), (b, c, h * w), (b * c * h * w,), (b, 1, c, h, w)]
    return [*shapes, *([(b, c, h, w // 2, 2)] if w % 2 == 0 else [])]


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What becomes of a result: it is permuted, viewed as another shape, and computed with.

    Attributes:
        order: of the dimensions.
        shape: which of `shapes_of` it is viewed as.
        compute: "relu"; "add" or "multiply" another tensor in one memory format or the other; "sum" with itself, not
            permuted, where that has the same shape.
        then: None; "copy" to contiguous memory, or "channels_last", of what is returned as well; "again": a second
            step from there; "expand": along a new last dimension.
    """

    order: tuple[int, ...] = (0, 1, 2, 3)
    shape: int = 0
    compute: str = "relu"
    then: str | None = None

    def __call__(self, y: Tensor) -> list[Tensor]:
        own = y
        y = y.permute(self.order)
        shapes = shapes_of(tuple(y.shape))
        y = y.reshape(shapes[self.shape % len(shapes)])
        if self.compute in ("add", "multiply"):
            other = torch.arange(y.numel(), dtype=y.dtype).remainder(7).view(y.shape)
            y = y + other if self.compute == "add" else y * other.transpose(0, -1).contiguous().transpose(0, -1)
        elif self.compute == "sum" and y.shape == own.shape:
            y = y + own
        else:
            y = y.relu()
        if self.then == "copy":
            return [y, y.contiguous()]
        if self.then == "channels_last" and y.dim() == 4:
            return [y, y.contiguous(memory_format=torch.channels_last)]
        if self.then == "again":
            return [y, y.sigmoid() * y.flip(0)]
        if self.then == "expand":
            return [y, y[..., None] * torch.ones(3, dtype=y.dtype)]
        return [y]


def compare(
    template: str, size: Size, layout: str, epilogues: list[Epilogue], shared: bool, dynamic: bool | None = None
) -> int:
    """Compile the epilogues, of one result or each of its own, compare with eager mode; how many nodes were fused."""
    function, arguments = call(template, size, layout)

    def run(arguments: list[Tensor]) -> list[list[Tensor]]:
        image, *others = arguments
        if shared:
            result = function(image, *others)
            return [epilogue(result) for epilogue in epilogues]
        # Each call's image is its own, or all calls would be one.
        return [epilogue(function(image * (i + 1), *others)) for i, epilogue in enumerate(epilogues)]

    compiled = compile_and_run(run, arguments, dynamic=dynamic, config={"cpp_wrapper": True})
    assert compiled.templates == (1 if shared else len(epilogues))
    expected = run([argument.double() for argument in arguments])
    for epilogue, results, values in zip(epilogues, compiled.result, expected):
        for result, value in zip(results, values, strict=True):
            assert_close(result, value, torch.float32, f"{template}, {size}, {layout}: {epilogue}")
    return compiled.fused


@pytest.mark.parametrize("layout", ["contiguous", pytest.param("channels_last", marks=pytest.mark.slow)])
@pytest.mark.parametrize("template", TEMPLATES)
def test_all_permutations_of_a_result_whose_sizes_are_all_equal(template, layout):
    orders = list(itertools.permutations(range(4)))
    fused = compare(template, (4, 4, 4, 4), layout, [Epilogue(order) for order in orders], shared=True)
    assert fused == len(orders)  # what is stored where the result would be is fused, whatever its order


def test_each_permutation_alone():
    orders = list(itertools.permutations(range(4)))
    assert compare("roi_align", (3, 3, 3, 3), "channels_last", [Epilogue(o) for o in orders], shared=False) == 24


@pytest.mark.parametrize("then", ["copy", "channels_last", "expand"])
def test_what_is_stored_elsewhere_is_not_fused(then):
    """A copy in another order beside what it is of, and a result along which another is repeated."""
    epilogues = [Epilogue(order, then=then) for order in ((0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 2, 3))]
    fused = compare("roi_align", (4, 4, 4, 4), "contiguous", epilogues, shared=False)
    assert fused <= len(epilogues)  # the activation of each, and nothing behind it


def coinciding_sizes() -> st.SearchStrategy[Size]:
    """Sizes of which most are equal, or one."""
    return st.tuples(*[st.sampled_from([4, 4, 1, 2, 5])] * 4)


def epilogues() -> st.SearchStrategy[Epilogue]:
    return st.builds(
        Epilogue,
        order=st.permutations(range(4)).map(tuple),
        shape=st.integers(0, 7),
        compute=st.sampled_from(["relu", "add", "multiply", "sum"]),
        then=st.sampled_from([None, None, "copy", "channels_last", "again", "expand"]),
    )


# Each is compiled, with all its programs.
@pytest.mark.slow
@settings(max_examples=settings.default.max_examples // 8, suppress_health_check=[HealthCheck.too_slow])
@given(
    template=st.sampled_from(sorted(TEMPLATES)),
    size=coinciding_sizes(),
    layout=st.sampled_from(["contiguous", "channels_last"]),
    programs=st.lists(epilogues(), min_size=4, max_size=8, unique=True),
    shared=st.booleans(),
    dynamic=st.sampled_from([None, True]),
)
def test_any_epilogue(template, size, layout, programs, shared, dynamic):
    torch._dynamo.reset()
    compare(template, size, layout, programs, shared, dynamic)


def test_gradients_of_a_transposed_square():
    x, offset, weight = torch.randn(2, 8, 12, 12), torch.randn(2, 18, 12, 12), torch.randn(8, 8, 3, 3)

    def step(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, offset, weight)]
        out = function(*leaves)
        out.backward(torch.arange(out.numel(), dtype=dtype).view(out.shape) / math.prod(out.shape))
        return [out, *(leaf.grad for leaf in leaves)]

    def transposed(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return deform_conv2d(x, offset, weight, padding=1).mT.relu()

    expected = step(transposed, torch.float64)
    compiled = torch.compile(transposed, fullgraph=True, options={"cpp_wrapper": True})
    for result, value in zip(step(compiled, torch.float32), expected, strict=True):
        assert_close(result, value, torch.float32)
