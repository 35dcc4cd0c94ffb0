"""accelerate(), which calls what applies, and inference_options(), of which each has an effect that can be seen."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from inductor_vision import accelerate, inference_options
from inductor_vision.integrations import models
from inductor_vision.lowering.installation import installer
from inductor_vision.tests.support.compiled import caches_disabled, run_python
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

LIBRARIES = ["accelerate_torchvision", "accelerate_transformers"]
OTHERS = ["fuse_depthwise_separable", "fold_norms", "accelerate_sampling"]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What accelerate() calls, which does nothing here; torchvision and transformers are installed."""
    made: list[str] = []
    names = (
        *("accelerate_torchvision", "accelerate_transformers", "fuse_depthwise_separable", "fold_norms"),
        *("accelerate_sampling", "use_winograd", "freeze_weights", "keep_memory"),
    )
    for name in names:
        monkeypatch.setattr(models, name, lambda name=name: made.append(name))
    monkeypatch.setattr(installer, "_winograd", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return made


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [*LIBRARIES, *OTHERS]),
        (
            {"sampling": False, "freezing": True, "memory": True},
            [*LIBRARIES, *OTHERS[:2], "freeze_weights", "keep_memory"],
        ),
        ({"torchvision": False}, [LIBRARIES[1], *OTHERS]),
        ({"torchvision": False, "transformers": False, "winograd": True}, [*OTHERS, "use_winograd"]),
        ({"depthwise_separable": False, "norms": False, "sampling": False}, LIBRARIES),
        (
            {
                "torchvision": False,
                "transformers": False,
                "depthwise_separable": False,
                "norms": False,
                "sampling": False,
            },
            [],
        ),
    ],
    ids=str,
)
def test_what_is_called(calls, arguments, expected):
    accelerate(**arguments)
    assert calls == expected


def test_without_either_library(calls, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    accelerate()
    assert calls == ["fuse_depthwise_separable", "fold_norms", "accelerate_sampling"]


def test_all_or_nothing(calls, monkeypatch):
    def broken() -> None:
        raise RuntimeError("torchvision is broken")

    with pytest.raises(TypeError, match="accelerate: memory must be True or False, got 'yes'"):
        accelerate(memory="yes")
    monkeypatch.setattr(models, "accelerate_torchvision", broken)
    with pytest.raises(RuntimeError, match="torchvision is broken"):
        accelerate(memory=True)
    assert calls == []


SETTINGS = """
import importlib.util

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
import torch._inductor.lowering  # what was asked for takes effect now
import inductor_vision
from torch._inductor.custom_graph_pass import CustomGraphPass

class Theirs(CustomGraphPass):
    def __call__(self, graph):
        pass

    def uuid(self):
        return "theirs"

theirs = Theirs()
torch._inductor.config.pre_grad_custom_pass = theirs
torch._inductor.config.size_asserts = True
torch.compiler.config.cache_key_tag = "theirs"
configs = torch._inductor.config, torch._dynamo.config, torch._functorch.config

def settings():
    return [{name: repr(value) for name, value in config.get_config_copy().items()} for config in configs]

before = settings()
for _ in range(2):
    inductor_vision.accelerate()
    after = settings()
    passes = torch._inductor.config.pre_grad_custom_pass
    assert passes[0] is theirs and [type(other).__name__ for other in passes[1:]] == ["FuseDepthwiseSeparable"], passes
    changed = [name for some, others in zip(before, after) for name in some if some[name] != others[name]]
    hooks = ["joint_custom_pre_pass", "pre_grad_custom_pass"]
    hooks += ["post_grad_custom_post_pass"] if importlib.util.find_spec("torchvision") else []
    assert sorted(changed) == sorted(hooks), changed
    assert torch.compiler.config.cache_key_tag.split("+")[0] == "theirs"
"""


def test_settings_of_a_user_stay_as_they_are():
    run_python(SETTINGS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)
        )
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.scale * x


def test_frozen_weights_are_constants():
    """In a process of its own, whose setting it is."""
    program = """
import torch
import inductor_vision
from torch import nn

inductor_vision.accelerate(torchvision=False, freezing=True)
layer, x = nn.Linear(3, 4), torch.rand(2, 3)
with torch.no_grad():
    compiled = torch.compile(layer)
    before = compiled(x)
    layer.weight.add_(1)
    print(torch.equal(compiled(x), before))
    layer.weight = nn.Parameter(layer.weight.clone())
    torch.testing.assert_close(compiled(x), layer(x))
"""
    assert run_python(program).split() == ["True"]


@pytest.mark.slow
def test_wrapper_is_compiled_and_checks_no_sizes():
    x = torch.rand(1, 8, 6, 6)
    with torch.no_grad(), config.patch(freezing=True), caches_disabled():
        for options, compiled in ((None, False), (inference_options(), True)):
            model = Net().eval()
            torch._dynamo.reset()
            out, (source,) = run_and_get_code(torch.compile(model, options=options), x)
            torch.testing.assert_close(out, model(x))
            assert ("assert_size_stride(" not in source) == compiled
            assert ("CppWrapperCodeCache" in source) == compiled
