"""Convolutions of as many images as data say."""

from __future__ import annotations

import pytest
import torch
from inductor_vision.lowering import convolution
from inductor_vision.tests.support.compiled import caches_disabled, compile_and_run
from torch import Tensor, nn

LAYERS = {
    "1d": nn.Conv1d(6, 8, 3, padding=1),
    "2d": nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "1x1": nn.Conv2d(6, 8, 1),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6),
    "transposed": nn.ConvTranspose2d(6, 8, 2, stride=2),
    "3d": nn.Conv3d(6, 8, 3, padding=1),
}
SIZES = {nn.Conv1d: (20,), nn.Conv3d: (4, 5, 6)}


class Selected(nn.Module):
    """The layer on the images that are chosen, with neighbours on both sides."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor, chosen: Tensor) -> Tensor:
        return self.layer(images[chosen] * 2).relu() + 1


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_values(layer, channels_last):
    model, images = Selected(layer).eval(), torch.rand(5, 6, *SIZES.get(type(layer), (9, 11)))
    if channels_last and images.dim() != 4:
        pytest.skip("channels_last is a format of images")
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    chosen = torch.tensor([True, False, True, True, False])
    with torch.no_grad():
        compiled = compile_and_run(model, images, chosen)
        torch.testing.assert_close(compiled.result, model(images, chosen))
        for some in (~chosen, torch.zeros_like(chosen), torch.ones_like(chosen)):
            torch.testing.assert_close(compiled.function(images, some), model(images, some))


def test_torch_still_needs_this(monkeypatch):
    """Where this fails, torch compiles such convolutions rightly, and lowering/convolution.py can go."""
    monkeypatch.setattr(convolution, "depends_on_data", lambda size: False)
    model, images = Selected(LAYERS["2d"]).eval(), torch.rand(5, 6, 9, 11)
    with torch.no_grad(), caches_disabled(), pytest.raises(AssertionError, match=r"expected size .* stride"):
        torch.compile(model, fullgraph=True)(images, torch.arange(5) > 2)
