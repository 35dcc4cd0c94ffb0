"""accelerate(), which calls what applies, and inference_options(), of which each has an effect that can be seen."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inductor_vision import accelerate, inference_options
from inductor_vision.integrations import models
from inductor_vision.tests.support.compiled import compile_and_run, run_python
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What accelerate() calls, which does nothing here; torchvision is installed."""
    made: list[str] = []
    for name in ("accelerate_torchvision", "fuse_depthwise_separable", "fold_norms", "freeze_weights", "keep_memory"):
        monkeypatch.setattr(models, name, lambda name=name: made.append(name))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return made


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["accelerate_torchvision", "fuse_depthwise_separable", "fold_norms"]),
        (
            {"freezing": True, "memory": True},
            ["accelerate_torchvision", "fuse_depthwise_separable", "fold_norms", "freeze_weights", "keep_memory"],
        ),
        ({"torchvision": False}, ["fuse_depthwise_separable", "fold_norms"]),
        ({"depthwise_separable": False, "norms": False}, ["accelerate_torchvision"]),
        ({"torchvision": False, "depthwise_separable": False, "norms": False}, []),
    ],
    ids=str,
)
def test_what_is_called(calls, arguments, expected):
    accelerate(**arguments)
    assert calls == expected


def test_without_torchvision(calls, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    accelerate()
    assert calls == ["fuse_depthwise_separable", "fold_norms"]


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
    assert sorted(changed) == ["joint_custom_pre_pass", "post_grad_custom_post_pass", "pre_grad_custom_pass"], changed
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


def traced(options: dict[str, Any]) -> tuple[nn.Module, Callable[..., Tensor], list[int]]:
    """A model, the same with Dynamo in front, under those of the options that are Dynamo's, and a list that is longer
    after each time that it was traced."""
    model, times = Net().eval(), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        times.append(len(times))
        return graph.forward

    options = {name: value for name, value in options.items() if name == "guard_filter_fn"}
    return model, torch.compile(model, backend=backend, options=options), times


def number_of_guards(model: nn.Module) -> int:
    (entry,) = _debug_get_cache_entry_list(model.forward)
    return str(entry.guard_manager).count("\n")


def test_a_fixed_model_is_asked_for_its_mode_alone():
    guards = []
    for fixed in (False, True):
        torch._dynamo.reset()
        model, call, times = traced(inference_options(fixed_model=fixed))
        x = torch.rand(1, 8, 6, 6)
        with torch.no_grad():
            assert torch.equal(call(x), model(x))
            guards.append(number_of_guards(model))
            model.scale = 3.0
            noticed = torch.equal(call(x), model(x))
            assert noticed != fixed and len(times) == 2 - fixed
            for changed, given in ((model.train, x), (model.eval, torch.rand(1, 8, 5, 6))):
                before = len(times)
                changed()
                call(given)
                assert len(times) == before + 1
            before = len(times)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert call(x).dtype == model(x).dtype == torch.bfloat16
            assert len(times) == before + 1
    every, few = guards
    assert 3 * few < every


def test_options_are_those_of_the_caller():
    options = inference_options(fixed_model=True)
    options["cpp_wrapper"] = False
    torch.compile(Net(), options=options)  # takes from it what is Dynamo's
    assert "guard_filter_fn" not in options
    assert inference_options(fixed_model=True)["cpp_wrapper"] and "guard_filter_fn" in inference_options(
        fixed_model=True
    )
    assert "guard_filter_fn" not in inference_options()


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
def test_wrapper_is_compiled_and_checks_no_sizes():
    model, x = Net().eval(), torch.rand(1, 8, 6, 6)
    with torch.no_grad():
        without = compile_and_run(model, x, config={"freezing": True})
        torch._dynamo.reset()
        compiled = compile_and_run(model, x, config={"freezing": True, **inference_options()})
        expected = model(x)
    torch.testing.assert_close(compiled.result, expected)
    assert "assert_size_stride(buf" in without.source and "assert_size_stride(" not in compiled.source
    assert "CppWrapperCodeCache" in compiled.source and "CppWrapperCodeCache" not in without.source
