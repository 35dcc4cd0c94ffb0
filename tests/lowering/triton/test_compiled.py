"""What Inductor makes of each operator where it generates Triton code: the path of a call, and which kernels run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inductor_vision import deform_conv2d, explain, multiscale_roi_align, nms, patch_conv2d, roi_align
from inductor_vision.ops.registry import OPS
from inductor_vision.tests.support import (
    deform_conv2d as deform,
    depthwise_separable_conv2d as separable,
    patch_conv2d as patch,
    regions,
)
from inductor_vision.tests.support.boxes import Boxes, RotatedBoxes
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Compiled, compile_and_run
from inductor_vision.tests.support.convolution import gradient_like
from inductor_vision.tests.support.paste_masks import Case as Paste
from inductor_vision.tests.support.triton import launched_kernels, moved
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


def _gradient(op: str, positional: tuple[Any, ...], wanted: int) -> tuple[Any, ...]:
    grad = gradient_like(OPS[op].decomposition(*positional))
    return (grad, *positional, [True] * wanted)


def _boxes(kind: type[Boxes]) -> tuple[Tensor, ...]:
    return kind(20).tensors()


def _heatmaps() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 5, 6, generator=generator), torch.tensor([[1.5, 2, 9.25, 8], [0, 0, 20, 3.5]])


def _winograd() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    input, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 7, 9), (4, 3, 3, 3)))
    return input, weight, torch.arange(4.0), [1, 1], 4


def _attention() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    value, locations, weights = (
        torch.rand(*shape, generator=generator) for shape in ((2, 14, 3, 4), (2, 5, 3, 4, 2), (2, 5, 3, 4))
    )
    return value, [4, 3, 1, 2], None, locations, weights, [2, 2], "default"


# Of each operator a call, and the kernel of this package that it runs; None: it has none, and runs Inductor's alone.
CALLS: dict[str, tuple[Callable[[], tuple[Any, ...]], str | None]] = {
    "deform_conv2d": (lambda: deform.sample("mask_bias").positional, "convolve"),
    "deform_conv2d_backward": (
        lambda: _gradient("deform_conv2d", deform.sample("mask_bias").positional, 5),
        "spread",
    ),
    "patch_conv2d": (lambda: patch.sample("plain").positional, "convolve"),
    "patch_conv2d_backward": (lambda: _gradient("patch_conv2d", patch.sample("plain").positional, 3), "correlate"),
    "depthwise_separable_conv2d": (lambda: separable.sample("then_silu").positional, "convolve"),
    "depthwise_separable_conv2d_backward": (
        lambda: _gradient("depthwise_separable_conv2d", separable.sample("then_silu").positional, 6),
        None,
    ),
    "winograd_conv2d": (_winograd, None),
    "winograd_conv2d_backward": (lambda: _gradient("winograd_conv2d", _winograd(), 3), None),
    "multiscale_deformable_attention": (_attention, None),
    "multiscale_deformable_attention_backward": (
        lambda: _gradient("multiscale_deformable_attention", _attention(), 3),
        None,
    ),
    "roi_align": (lambda: regions.sample("roi_align", "adaptive").positional, "sample_bins"),
    "roi_align_backward": (lambda: regions.sample("roi_align", "adaptive").positional_backward, "sample_bins"),
    "ps_roi_align": (lambda: regions.sample("ps_roi_align", "plain").positional, "sample_bins"),
    "ps_roi_align_backward": (lambda: regions.sample("ps_roi_align", "plain").positional_backward, "sample_bins"),
    "roi_pool": (lambda: regions.sample("roi_pool", "plain").positional, "pool_bins"),
    "roi_pool_backward": (lambda: regions.sample("roi_pool", "plain").positional_backward, None),
    "ps_roi_pool": (lambda: regions.sample("ps_roi_pool", "plain").positional, "pool_bins"),
    "ps_roi_pool_backward": (lambda: regions.sample("ps_roi_pool", "plain").positional_backward, "pool_bins"),
    "nms": (lambda: (*_boxes(Boxes), 0.3), "choose"),
    "nms_rotated": (lambda: (*_boxes(RotatedBoxes)[:2], None, 0.3), "choose"),
    "soft_nms": (lambda: (*_boxes(Boxes), 0.3, 0.5, 0.1, "linear"), "take"),
    "box_iou_rotated": (lambda: (_boxes(RotatedBoxes)[0], RotatedBoxes(7).tensors()[0]), None),
    "heatmaps_to_keypoints": (_heatmaps, "find_peak"),
    "paste_masks": (lambda: Paste().positional, None),
    "paste_masks_backward": (lambda: Paste().positional_backward, None),
}


def slow_but(*quick: str) -> list[Any]:
    """All operators; those that are not named are left to "make test-all", since the interpreter takes its time."""
    return [op if op in quick else pytest.param(op, marks=pytest.mark.slow) for op in CALLS]


def run_compiled(op: str, arguments: tuple[Any, ...], **options: Any) -> tuple[Compiled, list[str]]:
    """A call of an operator, compiled, and the Triton kernels that it launched."""
    leaves, structure = tree_flatten(arguments)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def call(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return OPS[op](
            *tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
        )

    with launched_kernels() as names:
        compiled = compile_and_run(call, *tensors, **options)
    return compiled, names


def results_of(value: Any) -> list[Tensor]:
    return [leaf.cpu() for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def assert_same(compiled: Compiled, expected: Any) -> None:
    for actual, value in zip(results_of(compiled.result), results_of(expected), strict=True):
        assert actual.dtype == value.dtype
        if actual.is_floating_point():
            assert_close(actual, value, torch.float32)
        else:
            assert torch.equal(actual, value)


def test_each_operator_has_a_call():
    # What aten has is Inductor's in Triton, and a pass puts what stands for several of its operators in no graph there.
    sampling = {"upsample_bilinear2d", "upsample_bicubic2d", "grid_sampler_2d"}
    names = sampling | {"direct_conv2d", "inverted_residual_conv2d"}
    aten = names | {f"{name}_backward" for name in names}
    assert sorted(CALLS) == sorted(OPS.keys() - aten)


# Attention and overlaps take long, and have no kernels; winograd_conv2d and the gradient of roi_pool have none either.
LONG = {"multiscale_deformable_attention", "multiscale_deformable_attention_backward", "box_iou_rotated"}


@pytest.mark.parametrize("op", slow_but(*(CALLS.keys() - LONG)))
def test_an_operator_runs_as_triton_code(op: str, device: torch.device):
    make, kernel = CALLS[op]
    arguments = make()
    compiled, names = run_compiled(op, moved(arguments, device))
    (path,) = compiled.paths
    if kernel is not None or op == "depthwise_separable_conv2d_backward":
        assert path.kind == "triton"
    else:
        assert path.kind == "decomposition" and path.detail.startswith("Triton code, no kernel of its own; ")
    assert compiled.templates == 0
    assert names, "no Triton kernel ran"
    if kernel is not None:
        assert any(name.startswith(kernel) for name in names), names
    assert_same(compiled, OPS[op].decomposition(*arguments))


@pytest.mark.parametrize(
    "op", slow_but("deform_conv2d", "patch_conv2d", "depthwise_separable_conv2d", "roi_pool_backward", "soft_nms")
)
def test_all_sizes_may_be_dynamic(op: str, device: torch.device):
    make, kernel = CALLS[op]
    arguments = make()
    with torch._dynamo.config.patch(specialize_int=True):  # strides and such are constants
        compiled, names = run_compiled(op, moved(arguments, device), dynamic=True)
    assert kernel is None or any(name.startswith(kernel) for name in names), names
    assert_same(compiled, OPS[op].decomposition(*arguments))


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_of_unbounded_numbers(method: str, device: torch.device):
    boxes = _boxes(Boxes)
    for numbers in ((0.3, math.inf, -math.inf), (math.nan, 0.5, math.inf), (-math.inf, 1e-30, math.nan)):
        compiled, _ = run_compiled("soft_nms", (*moved(boxes, device), *numbers, method))
        assert_same(compiled, OPS["soft_nms"].decomposition(*boxes, *numbers, method))


@pytest.mark.parametrize("op", ["deform_conv2d", "deform_conv2d_backward", "depthwise_separable_conv2d"])
def test_no_columns_and_nothing_between_convolutions_is_stored(op: str, device: torch.device):
    """Each buffer is no larger than the largest of what goes in and what comes out."""
    arguments = moved(CALLS[op][0](), device)
    compiled, _ = run_compiled(op, arguments)
    shapes = re.findall(r"empty_strided_\w+\(\(([\d, ]+)\)", compiled.source)
    largest = max(tensor.numel() for tensor in (*results_of(arguments[:-1]), *results_of(compiled.result)))
    assert shapes
    for shape in shapes:
        numbers = [int(number) for number in shape.split(",") if number.strip()]
        assert torch.Size(numbers).numel() <= largest, shape
    assert "extern_kernels" not in compiled.source.replace("import extern_kernels", "").replace("extern_kernels = ", "")


def gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    out = function(*leaves)
    return list(
        torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], gradient_like(out.cpu()).to(out))
    )


TRAINED = {
    "deform_conv2d": (
        lambda x, offset, weight, bias, mask: deform_conv2d(
            x.sin(), offset, weight, bias, padding=1, mask=mask.sigmoid()
        ).relu(),
        lambda: [tensor for tensor in deform.sample("mask_bias").positional if isinstance(tensor, Tensor)],
    ),
    "patch_conv2d": (
        lambda x, weight, bias: patch_conv2d(x.sin(), weight, bias, padding=1).relu(),
        lambda: list(patch.sample("plain").positional[:3]),
    ),
    "roi_align": (
        lambda x: roi_align(x.sin(), _ROIS.to(x.device), (2, 3), 0.5).exp(),
        lambda: [regions.sample("roi_align", "plain").input],
    ),
    "multiscale_roi_align": (
        lambda x: multiscale_roi_align(
            [x.sin(), x[:, :, ::2, ::2] * 2],
            _ROIS.to(x.device),
            2,
            [0.5, 0.25],
            2,
            canonical_scale=8,
            canonical_level=1,
        ),
        lambda: [regions.sample("roi_align", "plain").input],
    ),
}
_ROIS = torch.tensor([[0, 1.0, 2, 8, 9], [1, -3, 2, 20, 9], [0, 3, 3, 3, 3], [1, -30, -30, 50, 40]])


@pytest.mark.parametrize("name", TRAINED)
def test_training_among_other_steps(name: str, device: torch.device):
    function, make = TRAINED[name]
    tensors = make()
    compiled = compile_and_run(function, moved(tensors, device), run=gradients)
    assert {path.kind for path in compiled.paths} == {"triton"}
    for actual, expected in zip(results_of(compiled.result), gradients(function, tensors)):
        assert_close(actual, expected, torch.float32)


class Head(torch.nn.Module):
    """What a detector does with its boxes, on whatever device they are."""

    def forward(self, x: Tensor, boxes: Tensor, scores: Tensor) -> Tensor:
        kept = nms(boxes, scores, 0.3)
        return roi_align(x, [boxes[kept]], 3, 0.5).relu()


def test_sizes_may_be_dynamic(device: torch.device):
    """One compilation serves all, of more than one word of boxes; indices have 64 bits, as sizes may be of any
    magnitude."""
    head = Head()

    def check(count: int, function: Callable[..., Tensor]) -> None:
        boxes, scores, _ = Boxes(count).tensors()
        tensors = torch.randn(1, 3, 21 + count, 25, generator=torch.Generator().manual_seed(count)), boxes, scores
        assert_close(function(*moved(tensors, device)).cpu(), head(*tensors), torch.float32)

    boxes, scores, _ = Boxes(40).tensors()
    compiled = compile_and_run(head, *moved((torch.randn(1, 3, 61, 25), boxes, scores), device), dynamic=True)
    assert {path.kind for path in compiled.paths} == {"triton"}
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (40, 50):
            check(count, compiled.function)


def test_exported_programs(device: torch.device):
    """Operators are what an export keeps; they become Triton code when that is compiled."""
    boxes, scores, _ = Boxes(40).tensors()
    arguments = torch.randn(1, 3, 21, 25), boxes, scores
    number = torch.export.Dim("number")
    dynamic = {"x": None, "boxes": {0: number}, "scores": {0: number}}
    exported = torch.export.export(Head(), moved(arguments, device), dynamic_shapes=dynamic)
    fewer = arguments[0], boxes[:35], scores[:35]
    with launched_kernels() as names:
        compiled = compile_and_run(exported.module(), *moved(fewer, device))
    assert {path.kind for path in compiled.paths} == {"triton"}
    assert {"choose", "sample_bins"} <= {re.sub(r"_\d+$", "", name) for name in names}
    assert_same(compiled, Head()(*fewer))


def test_wrong_values_are_errors_before_a_kernel_reads(device: torch.device):
    if device.type == "cuda":
        pytest.skip("an assertion on a CUDA device leaves it unusable for this process")
    x = torch.randn(2, 3, 5, 6)
    for image in (2.0, -1.0, float("nan")):
        with pytest.raises(RuntimeError, match="roi_align: boxes name an image that does not exist"):
            compile_and_run(lambda x, rois: roi_align(x, rois, 2), x, torch.tensor([[image, 0, 0, 3, 3]]))
    maps, rois = _heatmaps()
    rois[1, 2] = float("inf")
    with pytest.raises(RuntimeError, match=r"rois must be finite and of less than 2\^31 pixels"):
        run_compiled("heatmaps_to_keypoints", (maps, rois))


@pytest.mark.parametrize("op", [pytest.param("deform_conv2d_backward", marks=pytest.mark.slow), "roi_align_backward"])
def test_nothing_is_added_in_any_order_where_that_is_not_wanted(op: str, device: torch.device):
    arguments = CALLS[op][0]()
    torch.use_deterministic_algorithms(True)
    try:
        compiled, names = run_compiled(op, moved(arguments, device))
    finally:
        torch.use_deterministic_algorithms(False)
    assert "torch.use_deterministic_algorithms is on" in compiled.paths[0].detail
    assert not any(name.startswith(str(CALLS[op][1])) for name in names)
    assert_same(compiled, OPS[op].decomposition(*arguments))


def test_explain_names_the_path(device: torch.device):
    x, offset, weight, bias, *_ = moved(deform.sample("bias").positional, device)
    explanation = str(explain(lambda *tensors: deform_conv2d(*tensors, padding=1), x, offset, weight, bias))
    assert explanation.startswith("deform_conv2d  triton: an aten program with Triton kernels of its own; ")
