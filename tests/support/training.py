"""A small deformable classifier, and what training it gives."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from inductor_vision import DeformConv2d
from inductor_vision.tests.support.compare import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Batch = tuple[Tensor, Tensor]
Named = dict[str, Tensor]


class Deformable(nn.Module):
    """A deformable convolution, 3 x 3, whose offsets and masks an ordinary one predicts.

    Samples of images like those of :func:`batch_of` are at least 0.05 away from integer coordinates, where the gradient
    by the offset jumps, and some are outside the image.
    """

    def __init__(self, channels: int, offset_groups: int = 1, groups: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.coordinates = 18 * offset_groups
        self.predict = nn.Conv2d(channels, 27 * offset_groups, 3, padding=1)
        self.sample = DeformConv2d(channels, channels, 3, padding=1, groups=groups, bias=bias)
        with torch.no_grad():
            self.predict.weight /= 4
            self.predict.bias[: self.coordinates] = torch.randint(-3, 3, (self.coordinates,)) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        predicted = self.predict(x)
        offset, mask = predicted[:, : self.coordinates], predicted[:, self.coordinates :].sigmoid()
        return self.sample(x, offset, mask)


class Classifier(nn.Module):
    """A deformable layer with groups, and a depthwise one, between ordinary ones. Its weights are always the same.

    Args:
        norm: whether there is batch norm.
        depthwise: whether there is the second deformable layer.
        checkpoint: the first deformable layer is not kept for the backward pass, but computed once more.
    """

    def __init__(self, norm: bool = True, depthwise: bool = True, checkpoint: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.grouped = Deformable(8, offset_groups=2, groups=2, bias=not norm)  # norm leaves a bias no gradient
            self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
            self.depthwise = Deformable(8, groups=8) if depthwise else nn.Identity()
            self.head = nn.Linear(8, 5)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        x = checkpoint(self.grouped, x, use_reentrant=False) if self.checkpoint else self.grouped(x)
        x = self.depthwise(self.norm(x).relu()).relu()
        return self.head(x.mean((2, 3)))


def batch_of(images: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, 7, 9, generator=generator), torch.randint(5, (images,), generator=generator)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step of training gives; parameters are those after it, and buffers are among them."""

    loss: Tensor
    gradients: Named
    parameters: Named


class Training:
    """Trains a model, a batch at a time.

    Args:
        loss_of: its loss, from the model and a batch.
        compile_optimizer: whether the optimizer's step is compiled too.
    """

    def __init__(
        self, model: nn.Module, loss_of: Callable[..., Tensor] = loss_of, compile_optimizer: bool = False
    ) -> None:
        self.model, self.loss_of = model, loss_of
        # A small eps would make large steps of gradients that are zero but for rounding.
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, eps=0.01)
        self.update = torch.compile(self.optimizer.step) if compile_optimizer else self.optimizer.step

    def step(self, *batch: Tensor) -> Step:
        self.optimizer.zero_grad()
        loss = self.loss_of(self.model, *batch)
        loss.backward()
        self.update()
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return Step(loss.detach(), gradients, {name: t.clone() for name, t in self.model.state_dict().items()})


def reference(model: nn.Module, batches: Sequence[Batch]) -> list[Step]:
    """The steps of a copy of the model in eager mode and float64."""
    training = Training(copy.deepcopy(model).double())
    return [training.step(x.double(), y) for x, y in batches]


def assert_same_tensors(actual: Named, expected: Named, tolerance: float) -> None:
    """Names are equal, and errors within the tolerance, relative to the largest element of each tensor."""
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def assert_same_steps(actual: Sequence[Step], expected: Sequence[Step], tolerance: float) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected):
        assert_same_tensors({"loss": ours.loss}, {"loss": theirs.loss}, tolerance)
        assert_same_tensors(ours.gradients, theirs.gradients, tolerance)
        assert_same_tensors(ours.parameters, theirs.parameters, tolerance)
