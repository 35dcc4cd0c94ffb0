"""Tensors of sizes stay symbolic while torch.export traces."""

import pytest
import torch
from inductor_vision.lowering.workarounds.sizes_in_tensors import sizes_in_tensors
from torch import Tensor, nn
from torch.export import Dim


class Shapes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        height, width = x.shape
        pairs = torch.as_tensor([(height, 3), (width // 2, 5)], dtype=torch.long, device=x.device)
        centres = torch.linspace(0.5, height - 0.5, height, dtype=torch.float64, device=x.device)
        spaced = torch.linspace(-1, 2, width), torch.linspace(0, 1, height - 2), torch.linspace(0, 1, 5)
        return pairs, torch.tensor([[width, height]], dtype=torch.float32), torch.tensor([1.5, 2.0]), centres, *spaced


class Spaced(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linspace(0, 1, x.shape[0])


class Numbers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor([x.shape[0], 1])


def exported(module: nn.Module) -> nn.Module:
    sides = {0: Dim("height", min=4, max=99), 1: Dim("width", min=4, max=99)}
    return torch.export.export(module, (torch.rand(6, 8),), dynamic_shapes=(sides,)).module()


@pytest.mark.parametrize("module", [Spaced(), Numbers()])
def test_torch_still_needs_this(module):
    with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
        exported(module)


def test_sizes_stay_symbols():
    with sizes_in_tensors():
        module = exported(Shapes())
    for size in ((6, 8), (10, 21), (4, 5)):
        x = torch.rand(size)
        for ours, eager in zip(module(x), Shapes()(x)):
            assert ours.dtype == eager.dtype
            torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-7)
