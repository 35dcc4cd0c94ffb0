"""Layers of as many regions as data say."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from inductor_vision.lowering.workarounds import (
    data_dependent_attention,
    data_dependent_batch_norms,
    data_dependent_convolutions,
    data_dependent_views,
    tracing,
)
from inductor_vision.tests.support.compiled import caches_disabled, compile_and_run
from inductor_vision.tests.support.oldest_torch import with_oldest_torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError

WORKAROUNDS = data_dependent_attention, data_dependent_batch_norms, data_dependent_convolutions, data_dependent_views


@pytest.fixture(autouse=True, scope="module")
def _asked_for() -> None:
    tracing.install_for_tracing()
    tracing.install_for_tracing()  # which changes nothing


CONVOLUTIONS = {
    "1d": nn.Conv1d(6, 8, 3, padding=1),
    "2d": nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "1x1": nn.Conv2d(6, 8, 1),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6),
    "transposed": nn.ConvTranspose2d(6, 8, 2, stride=2),
    "3d": nn.Conv3d(6, 8, 3, padding=1),
}
SIZES = {nn.Conv1d: (20,), nn.Conv3d: (4, 5, 6)}
CHOSEN = torch.tensor([True, False, True, True, False])
CHOICES = CHOSEN, ~CHOSEN, torch.zeros_like(CHOSEN), torch.arange(5) == 2, torch.ones_like(CHOSEN)


class Selected(nn.Module):
    """The layer on the images that are chosen, with neighbours on both sides."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor, chosen: Tensor) -> Tensor:
        return self.layer(images[chosen] * 2).relu() + 1


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(layer, channels_last):
    model, images = Selected(layer).eval(), torch.rand(5, 6, *SIZES.get(type(layer), (9, 11)))
    if channels_last and images.dim() != 4:
        pytest.skip("channels_last is a format of images")
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        compiled = compile_and_run(model, images, CHOSEN, config={"cpp_wrapper": True})
        torch.testing.assert_close(compiled.result, model(images, CHOSEN))
        for some in CHOICES:
            torch.testing.assert_close(compiled.function(images, some), model(images, some))


def test_an_operator_that_torch_no_longer_has(monkeypatch, caplog):
    monkeypatch.setattr(tracing, "_TRACED", {"gone": None, **tracing._TRACED})
    tracing.install_for_tracing()
    (record,) = caplog.records
    message = record.getMessage()
    assert "are left to torch: " in message and "'gone'" in message and "is tested with torch" in message


def with_statistics(layer: nn.Module) -> nn.Module:
    """As after some training."""
    for values in [*layer.parameters(), *layer.buffers()]:
        if values.dim() == 1:  # of norms, and biases
            nn.init.uniform_(values, 0.5, 1.5)
    return layer.eval()


class Attention(nn.MultiheadAttention):
    """Among the rows of each region."""

    def forward(self, regions: Tensor) -> Tensor:
        rows = regions.flatten(2).mT
        return super().forward(rows, rows, rows)[0]


class Layers(nn.Module):
    """What heads of detectors are made of, each layer on regions of 6 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                "batch norm": nn.BatchNorm2d(6),
                "batch norm without weights": nn.BatchNorm2d(6, affine=False),
                "batch norm of one dimension": nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(6)),
                "batch norm of numbers": nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6 * 8 * 10)),
                "batch norm of three dimensions": nn.Sequential(nn.Unflatten(2, (2, 4)), nn.BatchNorm3d(6)),
                "batch norm after a convolution": nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)),
                "instance norm": nn.InstanceNorm2d(6),
                "group norm": nn.GroupNorm(3, 6),
                "layer norm": nn.LayerNorm((6, 8, 10)),
                "attention": nn.Sequential(Attention(6, 3, batch_first=True)),
                "linear": nn.Sequential(nn.Flatten(), nn.Linear(6 * 8 * 10, 5), nn.Softmax(1)),
                "pooling": nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3)),
                "resizing": nn.Upsample(scale_factor=2, mode="bilinear"),
            }
        )
        with_statistics(self)

    def forward(self, regions: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        regions = regions[chosen] * 2
        return {name: layer(regions).contiguous() for name, layer in self.layers.items()}


def assert_same_layers(function, layers):
    regions = torch.rand(5, 6, 8, 10)
    for chosen in CHOICES:
        for name, layer in layers.layers.items():
            message = f"{name}, {int(chosen.sum())} regions: "
            ours = function(regions, chosen)[name]
            torch.testing.assert_close(ours, layer(regions[chosen] * 2), msg=lambda text, what=message: what + text)


@pytest.mark.parametrize("freezing", [False, True])
def test_layers(freezing):
    layers = Layers()
    if freezing:  # under which torch cannot compile the projections of attention
        del layers.layers["attention"]
    with torch.no_grad():
        compiled = compile_and_run(
            layers, torch.rand(5, 6, 8, 10), CHOSEN, config={"cpp_wrapper": True, "freezing": freezing}
        )
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same_layers(compiled.function, layers)


def exported(layers: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(layers, (torch.rand(5, 6, 8, 10), CHOSEN))


def test_exported_layers():
    layers = Layers()
    with torch.no_grad():
        assert_same_layers(exported(layers).module(), layers)


@pytest.mark.slow
def test_packaged_layers(tmp_path):
    layers = Layers()
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(exported(layers), package_path=str(tmp_path / "layers.pt2"))
        assert_same_layers(torch._inductor.aoti_load_package(path), layers)


def test_gradients_of_batch_norm():
    """In eval mode, as of a detector whose statistics are frozen."""
    model, images = Selected(with_statistics(nn.BatchNorm2d(6))), torch.rand(5, 6, 4, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for chosen in CHOICES:
        grads = []
        for call in (model, compiled):
            image = images.clone().requires_grad_()
            call(image, chosen).pow(2).sum().backward()
            grads.append([image.grad, *(parameter.grad.clone() for parameter in model.parameters())])
            model.zero_grad()
        torch.testing.assert_close(*grads)


def test_batch_norm_of_wrong_channels():
    model = Selected(nn.BatchNorm2d(5).eval())
    with pytest.raises(RuntimeError, match="batch_norm: weight must have 6 elements, got 5"):
        torch.export.export(model, (torch.rand(5, 6, 4, 5), CHOSEN))


def test_other_batch_norms_are_torchs():
    """In a graph that has some of either, those of sizes that are known become what torch makes of them."""
    model, images = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), torch.rand(2, 3, 8, 9)
    for training in (False, True):
        exported = torch.export.export(model.train(training), (images,))
        assert [node.target for node in exported.graph.nodes].count(torch.ops.aten.batch_norm.default) == 1
        norms = [str(node.target) for node in exported.run_decompositions().graph.nodes if "norm" in str(node.target)]
        kind = "_functional" if training else "_no_training"
        assert norms == [f"aten._native_batch_norm_legit{kind}.default"]


@with_oldest_torch
class TestTorchStillNeedsThis:
    """Where one of these fails, torch does rightly what is worked around, and the module of that name can go."""

    @pytest.fixture(autouse=True)
    def _nothing_is_worked_around(self, monkeypatch):
        for module in WORKAROUNDS:
            monkeypatch.setattr(module, "depends_on_data", lambda *sizes: False)
        with torch.no_grad(), caches_disabled():
            yield

    def test_convolutions(self):
        model, images = Selected(CONVOLUTIONS["2d"]).eval(), torch.rand(5, 6, 9, 11)
        with pytest.raises(AssertionError, match=r"expected size .* stride"):
            torch.compile(model, fullgraph=True)(images, CHOSEN)

    @pytest.mark.parametrize("layer", [nn.BatchNorm2d(6), nn.InstanceNorm2d(6)], ids=["batch norm", "instance norm"])
    def test_batch_norms(self, layer):
        with pytest.raises(UserError, match="Could not guard on data-dependent expression Eq"):
            torch.compile(Selected(layer).eval(), fullgraph=True)(torch.rand(5, 6, 9, 11), CHOSEN)

    def test_attention(self):
        program = """
import torch

heads = torch.rand(1, 0, 7, 3)
torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(heads, heads, heads)
"""
        result = subprocess.run([sys.executable, "-c", program], timeout=60)
        assert result.returncode == -signal.SIGFPE

    def test_views(self):
        attention, images = Attention(6, 3, batch_first=True).eval(), torch.rand(5, 6, 9, 11)
        compiled = torch.compile(Selected(attention), fullgraph=True)(images, CHOSEN)
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(compiled, Selected(attention)(images, CHOSEN))
