"""Small convolutions of one map: which become one, and that results stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inductor_vision.lowering.passes.affine_maps import FoldAffineMaps
from inductor_vision.lowering.passes.heads import JoinHeads
from inductor_vision.perf.backends import Autocast
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import compile_and_run, trace_and_run
from torch import Tensor, nn

aten = torch.ops.aten
FROZEN = {"freezing": True, "joint_custom_pre_pass": [FoldAffineMaps("tested"), JoinHeads("tested")]}


class Heads(nn.Module):
    """Convolutions of one map, whose results are brought into a detector's order."""

    def __init__(self, *heads: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(6, 6, 1)
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return torch.cat([head(x).permute(0, 2, 3, 1).flatten(1) for head in self.heads], dim=1)


def heads(*channels: int, kernel: int = 1, **options: Any) -> Heads:
    torch.manual_seed(0)
    return Heads(*(nn.Conv2d(6, n, kernel, padding=kernel // 2, **options) for n in channels))


def check(module: nn.Module, joined: list[str], left: int) -> None:
    """That these are joined, and how many convolutions there are then besides the stem."""
    x = torch.randn(2, 6, 7, 5)
    with torch.no_grad():
        traced = trace_and_run(module, x, config=FROZEN)
        expected = module(x)
    assert [path.detail for path in traced.paths if "as one" in str(path.detail)] == joined
    (graph,) = traced.graphs
    assert sum("convolution" in str(node.target) for node in graph.nodes) == 1 + left
    assert_close(traced.result, expected, expected.dtype)


TAKEN: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {
    "scores and boxes": (lambda: heads(3, 12), ["heads.0 (3 channels), heads.1 (12 channels) as one, 15 channels"], 1),
    "3 x 3": (lambda: heads(4, 1, kernel=3), ["heads.0 (4 channels), heads.1 (1 channels) as one, 5 channels"], 1),
    "three": (
        lambda: heads(4, 1, 16),
        ["heads.0 (4 channels), heads.1 (1 channels), heads.2 (16 channels) as one, 21 channels"],
        1,
    ),
    "no bias": (
        lambda: heads(3, 2, bias=False),
        ["heads.0 (3 channels), heads.1 (2 channels) as one, 5 channels"],
        1,
    ),
    "beside a large one": (
        lambda: heads(3, 17, 2),
        ["heads.0 (3 channels), heads.2 (2 channels) as one, 5 channels"],
        2,
    ),
    # Whose casts and norms stand behind the first.
    "autocast": (
        lambda: Autocast(heads(3, 12)),
        ["module.heads.0 (3 channels), module.heads.1 (12 channels) as one, 15 channels"],
        1,
    ),
    "norms": (
        lambda: Heads(
            *(nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels)) for layer in heads(3, 4).heads)
        ).eval(),
        ["heads.0.0 (3 channels), heads.1.0 (4 channels) as one, 7 channels"],
        1,
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_small_convolutions_are_joined(name):
    make, joined, left = TAKEN[name]
    check(make(), joined, left)


class Returned(Heads):
    """What is returned is memory that a caller may write to."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu()
        return self.heads[0](x), self.heads[1](x).permute(0, 2, 3, 1)


LEFT: dict[str, Callable[[], nn.Module]] = {
    "large": lambda: heads(17, 17),
    "one": lambda: heads(3),
    "kernels of two sizes": lambda: Heads(nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 3, padding=1)),
    "strides": lambda: Heads(nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 1, stride=2)),
    "with a bias and without": lambda: Heads(nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 1, bias=False)),
    "groups": lambda: heads(4, 2, groups=2),
    "transposed": lambda: Heads(nn.ConvTranspose2d(6, 3, 1), nn.ConvTranspose2d(6, 3, 1)),
    "two maps": lambda: Heads(
        nn.Sequential(nn.Tanh(), nn.Conv2d(6, 3, 1)), nn.Sequential(nn.ELU(), nn.Conv2d(6, 3, 1))
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_others_are_left_alone(name):
    module = LEFT[name]()
    check(module, [], len(module.heads))


class Copied(Heads):
    """Copies have the strides of what they are made of."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu()
        return self.heads[0](x).clone(), self.heads[1](x).clone()


class Strided(Heads):
    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu()
        return self.heads[0](x).relu(), self.heads[1](x).as_strided((24, 20), (35, 1)).relu()


@pytest.mark.parametrize("kind", [Returned, Copied, Strided])
@torch.no_grad()
def test_whose_memory_is_seen_is_left_alone(kind):
    module, x = kind(nn.Conv2d(6, 3, 1), nn.Conv2d(6, 12, 1)), torch.randn(2, 6, 7, 5)
    traced = trace_and_run(module, x, config=FROZEN)
    assert traced.paths == []
    for result, right in zip(traced.result, module(x)):
        assert_close(result, right, torch.float32)
        assert result.stride() == right.stride()


class Viewed(Heads):
    """In ways in which a part of a larger result cannot be."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu()
        return self.heads[0](x).flatten(0, 1) + 1, self.heads[1](x).view(-1) + 1


@torch.no_grad()
@pytest.mark.usefixtures("unoptimized")
def test_views_become_copies():
    module, x = Viewed(nn.Conv2d(6, 3, 1), nn.Conv2d(6, 12, 1)), torch.randn(2, 6, 7, 5)
    compiled = compile_and_run(module, x, config=FROZEN)
    assert "15 channels" in str(compiled.paths)
    for result, right in zip(compiled.result, module(x)):
        assert_close(result, right, torch.float32)


@torch.no_grad()
def test_a_weight_that_is_computed_is_left_alone():
    weights = torch.randn(2, 3, 6, 1, 1)

    def fn(x: Tensor, scale: Tensor) -> Tensor:
        one, two = (nn.functional.conv2d(x, weight * scale) for weight in weights)
        return one.relu() + two.relu()

    x, scale = torch.randn(2, 6, 7, 5), torch.tensor(2.0)
    traced = trace_and_run(fn, x, scale, config=FROZEN)
    assert traced.paths == []
    assert_close(traced.result, fn(x, scale), torch.float32)


def test_nothing_happens_without_freezing():
    module, x = heads(3, 12), torch.randn(2, 6, 7, 5)
    with torch.no_grad():
        assert trace_and_run(module, x, config={**FROZEN, "freezing": False}).paths == []
    assert trace_and_run(module, x, config=FROZEN).paths == []  # gradients are wanted


@torch.no_grad()
@pytest.mark.usefixtures("unoptimized")
def test_compiled_for_any_size():
    module, x = heads(3, 12), torch.randn(2, 6, 7, 5)
    for sizes in ((7, 5), (9, 11)):
        x = torch.randn(2, 6, *sizes)
        compiled = compile_and_run(module, x, dynamic=True, config=FROZEN)
        assert_close(compiled.result, module(x), torch.float32)
