"""Stock torchvision on this package's operators, with its compiled library and where that cannot load."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch._inductor.lowering  # from here on this package is among its tables
from inductor_vision import accelerate_torchvision, deform_conv2d
from inductor_vision.integrations import torchvision as integration
from inductor_vision.integrations.exchange import always
from inductor_vision.lowering.installation import installer
from inductor_vision.ops.registry import TORCHVISION
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import caches_disabled, compile_and_run, run_python
from inductor_vision.tests.support.deform_conv2d import as_torchvision, gradient_like, oracle, sample
from inductor_vision.tests.support.regions import (
    OPERATORS,
    Pyramid,
    PyramidSample,
    pyramid,
    pyramid_gradient_oracle,
    pyramid_oracle,
    sample as sample_regions,
)
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.decomposition import decompositions, fast_random_decomps
from torch.export import Dim

installed = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")


@pytest.fixture
def stock(torchvision, monkeypatch) -> Iterator[ModuleType]:
    """torchvision as it was before; what the test accelerates is undone."""
    monkeypatch.setattr(installer, "_accelerated", ())
    before = dict(decompositions)
    for name in TORCHVISION:
        decompositions.pop(getattr(torch.ops.torchvision, name).default, None)
    fast_random_decomps.cache_clear()
    with torch.compiler.config.patch(cache_key_tag="before"):
        yield torchvision
    decompositions.clear()
    decompositions.update(before)
    fast_random_decomps.cache_clear()


def call_of(name: str):
    """A call of torchvision.ops.deform_conv2d, as arguments by position."""
    s = sample(name)
    return (*s.args, s.kwargs["stride"], s.kwargs["padding"], s.kwargs["dilation"], s.kwargs["mask"])


def test_nothing_changes_before_the_call(stock):
    compiled = compile_and_run(stock.ops.deform_conv2d, *call_of("groups_2"))
    assert compiled.paths == []
    assert compiled.templates == 0


def test_stock_operators_take_the_template(stock):
    for _ in range(2):  # the second call changes nothing
        accelerate_torchvision()
    assert torch.compiler.config.cache_key_tag == "before+torchvision"  # the caches hold what was compiled before
    calls = [call_of("groups_across_offset_groups"), call_of("neither")]
    compiled = compile_and_run(
        lambda calls: [stock.ops.deform_conv2d(*call).relu() for call in calls], calls, config={"cpp_wrapper": True}
    )
    assert compiled.kinds == ["template", "template"]
    assert (compiled.templates, compiled.fused) == (2, 2)
    for call, result in zip(calls, compiled.result):
        assert_close(result, oracle(*call).relu(), torch.float32)
        assert_close(stock.ops.deform_conv2d(*call), oracle(*call), torch.float32)


def assert_warned(caplog, *texts: str) -> None:
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    version = sys.modules["torchvision"].__version__
    for text in (*texts, f"this is torchvision {version}", f"tested with {integration._TORCHVISION.tested}"):
        assert text in record.getMessage()


def test_an_operator_with_another_schema_is_left_alone(stock, monkeypatch, caplog):
    other = "nms(Tensor dets, Tensor scores, float iou_threshold, int most) -> Tensor"
    schemas = [other if schema.startswith("nms(") else schema for schema in integration._SCHEMAS]
    monkeypatch.setattr(integration, "_SCHEMAS", schemas)
    accelerate_torchvision()
    served = {name for name in TORCHVISION if getattr(torch.ops.torchvision, name).default in decompositions}
    assert served == TORCHVISION.keys() - {"nms"}
    assert_warned(caplog, f"nms is left as it is: expected torchvision::{other}, got torchvision::nms(Tensor dets")


def test_an_operator_that_is_gone_is_left_alone(stock, monkeypatch, caplog):
    monkeypatch.setitem(TORCHVISION, "gone", deform_conv2d)
    monkeypatch.setattr(integration, "_SCHEMAS", [*integration._SCHEMAS, "gone(Tensor x) -> Tensor"])
    accelerate_torchvision()
    assert_warned(caplog, "gone is left as it is: expected torchvision::gone(Tensor x) -> Tensor, got None")


@pytest.mark.parametrize(
    ("function", "expected", "found"),
    [
        ("ops.boxes.box_area", "['boxes', 'format']", "['boxes', 'fmt']"),
        ("ops.boxes.gone", "a function", "module 'torchvision.ops.boxes' has no attribute 'gone'"),
        ("gone.box_area", "a function", "module 'torchvision' has no attribute 'gone'"),
        ("models.detection._utils.Matcher.set_low_quality_matches_", "['format']", "['matches', 'all_matches', "),
        ("ops.boxes._batched_nms_vanilla", "a function that is not decorated", "<function _batched_nms_vanilla at"),
    ],
)
def test_a_function_with_other_parameters_is_left_alone(stock, caplog, function, expected, found):
    original = stock.ops.boxes.box_area.__code__
    integration._exchange(function, lambda boxes, format: boxes, always)
    assert stock.ops.boxes.box_area.__code__ is original
    assert_warned(caplog, f"{function} is left as it is: expected {expected}, got {found}")


SHARE_A_CACHE = """
import sys
import inductor_vision, torch, torchvision

if sys.argv[1] == "accelerated":
    inductor_vision.accelerate_torchvision()
x, offset, weight = torch.ones(1, 2, 5, 5), torch.zeros(1, 18, 5, 5), torch.ones(2, 2, 3, 3)
with torch.no_grad():
    torch.compile(torchvision.ops.deform_conv2d)(x, offset, weight, padding=1)
print("hit" if torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"] else "miss")
"""


@pytest.mark.slow
def test_processes_that_share_a_cache_get_what_they_asked_for(torchvision, tmp_path):
    def run(mode: str) -> str:
        return run_python(SHARE_A_CACHE, mode, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).strip()

    asked = ["stock", "accelerated", "stock", "accelerated"]
    assert [run(mode) for mode in asked] == ["miss", "miss", "hit", "hit"]


def train(fn: Callable, layer: nn.Module, *arguments: Tensor) -> list[Tensor]:
    """Gradients of the arguments and the layer's parameters, where ``fn`` is the layer or what it was compiled to."""
    leaves = [tensor.clone().requires_grad_() for tensor in arguments]
    layer.zero_grad()
    with caches_disabled():
        fn(*leaves).square().sum().backward()
    return [tensor.grad.clone() for tensor in (*leaves, layer.weight, layer.bias)]


def training_case(stock: ModuleType, mask: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    x, offset, *_, modulation = call_of("offset_groups_2")
    return stock.ops.DeformConv2d(8, 6, 3, padding=1), (x, offset, modulation)[: 2 + mask]


@pytest.mark.parametrize("mask", [True, False])
def test_gradients_of_what_stock_operators_become(stock, mask):
    accelerate_torchvision()
    layer, arguments = training_case(stock, mask)
    # Inductor's decompositions without Inductor: for the backend named here there are no kernels.
    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
    with config.patch(cpu_backend="halide"), recorded_paths() as paths:
        decomposed = train(compiled, layer, *arguments)
    assert {(path.op, path.kind) for path in paths} == {
        ("deform_conv2d", "decomposition"),
        ("deform_conv2d_backward", "decomposition"),
    }
    for ours, stocks in zip(decomposed, train(layer, layer, *arguments)):
        assert_close(ours, stocks, torch.float32)


@pytest.mark.slow
def test_stock_modules_train(stock):
    accelerate_torchvision()
    layer, arguments = training_case(stock, mask=True)
    with recorded_paths() as paths:
        compiled = train(torch.compile(layer, fullgraph=True), layer, *arguments)
    assert {(path.op, path.kind) for path in paths} == {
        ("deform_conv2d", "template"),
        ("deform_conv2d_backward", "template"),
    }
    for ours, stocks in zip(compiled, train(layer, layer, *arguments)):
        assert_close(ours, stocks, torch.float32)


def test_stock_gradients_of_deform_conv2d_take_the_template(stock):
    """The gradient of a mask that is not there too: torchvision makes one of the shape of its stand-in."""
    accelerate_torchvision()
    op = torch.ops.torchvision._deform_conv2d_backward
    samples = [sample(name) for name in ("mask_bias", "neither", "groups_across_offset_groups", "all_channels_last")]
    calls = [(gradient_like(deform_conv2d(*s.args, **s.kwargs)), *as_torchvision(s)) for s in samples]
    compiled = compile_and_run(lambda calls: [op(*call) for call in calls], calls, config={"cpp_wrapper": True})
    assert compiled.kinds == ["template"] * len(samples)
    for call, results in zip(calls, compiled.result):
        for ours, stocks in zip(results, op(*call)):
            assert_close(ours, stocks, torch.float32)
            assert ours.stride() == stocks.stride()  # of channels_last too: contiguous, as the fake kernel promises


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def test_stock_operators_on_regions_take_the_templates(stock):
    """Forward and backward; the second results, where maxima are and which channels are read, are torchvision's."""
    accelerate_torchvision()
    ops = [name for op in OPERATORS for name in (op, f"_{op}_backward")]
    samples = [sample_regions(op, "tied") for op in OPERATORS]
    calls = [call for s in samples for call in (s.positional_of_torchvision, s.positional_backward_of_torchvision)]

    def run(calls):
        return [getattr(torch.ops.torchvision, op)(*call) for op, call in zip(ops, calls)]

    compiled = compile_and_run(run, calls, config={"cpp_wrapper": True})
    assert sorted((path.op, path.kind) for path in compiled.paths) == sorted((op.lstrip("_"), "template") for op in ops)
    assert compiled.templates == len(ops)
    with recorded_paths() as paths:
        eager = run(calls)
    assert paths == []
    for op, results, stocks in zip(ops, compiled.result, eager):
        (result, *further), (expected, *stocks_further) = tensors(results), tensors(stocks)
        assert_close(result, expected, torch.float32, op)
        assert len(further) == len(stocks_further) == (op in ("roi_pool", "ps_roi_align", "ps_roi_pool"))
        for ours, theirs in zip(further, stocks_further):
            assert ours.dtype == theirs.dtype == torch.int32
            assert torch.equal(ours, theirs), op


@pytest.mark.slow
def test_stock_operators_on_regions_train(stock):
    accelerate_torchvision()
    samples = [sample_regions(op, "plain") for op in OPERATORS]

    def gradients(function: Callable[..., list[Tensor]]) -> tuple[Tensor, ...]:
        inputs = [s.input.clone().requires_grad_() for s in samples]
        return torch.autograd.grad(function(inputs), inputs, [s.gradient for s in samples])

    def run(inputs):
        return [getattr(stock.ops, s.op)(x, *s.arguments[1:]) for s, x in zip(samples, inputs)]

    with caches_disabled(), recorded_paths() as paths:
        compiled = gradients(torch.compile(run, fullgraph=True, options={"cpp_wrapper": True}))
    assert sorted((path.op, path.kind) for path in paths) == sorted(
        (name, "template") for op in OPERATORS for name in (op, f"{op}_backward")
    )
    for s, gradient, stocks in zip(samples, compiled, gradients(run)):
        assert_close(gradient, stocks, torch.float32, s.op)


def pooler_and_call(stock: ModuleType, s: PyramidSample) -> tuple[nn.Module, tuple]:
    """One map of the four is not used."""
    pooler = stock.ops.MultiScaleRoIAlign(["a", "b", "d"], s.case.bins, 2, canonical_scale=32, canonical_level=3)
    maps = dict(zip("abcd", (*s.features[:2], torch.zeros(1), s.features[2])))
    return pooler, (maps, s.boxes, [s.case.image] * s.case.batch)


def test_stock_pooler_is_one_template(stock):
    accelerate_torchvision()
    s = pyramid("plain")
    pooler, call = pooler_and_call(stock, s)
    compiled = compile_and_run(pooler, *call, config={"cpp_wrapper": True})
    assert compiled.kinds == ["template"]
    assert compiled.templates == 1
    assert_close(compiled.result, pyramid_oracle(s), torch.float32)
    with caches_disabled(), recorded_paths() as paths:
        for regions in (13, 24, 35):
            s = pyramid(Pyramid(regions=regions))
            assert_close(compiled.function(*pooler_and_call(stock, s)[1]), pyramid_oracle(s), torch.float32)
    assert [path.kind for path in paths] == ["template"]  # once more, for all numbers of boxes

    with recorded_paths() as paths:
        eager, scripted = pooler(*call), torch.jit.script(pooler)(*call)
    assert paths == []
    for result in (eager, scripted):
        assert_close(result, pyramid_oracle(pyramid("plain")), torch.float32)


def test_stock_pooler_is_exported_for_any_number_of_boxes(stock):
    accelerate_torchvision()
    s = pyramid("plain")
    pooler, call = pooler_and_call(stock, s)
    boxes = [{0: Dim.DYNAMIC} for _ in s.boxes]
    shapes = (dict.fromkeys(call[0]), boxes, [(None, None)] * len(call[2]))
    exported = torch.export.export(pooler, call, dynamic_shapes=shapes)
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.inductor_vision.roi_align.default) == 1
    assert not [target for target in targets if getattr(target, "namespace", "") == "torchvision"]
    for regions in (35, 20):
        s = pyramid(Pyramid(regions=regions))
        assert_close(exported.module()(*pooler_and_call(stock, s)[1]), pyramid_oracle(s), torch.float32)


@pytest.mark.slow
def test_stock_pooler_trains(stock):
    accelerate_torchvision()
    s = pyramid("plain")
    pooler, (maps, *call) = pooler_and_call(stock, s)
    leaves = {name: maps[name].requires_grad_() for name in pooler.featmap_names}
    with caches_disabled(), recorded_paths() as paths:
        out = torch.compile(pooler, fullgraph=True, options={"cpp_wrapper": True})(leaves, *call)
        gradients = torch.autograd.grad(out, list(leaves.values()), s.gradient)
    assert sorted(path.op for path in paths) == ["roi_align", *["roi_align_backward"] * 3]
    assert {path.kind for path in paths} == {"template"}
    for gradient, expected in zip(gradients, pyramid_gradient_oracle(s)):
        assert_close(gradient, expected, torch.float32)


HELD_BEFORE = """
import functools, inspect, pickle
import torch, torchvision
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import batched_nms, nms as suppress

class Detector(nn.Module):
    suppress = staticmethod(suppress)

    def forward(self, boxes, scores):
        return self.suppress(boxes, scores, 0.5)

def enclosing():
    held = suppress
    return lambda boxes, scores: held(boxes, scores, 0.5)

def with_default(boxes, scores, function=suppress):
    return function(boxes, scores, 0.5)

HELD = {"suppress": suppress}
callers = {
    "module": lambda boxes, scores: suppress(boxes, scores, 0.5),
    "other function": lambda boxes, scores: batched_nms(boxes, scores, torch.zeros_like(scores), 0.5),
    "class": Detector(),
    "closure": enclosing(),
    "default": with_default,
    "partial": functools.partial(suppress, iou_threshold=0.5),
    "dictionary": lambda boxes, scores: HELD["suppress"](boxes, scores, 0.5),
    "operator": lambda boxes, scores: torch.ops.torchvision.nms(boxes, scores, 0.5),
}
signatures = [inspect.signature(function) for function in (suppress, batched_nms, paste_masks_in_image)]
torch.jit.script(suppress)

import inductor_vision
from inductor_vision.paths import recorded_paths

for _ in range(2):  # the second call changes nothing
    inductor_vision.accelerate_torchvision()
"""

REACHED = """
class Caller(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, boxes, scores):
        return self.function(boxes, scores)

many = {0: torch.export.Dim.DYNAMIC}
seen = []

def backend(graph, inputs):
    seen.append(str(graph.graph))
    return graph

torch._dynamo.config.capture_dynamic_output_shape_ops = True
for name, function in callers.items():
    torch._dynamo.reset()
    exported = torch.export.export(Caller(function), (torch.rand(5, 4), torch.rand(5)), dynamic_shapes=(many, many))
    compiled = torch.compile(Caller(function), backend=backend, fullgraph=True)
    for count in (5, 1, 0):
        boxes, scores = torch.tensor([[0.0, 0.0, 2.0, 3.0]]).repeat(count, 1), torch.rand(count)
        for run in (exported.module(), compiled):
            assert len(run(boxes, scores)) == min(count, 1), (name, count)
    for graph in (str(exported.graph), seen[-1]):
        assert ("inductor_vision.nms" in graph) == (name != "operator"), (name, graph)
"""

UNCHANGED_EAGERLY = """
boxes, scores = torch.rand(50, 4).sort(dim=1).values, torch.rand(50)
with recorded_paths() as paths:
    for name, function in callers.items():
        assert torch.equal(function(boxes, scores), torch.ops.torchvision.nms(boxes, scores, 0.5)), name
    assert paste_masks_in_image(torch.rand(1, 1, 5, 5), boxes[:1], (8, 8)).shape == (1, 1, 8, 8)  # a default
assert paths == [], paths
changed = suppress, batched_nms, paste_masks_in_image
assert [inspect.signature(function) for function in changed] == signatures
assert pickle.loads(pickle.dumps(suppress)) is suppress
traced = torch.jit.trace(callers["module"], (boxes, scores))
assert torch.equal(traced(boxes, scores), suppress(boxes, scores, 0.5))
"""


def test_whoever_holds_a_stock_function_is_reached(torchvision):
    """One box or none is kept: torchvision's operator tells programs that there are two at least."""
    run_python(HELD_BEFORE + REACHED)


def test_stock_functions_are_unchanged_eagerly(torchvision):
    run_python(HELD_BEFORE + UNCHANGED_EAGERLY)


def test_stock_functions_are_scripted_as_they_were(stock):
    accelerate_torchvision()
    nms, batched_nms = stock.ops.nms, stock.ops.batched_nms
    paste_masks_in_image = stock.models.detection.roi_heads.paste_masks_in_image

    def suppress(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return nms(boxes, scores, 0.5), batched_nms(boxes, scores, torch.zeros_like(scores), 0.5)

    boxes, scores = torch.rand(50, 4).sort(dim=1).values, torch.rand(50)
    with recorded_paths() as paths:
        for kept in (*torch.jit.script(suppress)(boxes, scores), torch.jit.script(nms)(boxes, scores, 0.5)):
            assert torch.equal(kept, nms(boxes, scores, 0.5))
        masks = torch.jit.script(paste_masks_in_image)(torch.rand(1, 1, 5, 5), boxes[:1], (8, 8))  # a default
    assert masks.shape == (1, 1, 8, 8)
    assert paths == []


def test_torchvision_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"pip install inductor_vision\[torchvision\]"):
        accelerate_torchvision()


LIBRARY_DOES_NOT_LOAD = """
import sys
import torch

load_library = torch.ops.load_library

def refuse(path):
    if "torchvision" in str(path):
        raise OSError("libcudart.so: cannot open shared object file")
    load_library(path)

torch.ops.load_library = refuse
if sys.argv[1] == "import torchvision first":
    try:
        import torchvision
    except RuntimeError as error:
        assert "operator torchvision::nms does not exist" in str(error)
    else:
        raise AssertionError("torchvision loads")

import inductor_vision
for _ in range(2):
    inductor_vision.accelerate_torchvision()
"""

WORKS_WITHOUT_LIBRARY = """
import torchvision
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compiled import compile_and_run
from inductor_vision.tests.support.deform_conv2d import as_torchvision, gradient_like, oracle, sample
from inductor_vision.tests.support.compare import assert_close

torchvision.models.resnet18()
assert torchvision.ops.nms(torch.ones(1, 4), torch.zeros(1), 0.5).tolist() == [0]
# Its Python function for where there is no operator has other values for boxes that leave the image.
leaving = torch.rand(1, 2, 9, 9), torch.tensor([[0.0, -5, -5, 14, 14]]), 2, 1.0, 2
assert torch.equal(torchvision.ops.roi_align(*leaving), inductor_vision.roi_align(*leaving))
rotated = torch.tensor([[5.0, 5, 4, 2, 30], [6, 5, 3, 3, 70]], dtype=torch.float64)
overlaps = torchvision.ops.box_iou(rotated, rotated, fmt="cxcywhr")
assert torch.equal(overlaps, inductor_vision.box_iou_rotated(rotated, rotated).float())
try:
    torch.ops.torchvision.qnms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except NotImplementedError as error:
    assert str(error).startswith("torchvision::qnms: "), error
else:
    raise AssertionError("qnms ran")

def arguments(s):
    return *s.args, s.kwargs["stride"], s.kwargs["padding"], s.kwargs["dilation"], s.kwargs["mask"]

for name in ("groups_across_offset_groups", "neither"):
    s = sample(name).requiring_grad()
    with recorded_paths() as paths:
        result = torchvision.ops.deform_conv2d(*arguments(s))
    assert [path.kind for path in paths] == ["eager"], paths
    assert_close(result, oracle(*s.args, **s.kwargs), torch.float32)
    cotangent = torch.randn_like(result)
    result.backward(cotangent)
    expected = s.to(torch.float64).requiring_grad()
    inductor_vision.deform_conv2d(*expected.args, **expected.kwargs).backward(cotangent.double())
    for name, tensor in s.tensors.items():
        assert_close(tensor.grad, expected.tensors[name].grad, torch.float32, name)

layer = torchvision.ops.DeformConv2d(24, 6, 3, padding=1, groups=3)
call = sample("groups_across_offset_groups").args[:2]
with torch.no_grad():
    compiled = compile_and_run(layer, *call)
assert compiled.kinds == ["template"] and compiled.templates == 1, compiled.paths
assert_close(compiled.result, oracle(*call, layer.weight, layer.bias, padding=1), torch.float32)
"""


@installed
def test_library_does_not_load():
    run_python(LIBRARY_DOES_NOT_LOAD + WORKS_WITHOUT_LIBRARY, "")


@pytest.mark.slow
@installed
def test_library_did_not_load_before():
    use = "import torchvision\ntorchvision.models.resnet18()\nassert torchvision.extension._has_ops()"
    run_python(LIBRARY_DOES_NOT_LOAD + use, "import torchvision first")


TRAINS_WITHOUT_LIBRARY = """
import torchvision
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.deform_conv2d import sample

layer = torchvision.ops.DeformConv2d(24, 6, 3, padding=1, groups=3)
gradients = []
for fn in (layer, torch.compile(layer, fullgraph=True)):
    layer.zero_grad()
    x, offset = (tensor.requires_grad_() for tensor in sample("groups_across_offset_groups").args[:2])
    fn(x, offset).square().sum().backward()
    gradients.append([tensor.grad.clone() for tensor in (x, offset, layer.weight, layer.bias)])
for eager, compiled in zip(*gradients):
    assert_close(compiled, eager, torch.float32)
"""


@pytest.mark.slow
@installed
def test_training_where_the_library_does_not_load():
    run_python(LIBRARY_DOES_NOT_LOAD + TRAINS_WITHOUT_LIBRARY, "")
