"""Stock models of transformers, mmcv and rf-detr on this package's operator."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import re
import sys
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
import torch._inductor.lowering  # from here on this package is among its tables
from inductor_vision import accelerate_transformers, multiscale_deformable_attention
from inductor_vision.integrations import transformers as integration
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compiled import caches_disabled, run_python, trace_and_run
from inductor_vision.tests.support.transformers_models import assert_same_results, inputs_of, small_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

NAMES = r"^(?:class|def) (MultiScaleDeformableAttention|multi_scale_deformable_attention(?:_v2)?)\b"
SIZES = [(6, 8), (3, 4), (2, 2)]


@pytest.fixture
def accelerated(transformers) -> ModuleType:
    accelerate_transformers()
    return transformers


def arguments_of(points: list[int], sizes=SIZES, levels: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations, some of them outside, and weights, for 2 images, 5 queries and 3 heads."""
    pixels = sum(height * width for height, width in sizes)
    value = torch.randn(2, pixels, 3, 4)
    locations = 1.6 * torch.rand(2, 5, 3, sum(points), 2) - 0.3
    weights = torch.rand(2, 5, 3, sum(points)).softmax(-1)
    if levels:
        shape = (2, 5, 3, len(sizes), points[0])
        return value, locations.reshape(*shape, 2), weights.reshape(shape)
    return value, locations, weights


def modules_with_the_operator(transformers: ModuleType) -> dict[str, str]:
    """The modules of transformers that define it, by looking into their files, and as what."""
    folder = pathlib.Path(transformers.__file__).parent
    found = {}
    for path in folder.glob("models/*/modeling_*.py"):
        if match := re.search(NAMES, path.read_text(), re.MULTILINE):
            found[f"transformers.models.{path.parent.name}.{path.stem}"] = match[1]
    return found


def test_every_module_that_has_it_is_served(accelerated):
    modules = modules_with_the_operator(accelerated)
    assert len(modules) >= 15
    for name, defined in modules.items():
        module = importlib.import_module(name)  # some are there already, others are not
        function = getattr(module, defined)
        function = function.forward if isinstance(function, type) else function
        assert function.__wrapped__.__name__ == function.__name__, name  # it was exchanged
        v2 = defined.endswith("_v2")
        value, locations, weights = arguments_of([2, 1, 3] if v2 else [2, 2, 2], levels=not v2)
        call = {
            "MultiScaleDeformableAttention": (None, value, None, SIZES, None, locations, weights, 64),
            "multi_scale_deformable_attention": (value, SIZES, locations, weights),
            "multi_scale_deformable_attention_v2": (value, SIZES, locations, weights, [2, 1, 3]),
        }[defined]
        # What is chosen in compiled code, without compiling it for each of them.
        translated = vars(module)[f"_inductor_vision_{function.__qualname__.replace('.', '_')}"].args[0](*call)
        stock = function(*call)
        assert torch.equal(stock, function.__wrapped__(*call))  # eager mode is as it was
        torch.testing.assert_close(multiscale_deformable_attention(*translated), stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["default", "discrete"])
def test_compiled_function_calls_the_operator(accelerated, method):
    """Kept in an attribute, as D-FINE and DEIMv2 keep it."""
    from transformers.models.d_fine.modeling_d_fine import multi_scale_deformable_attention_v2

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = multi_scale_deformable_attention_v2

        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return self.core(value, SIZES, locations, weights, [2, 1, 3], method=method)

    arguments = arguments_of([2, 1, 3], levels=False)
    traced = trace_and_run(Layer(), *arguments)
    assert [path.op for path in traced.paths] == ["multiscale_deformable_attention"]
    torch.testing.assert_close(traced.result, Layer()(*arguments), rtol=1e-5, atol=1e-5)


BEFORE_AND_AFTER = """
import sys
import torch
import importlib.util
import inductor_vision
from inductor_vision.tests.support.compiled import trace_and_run
if importlib.util.find_spec("torchvision"):
    inductor_vision.accelerate_torchvision()  # transformers imports it, and it may not load by itself
from transformers.models.mask2former import modeling_mask2former as early

def ops():
    traced = trace_and_run(early.multi_scale_deformable_attention, *arguments)
    torch.testing.assert_close(traced.result, expected)
    return [path.op for path in traced.paths]

arguments = torch.rand(1, 6, 2, 4), [(2, 3)], torch.rand(1, 5, 2, 1, 2, 2), torch.rand(1, 5, 2, 1, 2)
expected = early.multi_scale_deformable_attention(*arguments)
held = early.multi_scale_deformable_attention
assert ops() == []
finders = list(sys.meta_path)
inductor_vision.accelerate_transformers()
inductor_vision.accelerate_transformers()
assert len(sys.meta_path) == len(finders) + 1
assert ops() == ["multiscale_deformable_attention"] and held is early.multi_scale_deformable_attention
assert "transformers.models.oneformer.modeling_oneformer" not in sys.modules
from transformers.models.oneformer import modeling_oneformer as late
assert late.multi_scale_deformable_attention.__wrapped__
assert type(late.__loader__).__name__ == type(late.__spec__.loader).__name__ == "SourceFileLoader"
"""


@pytest.mark.slow
def test_nothing_changes_before_the_call(transformers):
    run_python(BEFORE_AND_AFTER)


MMCV = """
import torch
import torch.nn.functional as F

def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    raise NotImplementedError("the original")
"""

RFDETR = """
def ms_deform_attn_core_pytorch(
    value, value_spatial_shapes, sampling_locations, attention_weights, value_spatial_shapes_hw=None
):
    raise NotImplementedError("the original")
"""


def stand_in(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> ModuleType:
    """A module of a package that is not installed, imported after accelerate_transformers()."""
    folder = tmp_path.joinpath(*name.split(".")[:-1])
    folder.mkdir(parents=True)
    for parent in (folder, *folder.relative_to(tmp_path).parents):
        (tmp_path / parent / "__init__.py").touch()
    (folder / f"{name.rpartition('.')[2]}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for depth in range(1, name.count(".") + 2):  # forget it afterwards
        package = ".".join(name.split(".")[:depth])
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, package)
    return importlib.import_module(name)


def test_mmcv(accelerated, tmp_path, monkeypatch):
    module = stand_in(tmp_path, monkeypatch, "mmcv.ops.multi_scale_deform_attn", MMCV)
    value, locations, weights = arguments_of([2, 2, 2])
    call = value, torch.tensor(SIZES), locations, weights
    traced = trace_and_run(lambda *call: module.multi_scale_deformable_attn_pytorch(*call), *call)
    assert [path.op for path in traced.paths] == ["multiscale_deformable_attention"]
    torch.testing.assert_close(traced.result, multiscale_deformable_attention(*call))
    with pytest.raises(NotImplementedError, match="the original"):
        module.multi_scale_deformable_attn_pytorch(*call)


@pytest.mark.parametrize("exporting", [False, True])
def test_rfdetr(accelerated, tmp_path, monkeypatch, exporting):
    module = stand_in(tmp_path, monkeypatch, "rfdetr.models.ops.functions.ms_deform_attn_func", RFDETR)
    value, locations, weights = arguments_of([2, 2, 2])
    expected = multiscale_deformable_attention(value, SIZES, locations, weights)
    if exporting:  # rank 5
        locations = locations.flatten(3, 4)
    call = value.permute(0, 2, 3, 1).contiguous(), torch.tensor(SIZES), locations, weights.flatten(3), SIZES
    traced = trace_and_run(lambda *call: module.ms_deform_attn_core_pytorch(*call), *call)
    assert [path.op for path in traced.paths] == ["multiscale_deformable_attention"]
    torch.testing.assert_close(traced.result, expected)


def test_another_signature_is_left_alone(accelerated, tmp_path, monkeypatch, caplog):
    other = MMCV.replace("value_spatial_shapes,", "shapes,")
    module = stand_in(tmp_path, monkeypatch, "mmcv.ops.multi_scale_deform_attn", other)
    assert not hasattr(module.multi_scale_deformable_attn_pytorch, "__wrapped__")
    (record,) = caplog.records
    assert "multi_scale_deformable_attn_pytorch is left as it is: expected ['value', 'value_sp" in record.getMessage()


@pytest.fixture
def in_eager_mode(transformers):
    accelerate_transformers(eager=True)
    integration._compiled.cache_clear()
    accelerate_transformers()  # as accelerate() does
    yield transformers
    accelerate_transformers(eager=False)


def test_eager_mode_compiles_the_kernel_once(in_eager_mode):
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    def call(*tensors: Tensor, sizes=SIZES) -> tuple[Tensor, Tensor]:
        value, locations, weights = tensors
        return [
            forward(None, value, None, sizes, None, locations, weights, 64)
            for forward in (MultiScaleDeformableAttention.forward, MultiScaleDeformableAttention.forward.__wrapped__)
        ]

    counters.clear()
    with torch.no_grad(), caches_disabled(), recorded_paths() as paths:
        for sizes in (SIZES, [(5, 9), (4, 4), (1, 3)]):
            ours, stock = call(*arguments_of([2, 2, 2], sizes), sizes=sizes)
            torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    assert [path.op for path in paths] == ["multiscale_deformable_attention"]  # one compilation, and none was eager
    assert counters["stats"]["unique_graphs"] == 1

    tensors = [tensor.requires_grad_() for tensor in arguments_of([2, 2, 2])]
    ours, stock = (torch.autograd.grad(result.sin().sum(), tensors) for result in call(*tensors))
    for one, other in zip(ours, stock):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    accelerate_transformers(eager=False)
    assert torch.equal(*call(*arguments_of([2, 2, 2])))


class Hub(ModuleType):
    """transformers' module beside the kernels hub, where the package that it needs is installed."""

    def __init__(self) -> None:
        super().__init__("transformers.integrations.hub_kernels")
        self.mapping: dict[str, dict[str, Any]] = {}

    def is_kernels_available(self) -> bool:
        return True

    def register_kernel_mapping(self, mapping: dict[str, dict[str, Any]]) -> None:
        self.mapping.update(mapping)


def test_another_kernels_hub_is_left_alone(accelerated, caplog):
    """The import of it goes on."""
    integration._exchange_in(ModuleType("transformers.integrations.hub_kernels"))
    (record,) = caplog.records
    assert "hub_kernels.register_kernel_mapping is left as it is" in record.getMessage()


def test_kernels_hub(accelerated):
    """A module whose forward is that of the layer for the CPU, as kernelize() makes it, in eager mode and compiled."""
    from transformers.models.rf_detr.modeling_rf_detr import MultiScaleDeformableAttention

    hub, module = Hub(), MultiScaleDeformableAttention()
    integration._exchange_in(hub)
    layer = hub.mapping["MultiScaleDeformableAttention"]["cpu"].load()
    theirs, ours = (inspect.signature(kind.forward).parameters for kind in (MultiScaleDeformableAttention, layer))
    assert list(ours) == list(theirs) and layer.can_torch_compile and layer.has_backward
    module.forward = MethodType(layer.forward, module)

    value, locations, weights = arguments_of([2, 2, 2])
    call = value, torch.tensor(SIZES), SIZES, None, locations, weights, 64
    expected = MultiScaleDeformableAttention.forward.__wrapped__(module, *call)
    with caches_disabled(), recorded_paths() as paths:
        torch.testing.assert_close(module(*call), expected, rtol=1e-5, atol=1e-5)
    assert [path.op for path in paths] == ["multiscale_deformable_attention"]
    traced = trace_and_run(module, *call)
    assert [path.op for path in traced.paths] == ["multiscale_deformable_attention"]
    torch.testing.assert_close(traced.result, expected, rtol=1e-5, atol=1e-5)


def test_wrong_arguments(monkeypatch):
    with pytest.raises(TypeError, match="accelerate_transformers: eager must be True, False or None, got 'yes'"):
        accelerate_transformers(eager="yes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="transformers is not installed"):
        accelerate_transformers()


@pytest.mark.parametrize(
    "kind",
    ["mask2former"]
    + [
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in ("rt_detr_v2", "d_fine", "rf_detr", "grounding_dino", "oneformer")
    ],
)
def test_model_is_one_graph(accelerated, kind):
    """The others are in tests/stock_transformers.py."""
    model, inputs = small_model(kind), inputs_of(kind)
    with torch.no_grad():
        traced = trace_and_run(model, run=lambda model: model(**inputs))
        assert {path.op for path in traced.paths} == {"multiscale_deformable_attention"}
        assert_same_results(traced.result, model(**inputs))
