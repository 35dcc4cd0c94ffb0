"""accelerate_sampling(): which of aten's calls become this package's, in whatever way they come to Inductor."""

from __future__ import annotations

import dataclasses

import inductor_vision
import pytest
import torch
import torch.nn.functional as F
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import compile_and_run, trace_and_run
from inductor_vision.tests.support.grid_sampler_2d import Case
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("optimized")

CASE = Case(batch=1, channels=16, size=(11, 14), out=(6, 8))


class Warp(nn.Module):
    def forward(self, input: Tensor, grid: Tensor) -> tuple[Tensor, ...]:
        sampled = F.grid_sample(input, grid, align_corners=False)
        larger = F.interpolate(input, scale_factor=2.5, mode="bilinear")
        smaller = F.interpolate(input, size=(9, 20), mode="bicubic")
        return sampled, larger, smaller, F.interpolate(input, size=(17, 20), mode="bilinear", align_corners=True)


SERVED = ["grid_sampler_2d", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_bilinear2d"]


def test_nothing_is_served_without_the_call():
    assert not trace_and_run(Warp(), CASE.input(), CASE.grid()).paths


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_calls_are_served(sampling, context):
    with context():
        traced = trace_and_run(Warp(), CASE.input(), CASE.grid())
    assert sorted(path.op for path in traced.paths) == SERVED
    assert {path.kind for path in traced.paths} == {"eager"}  # kept for their templates
    for result, stock in zip(traced.result, Warp()(CASE.input(), CASE.grid())):
        assert_close(result, stock, torch.float32)
        assert result.stride() == stock.stride()


@pytest.mark.usefixtures("unoptimized")
def test_gradients_are_right(sampling):
    """And sizes change from call to call."""

    def step(compiled: nn.Module, case: Case) -> list[Tensor]:
        input, grid = case.input().requires_grad_(), case.grid().requires_grad_()
        loss = sum(result.square().sum() for result in compiled(input, grid))
        return torch.autograd.grad(loss, [input, grid])

    compiled = compile_and_run(Warp(), CASE, run=step, dynamic=True, config={"cpp_wrapper": True})
    forward = [path.op for path in compiled.paths]
    assert "grid_sampler_2d_backward" in forward and sorted(forward)[0] == "grid_sampler_2d"
    with torch.compiler.set_stance("fail_on_recompile"):
        for case in (CASE, dataclasses.replace(CASE, size=(12, 9), out=(5, 7))):
            for gradient, right in zip(step(compiled.function, case), step(Warp(), case)):
                assert_close(gradient, right, torch.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
def test_exported_programs_are_served(sampling, tmp_path):
    arguments = CASE.input(), CASE.grid()
    program = torch.export.export(Warp(), arguments)
    with recorded_paths() as paths:
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "warp.pt2"))
    assert sorted((path.op, path.kind) for path in paths) == [(op, "template") for op in SERVED]
    results = torch._inductor.aoti_load_package(package)(*arguments)
    for result, stock in zip(results, Warp()(*arguments)):
        assert_close(result, stock, torch.float32)


def test_other_backends_are_left_alone(sampling):
    """What is not traced with Inductor's table knows nothing of it."""
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.aot_autograd import make_boxed_func

        def keep(graph, inputs):
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=keep)(graph, inputs)

    torch.compile(Warp(), backend=backend)(CASE.input(), CASE.grid())
    assert graphs and not any("inductor_vision" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda input: F.interpolate(input.byte(), scale_factor=2, mode="bilinear"), "integers"),
        (lambda input: F.interpolate(input.bfloat16(), scale_factor=2, mode="bilinear"), None),
        (lambda input: F.interpolate(input.double(), scale_factor=2, mode="bilinear"), None),
        (lambda input: F.interpolate(input, scale_factor=0.5, mode="bilinear"), "become larger"),
        (lambda input: F.interpolate(input.half(), scale_factor=0.5, mode="bicubic"), None),
    ],
)
def test_what_is_left_alone_says_why(sampling, function, reason):
    (path,) = trace_and_run(function, CASE.input()).paths
    assert path.op in ("upsample_bilinear2d", "upsample_bicubic2d")
    assert (path.kind, reason is None or reason in path.detail) == ("eager" if reason is None else "left alone", True)


def warp(input: Tensor, grid: Tensor, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    return F.grid_sample(input, grid, mode, padding, align_corners=False)


@pytest.mark.parametrize(
    ("channels", "dtype", "mode", "padding"),
    [
        (3, torch.float32, "bilinear", "zeros"),
        (16, torch.float32, "nearest", "border"),
        (16, torch.float64, "bicubic", "reflection"),
        (3, torch.float16, "bicubic", "zeros"),
        (16, torch.bfloat16, "bilinear", "reflection"),
    ],
)
def test_every_mode_and_dtype_is_served(sampling, channels, dtype, mode, padding):
    case = dataclasses.replace(CASE, channels=channels, dtype=dtype)
    (path,) = trace_and_run(lambda *call: warp(*call, mode, padding), case.input(), case.grid()).paths
    assert (path.op, path.kind) == ("grid_sampler_2d", "eager")


def test_gradients_of_few_channels_are_left_alone(sampling):
    case = dataclasses.replace(CASE, channels=3)
    paths = trace_and_run(warp, case.input().requires_grad_(), case.grid()).paths
    forward, backward = sorted(paths, key=lambda path: path.op)
    assert (forward.op, forward.kind) == ("grid_sampler_2d", "eager")
    assert backward.op == "grid_sampler_2d_backward"
    assert backward.kind == "left alone" and "bilinear gradients of images of 3 channels" in backward.detail


def test_where_inductor_generates_no_cpp(sampling):
    config_of_triton = {"cpu_backend": "triton"}
    paths = trace_and_run(Warp(), CASE.input(), CASE.grid(), config=config_of_triton).paths
    assert [path.kind for path in paths] == ["left alone"] * len(SERVED)
    assert all("cpu_backend" in path.detail for path in paths)


def test_it_is_in_the_keys_of_the_caches(sampling):
    assert "sampling" in torch.compiler.config.cache_key_tag.split("+")


def test_calling_it_again_does_nothing(sampling):
    from torch._inductor.decomposition import decompositions

    before = decompositions[torch.ops.aten.grid_sampler_2d.default]
    inductor_vision.accelerate_sampling()
    assert decompositions[torch.ops.aten.grid_sampler_2d.default] is before
