"""Suppression with results of a fixed size: what it means, and that no graph has a size that depends on data."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import inductor_vision
import pytest
import torch
from inductor_vision.tests.support.boxes import Boxes, RotatedBoxes
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.export import Dim

NAMES = ("nms", "batched_nms", "nms_rotated", "batched_nms_rotated", "soft_nms", "batched_soft_nms")
every_function = pytest.mark.parametrize("name", NAMES)


def tensors_of(name: str, count: int = 90) -> tuple[Tensor, ...]:
    boxes, scores, classes = (RotatedBoxes if "rotated" in name else Boxes)(count).tensors()
    return (boxes, scores, classes) if name.startswith("batched") else (boxes, scores)


def function(name: str) -> Callable[..., Any]:
    return functools.partial(getattr(inductor_vision, name), iou_threshold=0.1)


def at_most(name: str, most: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What the plain function makes of the tensors, cut off and filled up."""
    result = function(name)(*tensors)
    results = result if isinstance(result, tuple) else (result,)
    count = min(most, len(results[0]))
    fixed = [torch.full((most,), padding, dtype=r.dtype) for r, padding in zip(results, (-1, 0))]
    for full, part in zip(fixed, results):
        full[:count] = part[:count]
    return *fixed, torch.tensor(count)


def assert_same(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=0, atol=0)


@every_function
@pytest.mark.parametrize("count", [0, 1, 90])
def test_values(name, count):
    tensors = tensors_of(name, count)
    for most in (0, 1, 7, 90, 200):
        assert_same(function(name)(*tensors, max_detections=most), at_most(name, most, *tensors))


@every_function
def test_there_are_fewer_and_more_than_asked_for(name):
    """So that the values above are of both."""
    (*_, few), (*_, all) = (function(name)(*tensors_of(name), max_detections=most) for most in (7, 200))
    assert few == 7 and 7 < all < 200


@every_function
def test_none_is_the_plain_result(name):
    parameter = inspect.signature(getattr(inductor_vision, name)).parameters["max_detections"]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default is None
    plain, none = (function(name)(*tensors_of(name), **more) for more in ({}, {"max_detections": None}))
    assert_same(*((r if isinstance(r, tuple) else (r,)) for r in (none, plain)))


@every_function
def test_a_negative_number_is_refused(name):
    with pytest.raises(ValueError, match=re.escape(f"{name}: max_detections must not be negative, got -1")):
        function(name)(*tensors_of(name), max_detections=-1)


class Suppress(nn.Module):
    """All functions on as many boxes each, rotated and not."""

    def forward(self, boxes: Tensor, rotated: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        for name in NAMES:
            tensors = (rotated if "rotated" in name else boxes), scores, classes
            results += function(name)(*tensors[: 3 if name.startswith("batched") else 2], max_detections=20)
        return tuple(results)


def boxes_for_all(count: int) -> tuple[Tensor, ...]:
    boxes, scores, classes = tensors_of("batched_nms", count)
    return boxes, RotatedBoxes(count).tensors()[0], scores, classes


def test_default_compilation_has_one_graph():
    counters.clear()
    compiled = torch.compile(Suppress(), backend="aot_eager", dynamic=True)
    for count in (90, 12):
        assert_same(compiled(*boxes_for_all(count)), Suppress()(*boxes_for_all(count)))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("many", [None, Dim.DYNAMIC])
def test_exported_sizes_do_not_depend_on_data(many):
    dims = None if many is None else tuple({0: many} for _ in range(4))
    exported = torch.export.export(Suppress(), boxes_for_all(90), dynamic_shapes=dims)
    for result in exported.graph.find_nodes(op="output")[0].args[0]:
        assert result.meta["val"].shape in ((20,), ())
    symbols = {
        str(symbol)
        for node in exported.graph.nodes
        if isinstance(value := node.meta.get("val"), Tensor)
        for size in value.shape
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }
    assert len(symbols) == (0 if many is None else 1)
    for count in (90,) if many is None else (90, 2, 12):
        assert_same(exported.module()(*boxes_for_all(count)), Suppress()(*boxes_for_all(count)))


@every_function
def test_vmap_is_a_loop(name):
    calls = [tensors_of(name, 30) for _ in range(3)]
    calls = [(boxes + i, scores * (i + 1) / 4, *rest) for i, (boxes, scores, *rest) in enumerate(calls)]
    batched = [torch.stack(tensors) for tensors in zip(*calls)]
    results = torch.vmap(functools.partial(function(name), max_detections=9))(*batched)
    for i, call in enumerate(calls):
        assert_same(tuple(result[i] for result in results), at_most(name, 9, *call))


@every_function
def test_vmap_says_that_sizes_depend_on_data(name):
    batched = [torch.stack([tensor, tensor]) for tensor in tensors_of(name)]
    message = f"{name}: how many boxes are kept depends on data, which torch.vmap does not support; give max_detections"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.vmap(function(name))(*batched)
    with pytest.raises(RuntimeError, match="dynamic shape"):
        torch.compile(torch.vmap(function(name)), backend="aot_eager", fullgraph=True)(*batched)


BREAKS = {"function": 1, "caller": 2}  # of its own, and that of what calls it


@pytest.mark.parametrize("of", BREAKS)
@every_function
def test_without_it_each_function_breaks_the_graph_once(name, of):
    called = getattr(inductor_vision, name)

    def caller(*args: Any) -> Any:
        return called(*args)

    counters.clear()
    torch.compile({"function": called, "caller": caller}[of], backend="eager")(*tensors_of(name), 0.1)
    assert sum(counters["graph_break"].values()) == BREAKS[of]


@every_function
def test_without_it_a_flag_of_torch_avoids_the_break(name):
    counters.clear()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.compile(lambda *args: function(name)(*args), backend="eager")(*tensors_of(name))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
