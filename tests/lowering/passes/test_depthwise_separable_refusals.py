"""What the pass over depthwise-separable pairs leaves alone, and what it says about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inductor_vision.lowering.passes import depthwise_separable
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.depthwise_separable_pass import (
    IMAGE,
    Activated,
    Rewritten,
    assert_left,
    block,
    depthwise,
    norm,
    pointwise,
    rewrite,
)
from torch import Tensor, nn
from torch._inductor import config


@pytest.fixture(scope="module")
def threads() -> int:
    return 1


def test_training_mode():
    assert_left(block(nn.ReLU6()).train(), torch.randn(IMAGE), why="its batch norm is in training mode")


def test_norms_without_statistics():
    model = nn.Sequential(depthwise(), norm(8, track_running_stats=False), pointwise()).eval()
    assert_left(model, torch.randn(IMAGE), why="its batch norm is in training mode")


def test_a_last_norm_in_training_mode_stays():
    model = block(nn.ReLU6())
    model[-1].train()
    rewritten = Rewritten(model, torch.randn(IMAGE))
    assert len(rewritten.calls) == 1
    assert [user.target for user in rewritten.calls[0].users] == [F.batch_norm]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_other_uses_of_the_intermediate_result(which):
    """The result of the convolution, the norm or the activation is used elsewhere."""
    layers = block(nn.ReLU6())

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        results = [x]
        for layer in layers:
            results.append(layer(results[-1]))
        return results[-1], results[1 + which] * 2

    assert_left(run, torch.randn(IMAGE), why="its result is not only the input of a pointwise convolution")


# What stands behind a depthwise convolution, and the reason, with the operator and its arguments.
FOLLOWERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "function": (
        lambda x: F.interpolate(x, scale_factor=2),
        "torch.nn.functional.interpolate(scale_factor=2)",
    ),
    "by_position": (
        lambda x: F.hardshrink(x, lambd=0.25),
        "torch.nn.functional.hardshrink(lambd=0.25)",
    ),
    "layer": (nn.AvgPool2d(3, 1, 1), "torch.nn.functional.avg_pool2d(3, 1, 1, False, True) in activation"),
    "method": (lambda x: x.mul_(2), "torch.Tensor.mul_(2)"),
    "python": (lambda x: x + 1, "operator.add(1)"),
    "other_arguments": (
        lambda x: torch.ops.aten.elu.default(x, 1, 1.5),
        "aten.elu.default(alpha=1, scale=1.5)",
    ),
    "unnamed_arguments": (lambda x: F.elu_(x, 1, 1.5), "torch.nn.functional.elu_(1, 1.5)"),
}


@pytest.mark.parametrize("name", FOLLOWERS)
@torch.no_grad()
def test_what_follows_is_named(name):
    follower, wanted = FOLLOWERS[name]
    (left,) = Rewritten(Activated(follower).eval(), torch.randn(IMAGE)).left
    assert left == f"depthwise (3 x 3, 8 channels): it is followed by {wanted}, not by a pointwise convolution"


@torch.no_grad()
def test_a_slope_for_each_channel():
    model, x = Activated(nn.PReLU(8)).eval(), torch.randn(IMAGE)
    why = "its activation has slopes of shape (8,); the kernel takes one for all channels, of shape (1,)"
    assert_left(model, x, why=why)
    number = torch.tensor(0.25)
    assert_left(Activated(lambda x: torch.prelu(x, number)).eval(), x, why=why.replace("(8,)", "()"))
    with recorded_paths() as paths:
        assert rewrite(torch.export.export(model, (x,)).module(check_guards=False)) == []
    assert [path.detail for path in paths] == [f"depthwise (3 x 3, 8 channels): {why}"]


# What looks like an activation that is written out, and is none.
NOT_WRITTEN_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "in_place": lambda x: x * x.sigmoid_(),
    "to_itself": lambda x: x * torch.sigmoid(x, out=x),
    "hardsigmoid_in_place": lambda x: F.hardsigmoid(x, inplace=True) * x,
    "another_sum": lambda x: x * F.relu6(x + 2) / 6,
    "another_factor": lambda x: x * F.relu6(x + 3) / 5,
    "alpha": lambda x: x * F.relu6(torch.add(x, 3, alpha=2)) / 6,
    "rounded": lambda x: torch.div(F.relu6(x + 3), 6, rounding_mode="floor"),
    "the_reverse": lambda x: 6 / (F.relu6(x + 3) + 1),
    "used_again": lambda x: x * x.sigmoid() + x,
    "another_tensor": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "long": lambda x: ((((x + 1) * x + 1) * x + 1) * x + 1) * x,
}


@pytest.mark.parametrize("name", NOT_WRITTEN_OUT)
@torch.no_grad()
def test_not_written_out(name):
    model, x = Activated(NOT_WRITTEN_OUT[name]).eval(), torch.randn(IMAGE)
    rewritten = Rewritten(model, x)
    assert rewritten.calls == [] and len(rewritten.left) == 1
    assert torch.equal(rewritten.result, model(x))


class AbsThatIsATanh(nn.Module):
    """A layer whose name is that of a method."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.abs = depthwise().weight, pointwise().weight, nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.conv2d(x, self.first, groups=8)
        return F.conv2d(hidden / (1 + self.abs(hidden)), self.second)


class WithValues(torch.fx.Interpreter):
    """Notes what a graph's nodes have for values."""

    def run_node(self, node: torch.fx.Node) -> Any:
        node.meta["val"] = super().run_node(node)
        return node.meta["val"]


@torch.no_grad()
def test_layers_in_a_graph():
    """Which Dynamo and export look into, but torch.fx.symbolic_trace does not."""
    model, x = AbsThatIsATanh(), torch.randn(IMAGE)
    graph = torch.fx.symbolic_trace(model)
    WithValues(graph).run(x)
    assert rewrite(graph) == []
    assert torch.equal(graph(x), model(x))


@torch.no_grad()
def test_a_slope_that_is_computed_in_between():
    slope = torch.randn(1)
    assert_left(
        Activated(lambda x: F.prelu(x, slope * 2)).eval(),
        torch.randn(IMAGE),
        why="its activation's slope is computed after it",
    )


@torch.no_grad()
def test_a_slope_behind_another_activation():
    assert_left(
        Activated(nn.Sequential(nn.ReLU(), nn.PReLU())).eval(),
        torch.randn(IMAGE),
        why="followed by torch.nn.functional.prelu() in activation.1, not by a pointwise convolution",
    )


def test_exported_operators_are_named():
    model = nn.Sequential(depthwise(), nn.Upsample(scale_factor=2), pointwise())
    exported = torch.export.export(model, (torch.randn(IMAGE),)).module(check_guards=False)
    with recorded_paths() as paths:
        rewrite(exported)
    (left,) = [path.detail for path in paths]
    assert left == (
        "0 (3 x 3, 8 channels): it is followed by aten.upsample_nearest2d.vec(scale_factors=[2.0, 2.0]) in 1, "
        "not by a pointwise convolution"
    )


def test_an_intermediate_result_that_is_returned():
    model = nn.Sequential(depthwise(), pointwise())

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model[0](x)
        return hidden, model[1](hidden)

    why = (
        "model.0 (3 x 3, 8 channels): its result is not only the input of a pointwise convolution, but that of "
        "model.1 (1 x 1, 12 channels), and a result"
    )
    assert_left(run, torch.randn(IMAGE), why=why)


class SqueezeExcitation(nn.Module):
    """As it stands between the two in EfficientNets."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid()


def test_squeeze_and_excitation():
    assert_left(Activated(SqueezeExcitation()).eval(), torch.randn(IMAGE), why="not only the input of a pointwise")


LEFT: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "grouped": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), pointwise()), None),
    "dense": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3), pointwise()), None),
    "pointwise_stride": (
        lambda: nn.Sequential(depthwise(), pointwise(stride=2)),
        "is not a plain 1 x 1 convolution",
    ),
    "pointwise_padding": (
        lambda: nn.Sequential(depthwise(), pointwise(padding=1)),
        "is not a plain 1 x 1 convolution",
    ),
    "pointwise_groups": (
        lambda: nn.Sequential(depthwise(), pointwise(groups=2)),
        "is not a plain 1 x 1 convolution",
    ),
    "not_pointwise": (
        lambda: nn.Sequential(depthwise(), nn.Conv2d(8, 12, 3)),
        "is not a plain 1 x 1 convolution",
    ),
    "transposed": (
        lambda: nn.Sequential(depthwise(), nn.ConvTranspose2d(8, 12, 1)),
        "not by a pointwise convolution",
    ),
    "one_sided_padding": (
        lambda: nn.Sequential(depthwise(kernel_size=4, padding="same"), pointwise()),
        "it pads one side more than the other",
    ),
    "activation_before_the_norm": (
        lambda: nn.Sequential(depthwise(), nn.ReLU(), norm(8), pointwise()),
        "not by a pointwise convolution",
    ),
    "nothing_follows": (depthwise, "its result is not only"),
}


@pytest.mark.parametrize("name", LEFT)
@torch.no_grad()
def test_left_alone(name):
    model, why = LEFT[name]
    assert_left(model().eval(), torch.randn(IMAGE), why=why)


@torch.no_grad()
def test_an_unbatched_image():
    assert_left(nn.Sequential(depthwise(), pointwise()), torch.randn(IMAGE[1:]), why="its input has no batch")


@pytest.mark.parametrize("missing", ["conv2d_1", "batch_norm_1"])
def test_nodes_of_other_passes(missing):
    """Which may not say what their values are."""
    model = nn.Sequential(depthwise(), norm(8), pointwise(), norm(12)).eval()
    exported = torch.export.export(model, (torch.randn(IMAGE),)).module(check_guards=False)
    (node,) = [node for node in exported.graph.nodes if node.name == missing]
    del node.meta["val"]
    with recorded_paths() as paths:
        fused = rewrite(exported)
    if missing == "conv2d_1":
        assert fused == [] and "result is a NoneType, not a plain tensor" in paths[0].detail
    else:
        assert [user.name for user in fused[0].users] == [missing]  # which stays


@torch.no_grad()
def test_other_devices():
    x = torch.randn(IMAGE, device="meta")
    assert_left(block().to("meta"), x, why="is on meta, and the kernel is for the CPU")


@torch.no_grad()
def test_no_kernel():
    with config.patch(cpu_backend="triton"):
        assert_left(block(nn.ReLU6()), torch.randn(IMAGE), why="torch._inductor.config.cpu_backend is 'triton'")


LOSES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "weight": (
        lambda: nn.Sequential(depthwise(512), pointwise(512, 512)),
        (4, 512, 14, 14),
        "its pointwise weight is too large",
    ),
    "stride": (
        lambda: nn.Sequential(depthwise(96, stride=2), pointwise(96, 24)),
        (8, 96, 112, 112),
        "most of the time goes into reading 36 MB of memory",
    ),
}


@pytest.mark.parametrize("name", LOSES)
@torch.no_grad()
def test_where_it_would_not_be_faster(name, monkeypatch):
    """It depends on the size of the image, on the machine, and on the number of images."""
    model, size, why = LOSES[name]
    monkeypatch.setattr(depthwise_separable, "cache_bytes", lambda: 512 << 10)
    assert_left(model(), torch.randn(size), why=why)
    assert len(Rewritten(model(), torch.randn(1, *size[1:])).calls) == 1
    assert len(Rewritten(model(), torch.randn(size), dynamic=True).calls) == 0  # by the sizes that it is compiled with
    monkeypatch.setattr(depthwise_separable, "cache_bytes", lambda: 4 << 20)
    assert len(Rewritten(model(), torch.randn(size)).calls) == 1


@pytest.mark.parametrize(("dtype", "has"), [(torch.bfloat16, "amx_bf16"), (torch.float16, "avx512_fp16")])
@torch.no_grad()
def test_processors_with_low_precision_products(dtype, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    image = torch.randn(IMAGE)
    assert_left(block(nn.ReLU6()).to(dtype), image.to(dtype), why=f"multiplies {dtype} by itself")
    other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}[dtype]
    assert len(Rewritten(block(nn.ReLU6()).to(other), image.to(other)).calls) == 1
    with torch.autocast("cpu", dtype):
        assert_left(block(nn.ReLU6()), image, why=f"multiplies {dtype} by itself")


@torch.no_grad()
def test_as_a_weight():
    """What goes into the convolution as its weight is not its input."""
    first = depthwise(8, kernel_size=1, padding=0)

    def run(x: Tensor) -> Tensor:
        return F.conv2d(x, first(x[:, :, :1, :1]))

    assert_left(run, torch.randn(8, 8, 4, 4), why="not by a pointwise convolution")


@torch.no_grad()
def test_weights_that_are_computed():
    """Those that are there when the depthwise convolution begins will do."""
    first, second = depthwise(), pointwise()

    def before(x: Tensor) -> Tensor:
        weight = second.weight * 2
        return F.conv2d(first(x), weight)

    def between(x: Tensor) -> Tensor:
        hidden = first(x)
        return F.conv2d(hidden, second.weight * 2)

    x = torch.randn(IMAGE)
    rewritten = Rewritten(before, x)
    assert len(rewritten.calls) == 1
    assert_close(rewritten.result, before(x), torch.float32)
    assert_left(between, x, why="is computed after it")


@pytest.mark.parametrize("mode", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_not_across_a_change_of_mode(mode):
    first, second = depthwise(), pointwise()

    def run(x: Tensor) -> Tensor:
        with mode():
            hidden = first(x)
        return second(hidden.float() if mode is not torch.no_grad else hidden)

    rewritten = Rewritten(run, torch.randn(IMAGE))
    assert rewritten.calls == [] and len(rewritten.left) == 1
    assert rewritten.result.requires_grad


def test_a_last_norm_in_another_mode_stays():
    first, second, last = depthwise(), pointwise(), norm(12)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            out = second(first(x))
        return last(out)

    rewritten = Rewritten(run, torch.randn(IMAGE))
    assert len(rewritten.calls) == 1
    assert rewritten.result.requires_grad


@torch.no_grad()
def test_groups_that_are_an_input():
    first, second = depthwise(), pointwise()

    def run(x: Tensor, groups: int) -> Tensor:
        return second(F.conv2d(x, first.weight, groups=groups))

    assert Rewritten(run, torch.randn(IMAGE), 8, dynamic=True).calls == []


@torch.no_grad()
def test_exported_weights_that_are_shared():
    layer, mixing = depthwise(), pointwise(8, 8)
    model, x = nn.Sequential(layer, mixing, nn.ReLU(), layer, mixing).eval(), torch.randn(IMAGE)
    graph = torch.export.export(model, (x,)).module(check_guards=False)
    assert len(rewrite(graph)) == 2  # which checks that the graph is in order
    assert_close(graph(x), model(x), torch.float32)


def test_limits_that_are_inputs():
    """What dynamic=True makes of the limits of a ReLU6."""
    rewritten = Rewritten(block(nn.ReLU6()), torch.randn(IMAGE), dynamic=True)
    assert rewritten.calls == []
    (left,) = rewritten.left
    assert left == (
        "0 (3 x 3, 8 channels): it is followed by torch.nn.functional.hardtanh(inplace=False) in 2, "
        "whose parameters are not known when it is compiled"
    )


def test_function_transforms():
    first, second = depthwise().weight, pointwise().weight
    mapped = torch.vmap(lambda x: F.conv2d(F.conv2d(x, first, groups=8), second))
    assert_left(lambda x: mapped(x), torch.randn(3, *IMAGE), why="torch.func")
