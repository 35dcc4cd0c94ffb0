"""Programs that change tensors in place around a depthwise-separable pair: the pass makes none of them fail or differ.

Each is compiled with the pass and without it, and computes the same, or fails in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import compile_and_run
from inductor_vision.tests.support.depthwise_separable_pass import (
    IMAGE,
    Rewritten,
    assert_left,
    depthwise,
    norm,
    pointwise,
    rewrite,
)
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint


@pytest.fixture(scope="module")
def threads() -> int:
    return 1


# How a tensor may be changed in place. Some raise where it is a leaf that has gradients, with the pass and without it.


@torch.library.custom_op("inductor_vision_tests::double_", mutates_args=("x",))
def _double(x: Tensor) -> None:
    x.mul_(2)


@_double.register_fake
def _(x: Tensor) -> None:
    pass


def _without_gradients(x: Tensor) -> None:
    with torch.no_grad():
        x.mul_(2)


def _by_item(x: Tensor) -> None:
    x[0] = 0.5


def _by_operator(x: Tensor) -> None:
    x += 1


def _in_a_checkpoint(x: Tensor) -> None:
    checkpoint(lambda x: x.mul_(2) + 1, x, use_reentrant=False)


def _of_a_training_norm(x: Tensor) -> None:
    """Which writes to its statistics."""
    statistics = x.detach().view(-1)[:4]
    F.batch_norm(torch.arange(16.0).reshape(4, 4), statistics, torch.ones(4), training=True)


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda x: x.mul_(2),
    "function": torch.relu_,
    "argument": lambda x: F.relu(x, inplace=True),
    "operator": _by_operator,
    "item": _by_item,
    "out": lambda x: torch.mul(x, 2, out=x),
    "copy": lambda x: x.copy_(x * 2),
    "view": lambda x: x.view(-1)[1:].mul_(2),
    "detached": lambda x: x.detach().mul_(2),
    "data": lambda x: x.data.mul_(2),
    "foreach": lambda x: torch._foreach_mul_([x.detach()], 2),
    "without_gradients": _without_gradients,
    "custom_operator": lambda x: torch.ops.inductor_vision_tests.double_(x.detach()),
    "checkpoint": _in_a_checkpoint,
    "training_norm": _of_a_training_norm,
    "nothing": lambda x: x * 2,
}

# What a pair is given.
SIZES = {
    "input": IMAGE,
    "depthwise_weight": (8, 1, 3, 3),
    "depthwise_bias": (8,),
    "mean": (8,),
    "variance": (8,),
    "scale": (8,),
    "shift": (8,),
    "pointwise_weight": (12, 8, 1, 1),
    "pointwise_bias": (12,),
}
TRAINABLE = [name for name in SIZES if name not in ("mean", "variance")]


@dataclasses.dataclass(frozen=True)
class Program:
    """A pair with a batch norm, and a change of a tensor.

    Attributes:
        change: how.
        of: which tensor.
        place: when: before the pair, before its activation or its pointwise convolution, or after it.
        trained: what has gradients.
        own: whether the input is a tensor of the program's own, not the caller's.
    """

    change: str
    of: str
    place: str
    trained: frozenset[str]
    own: bool = False

    def __call__(self, **tensors: Tensor) -> Tensor:
        if self.own:
            tensors["input"] = tensors["input"] * 1.5
        t = tensors

        def arrive(place: str) -> None:
            if place == self.place:
                CHANGES[self.change](t[self.of])

        arrive("before")
        x = F.conv2d(t["input"], t["depthwise_weight"], t["depthwise_bias"], padding=1, groups=8)
        arrive("norm")
        x = F.batch_norm(x, t["mean"], t["variance"], t["scale"], t["shift"])
        arrive("pointwise")
        x = F.conv2d(F.silu(x), t["pointwise_weight"], t["pointwise_bias"])
        arrive("after")
        return x * t["input"].sum()  # whose gradient reads no tensor that has changed

    def outcome(self, backend: Callable[..., Any]) -> tuple[str, dict[str, Tensor]]:
        """How it ends; result, gradients, and what became of the tensors."""
        generator = torch.Generator().manual_seed(0)
        tensors = {name: torch.rand(size, generator=generator) + 0.5 for name, size in SIZES.items()}
        for name in self.trained:
            tensors[name].requires_grad_()
        torch._dynamo.reset()
        try:
            result = torch.compile(self, backend=backend, fullgraph=True)(**tensors)
            if self.trained:
                result.sum().backward()
        except Exception as error:  # of whatever kind: it is compared
            return next((reason for reason in REASONS if reason in str(error)), f"{type(error)}: {error}"), {}
        gradients = {f"gradient of {name}": tensors[name].grad for name in self.trained}
        return "computes", {"result": result, **tensors, **gradients}


REASONS = "modified by an inplace operation", "a leaf Variable that requires grad", "arguments don't support"


def with_the_pass(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    rewrite(graph)
    return aot_eager(graph, inputs)


def assert_same(program: Program) -> tuple[str, list[str]]:
    """With the pass and without it; how it ends, and what became of the pair."""
    ends, expected = program.outcome(aot_eager)
    with recorded_paths() as paths:
        also_ends, actual = program.outcome(with_the_pass)
    assert also_ends == ends
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(actual[name].detach(), tensor.detach(), torch.float32, name)
    return ends, [path.kind for path in paths if path.kind in ("fused", "left alone")]


BOTH_WEIGHTS = frozenset({"depthwise_weight", "pointwise_weight"})


@pytest.mark.parametrize("change", CHANGES)
def test_what_layers_do_not_save_may_change(change):
    """They have the gradient of biases without the values."""
    kind = "fused" if change == "nothing" else "left alone"
    assert assert_same(Program(change, "shift", "after", BOTH_WEIGHTS)) == ("computes", [kind])


@pytest.mark.parametrize("of", ["depthwise_bias", "mean", "pointwise_bias"])
@pytest.mark.parametrize("place", ["before", "pointwise", "after"])
def test_places(of, place):
    """Without gradients nothing is saved: what is changed after the pair is not its concern."""
    program = Program("data", of, place, BOTH_WEIGHTS)
    assert assert_same(program) == ("computes", ["fused" if place == "before" else "left alone"])
    program = dataclasses.replace(program, trained=frozenset())
    assert assert_same(program) == ("computes", ["left alone" if place == "pointwise" else "fused"])


@pytest.mark.parametrize("place", ["norm", "pointwise", "after"])
def test_an_input_that_changes(place):
    """The pair is computed where the depthwise convolution was. A layer that is frozen does not save its input."""
    program = Program("method", "input", place, frozenset(), own=True)
    assert assert_same(program) == ("computes", ["fused"])
    program = dataclasses.replace(program, trained=frozenset({"pointwise_weight"}))
    assert assert_same(program) == ("computes", ["left alone"])


@pytest.mark.slow
@settings(max_examples=settings.default.max_examples // 3)
@given(
    st.builds(
        Program,
        st.sampled_from([name for name in CHANGES if name != "nothing"]),
        st.sampled_from(list(SIZES)),
        st.sampled_from(["before", "norm", "pointwise", "after"]),
        st.sets(st.sampled_from(TRAINABLE), max_size=3).map(frozenset),
        st.booleans(),
    )
)
def test_any_program(program):
    assert_same(program)


# Models


@torch.no_grad()
def test_an_input_that_is_changed_afterwards():
    """The pair is computed where the depthwise convolution was."""
    first, second = depthwise(), pointwise()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 2
        hidden = first(x)
        x.add_(1)
        return second(hidden), x

    x = torch.randn(IMAGE)
    rewritten = Rewritten(run, x)
    assert len(rewritten.calls) == 1
    assert_close(rewritten.result[0], run(x)[0], torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("activation", [torch.tanh, torch.sigmoid])
def test_an_activation_that_is_written_to_a_tensor(activation):
    """Others may read it."""
    weight, pointwise_weight, x = torch.randn(8, 1, 3, 3), torch.randn(12, 8, 1, 1), torch.randn(IMAGE)

    def program(x: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        hidden = activation(F.conv2d(x, weight, padding=1, groups=8), out=buffer)
        return F.conv2d(hidden, pointwise_weight), buffer * 2

    compiled = torch.compile(program, backend=with_the_pass, fullgraph=True)
    buffers = torch.zeros(2, *IMAGE)
    for ours, right in zip(compiled(x, buffers[0]), program(x, buffers[1]), strict=True):
        assert_close(ours, right, torch.float32)
    assert torch.equal(*buffers)


@torch.no_grad()
def test_a_last_norm_with_parameters_of_its_own_time_stays():
    """The pair is fused without it; also where its input would be changed before all is there."""
    first, second, last = depthwise(), pointwise(), norm(12)

    def run(x: Tensor, scale: Tensor) -> Tensor:
        x = x * 2
        out = second(first(x))
        x.mul_(3)
        return F.batch_norm(out, last.running_mean, last.running_var, scale * 2, last.bias)

    inputs = torch.randn(IMAGE), torch.rand(12)
    rewritten = Rewritten(run, *inputs)
    assert len(rewritten.calls) == 1
    assert_close(rewritten.result, run(*inputs), torch.float32)


def changes_its_weight(x: Tensor, weight: Tensor) -> Tensor:
    hidden = F.conv2d(x, torch.ones(8, 1, 3, 3), groups=8)
    weight.view(-1).mul_(2)
    return F.conv2d(hidden, weight)


@torch.no_grad()
def test_what_changes_is_named():
    why = "the pointwise convolution's weight may be changed in place after it, by torch.Tensor.mul_(2)"
    assert_left(changes_its_weight, torch.randn(IMAGE), torch.randn(12, 8, 1, 1), why=why)


def test_inputs_that_share_memory():
    """Whose change is that of the other."""
    model, memory = nn.Sequential(depthwise(), pointwise()), torch.randn(IMAGE)

    def run(x: Tensor, same: Tensor) -> Tensor:
        out = model(x)
        same.mul_(2)
        return out

    assert_left(run, memory, memory.view(-1)[:5], why="its input may be changed in place after it")


def test_a_change_after_the_graph():
    """What is saved must not change until gradients are computed. A layer that is frozen saves nothing."""
    model, x = nn.Sequential(depthwise(), nn.ReLU(), pointwise()), torch.randn(IMAGE)
    model[0].requires_grad_(False)
    torch._dynamo.reset()
    out = torch.compile(model, backend=with_the_pass)(x)
    x.zero_()
    out.sum().backward()
    assert_left(model, x, why="(1 x 1, 12 channels), but not of it: it would not save its input for them")
    model.requires_grad_(False)
    assert len(Rewritten(model, x).calls) == 1
    assert len(Rewritten(model, x.requires_grad_()).calls) == 1  # whose gradients need the weights alone


def test_a_bias_that_is_trained_alone():
    """An optimizer may step before gradients of an older call are computed: its layers have not saved it."""
    model = nn.Sequential(depthwise(bias=True), pointwise()).requires_grad_(False)
    model[0].bias.requires_grad_()
    assert_left(model, torch.randn(IMAGE), why="gradients are wanted of its bias or batch norm, but not of its weight")


# Tensors of other classes


class Photograph(Tensor):
    """A class that adds nothing."""


def photograph(image: Tensor) -> Tensor:
    return image.as_subclass(Photograph)


def test_tensors_of_other_classes():
    assert_left_where_gradients_are_wanted(photograph(torch.randn(IMAGE)))


def test_images_of_torchvision(torchvision_python):
    from torchvision import tv_tensors

    assert_left_where_gradients_are_wanted(tv_tensors.Image(torch.randn(IMAGE)))


def assert_left_where_gradients_are_wanted(x: Tensor) -> None:
    """AOTAutograd cannot save such an input."""
    model = nn.Sequential(depthwise(), nn.ReLU(), pointwise(8, 8))
    assert_left(lambda x: model(x), x, why=f"is a {type(x).__name__}, not a plain tensor")
    assert_left(lambda x: model(x[:1]), x, why=f"is a {type(x).__name__}, not a plain tensor")
    assert len(Rewritten(lambda x: model(x * 2), x).calls) == 1
    with torch.no_grad():
        assert len(Rewritten(lambda x: model(x), x).calls) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("switched_on")
def test_models_train_on_tensors_of_other_classes():
    model, x = nn.Sequential(depthwise(), nn.ReLU(), pointwise(8, 8), depthwise(), pointwise(8, 8)), torch.randn(IMAGE)
    compiled = compile_and_run(lambda x: model(x), photograph(x), run=lambda f, x: f(x).sum().backward())
    assert [path.kind for path in compiled.paths if path.kind in ("fused", "left alone")] == ["left alone", "fused"]
    gradients = [parameter.grad for parameter in model.parameters()]
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for gradient, wanted in zip(gradients, expected):
        assert_close(gradient, wanted, torch.float32)
