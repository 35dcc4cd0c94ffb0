"""The operators under torch.func: gradients and batches are those of single calls; what is not supported says so."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

import pytest
import torch
from inductor_vision import (
    box_iou_rotated,
    deform_conv2d,
    depthwise_separable_conv2d,
    multiscale_deformable_attention,
    multiscale_roi_align,
    patch_conv2d,
    ps_roi_align,
    ps_roi_pool,
    roi_align,
    roi_pool,
    soft_nms,
    winograd_conv2d,
)
from inductor_vision.ops.heatmaps_to_keypoints import heatmaps_to_keypoints
from inductor_vision.ops.paste_masks import paste_masks
from inductor_vision.ops.registry import OPS
from inductor_vision.ops.upsample2d import upsample_bilinear2d
from torch import Tensor
from torch.autograd import forward_ad

CALLS = 3  # of a batch


@dataclasses.dataclass(frozen=True)
class Call:
    """A function of tensors, by name; of some there are gradients.

    Attributes:
        make: the tensors of a call.
    """

    function: Callable[..., Tensor]
    make: Callable[[], dict[str, Tensor]]
    differentiable: tuple[str, ...]

    def batch(self, *names: str) -> tuple[dict[str, Tensor], dict[str, int | None]]:
        """Tensors of which the named ones differ from call to call, along their last dimension; and which that is."""
        calls = [self.make() for _ in range(CALLS)]
        dims = {name: calls[0][name].dim() if name in names else None for name in calls[0]}
        stacked = {
            name: calls[0][name] if dim is None else torch.stack([call[name] for call in calls], dim)
            for name, dim in dims.items()
        }
        return stacked, dims

    def of_tuple(self, *tensors: Tensor, names: tuple[str, ...]) -> Tensor:
        return self.function(**dict(zip(names, tensors)))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def some_rois(scale: float = 1) -> Tensor:
    corners, sizes = torch.rand(2, 4, 2, dtype=torch.float64) * 5
    image = torch.randint(2, (4, 1)).double()
    return torch.cat([image, corners * scale, (corners + 1 + sizes) * scale], dim=1)


def on_maps(function: Callable[..., Tensor], *arguments: int, channels: int = 3) -> Call:
    return Call(
        lambda input, rois: function(input, rois, *arguments),
        lambda: {"input": randn(2, channels, 8, 9), "rois": some_rois()},
        ("input",),
    )


ACTIVATED = {"depthwise_activation": "silu"}

DIFFERENTIABLE = {
    "deform_conv2d": Call(
        functools.partial(deform_conv2d, padding=1),
        lambda: {
            "input": randn(2, 4, 5, 6), "offset": randn(2, 18, 5, 6), "weight": randn(6, 2, 3, 3), "bias": randn(6),
            "mask": randn(2, 9, 5, 6),
        },
        ("input", "offset", "weight", "bias", "mask"),
    ),
    "patch_conv2d": Call(
        lambda input, weight, bias: patch_conv2d(input, weight, bias, padding=1, groups=2),
        lambda: {"input": randn(2, 3, 4, 5, 4), "weight": randn(6, 2, 3, 3), "bias": randn(6)},
        ("input", "weight", "bias"),
    ),
    "winograd_conv2d": Call(
        functools.partial(winograd_conv2d, groups=2),
        lambda: {"input": randn(2, 4, 5, 6), "weight": randn(6, 2, 3, 3), "bias": randn(6)},
        ("input", "weight", "bias"),
    ),
    "depthwise_separable_conv2d": Call(
        functools.partial(depthwise_separable_conv2d, padding=1, **ACTIVATED),
        lambda: {
            "input": randn(2, 3, 5, 6), "depthwise_weight": randn(6, 1, 3, 3), "pointwise_weight": randn(4, 6, 1, 1),
            "depthwise_bias": randn(6), "pointwise_bias": randn(4),
        },
        ("input", "depthwise_weight", "pointwise_weight", "depthwise_bias", "pointwise_bias"),
    ),
    "depthwise_separable_conv2d_op": Call(
        lambda input, depthwise_weight, pointwise_weight: torch.ops.inductor_vision.depthwise_separable_conv2d(
            input, depthwise_weight, pointwise_weight, None, None, None, [1, 1], [1, 1], [1, 1], "silu"
        ),
        lambda: {
            "input": randn(2, 3, 5, 6), "depthwise_weight": randn(6, 1, 3, 3), "pointwise_weight": randn(4, 6, 1, 1)
        },
        ("input", "depthwise_weight", "pointwise_weight"),
    ),
    "paste_masks": Call(
        lambda masks, boxes: paste_masks(masks, boxes, (6, 7)),
        lambda: {"masks": randn(4, 1, 3, 5), "boxes": some_rois()[:, 1:].long()},
        ("masks",),
    ),
    "upsample_bilinear2d": Call(
        lambda input: upsample_bilinear2d(input, (7, 4), padding=(1, 2)),
        lambda: {"input": randn(2, 3, 5, 6)},
        ("input",),
    ),
    "upsample_bicubic2d": Call(
        lambda input: torch.ops.inductor_vision.upsample_bicubic2d(input, (7, 4), False, None, None, (1, 2)),
        lambda: {"input": randn(2, 3, 5, 6)},
        ("input",),
    ),
    "grid_sampler_2d": Call(
        lambda input, grid: torch.ops.inductor_vision.grid_sampler_2d(input, grid, 0, 0, False),
        lambda: {"input": randn(2, 3, 5, 6), "grid": torch.rand(2, 3, 4, 2, dtype=torch.float64) * 2 - 1},
        ("input", "grid"),
    ),
    "multiscale_deformable_attention": Call(
        lambda value, locations, weights: multiscale_deformable_attention(value, [(4, 3), (1, 2)], locations, weights),
        lambda: {
            "value": randn(2, 14, 2, 3), "locations": randn(2, 5, 2, 4, 2).sigmoid(), "weights": randn(2, 5, 2, 4)
        },
        ("value", "locations", "weights"),
    ),
    "roi_align": on_maps(roi_align, (2, 3), 1.0, 2),
    "roi_align_adaptive": on_maps(roi_align, (2, 3)),
    "roi_pool": on_maps(roi_pool, (2, 3)),
    "ps_roi_align": on_maps(ps_roi_align, (2, 3), 1.0, 2, channels=12),
    "ps_roi_pool": on_maps(ps_roi_pool, (2, 3), channels=12),
    "multiscale_roi_align": Call(
        lambda fine, coarse, rois: multiscale_roi_align(
            [fine, coarse], rois, 2, [0.5, 0.25], 2, canonical_level=1, canonical_scale=4
        ),
        lambda: {"fine": randn(2, 3, 8, 9), "coarse": randn(2, 3, 4, 5), "rois": some_rois(2)},
        ("fine", "coarse"),
    ),
}  # fmt: skip


def rotated(count: int) -> Tensor:
    return torch.rand(count, 5, dtype=torch.float64) * torch.tensor([4, 4, 4, 4, 90])


OTHERS = {
    "box_iou_rotated": Call(
        lambda boxes1, boxes2: box_iou_rotated(boxes1, boxes2), lambda: {"boxes1": rotated(4), "boxes2": rotated(5)}, ()
    ),
    "heatmaps_to_keypoints": Call(
        lambda maps, rois: heatmaps_to_keypoints(maps, rois)[1],
        lambda: {"maps": randn(4, 2, 3, 4), "rois": some_rois()[:, 1:]},
        (),
    ),
}

every_gradient = pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, call in DIFFERENTIABLE.items() for name in call.differentiable]
)
every_call = pytest.mark.parametrize("op", DIFFERENTIABLE)


def loss(call: Call, rest: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """Weights for one of a call's results: no two of its elements weigh the same."""

    def of(tensor: Tensor) -> Tensor:
        result = call.function(**{**rest, name: tensor})
        return (result * torch.arange(1, result.numel() + 1).reshape(result.shape)).sum()

    return of


@every_gradient
def test_grad_is_the_gradient_of_autograd(op, name):
    call = DIFFERENTIABLE[op]
    tensors = call.make()
    of = loss(call, tensors, name)
    tensor = tensors[name].clone().requires_grad_()
    (expected,) = torch.autograd.grad(of(tensor), tensor)
    assert expected.count_nonzero()
    torch.testing.assert_close(torch.func.grad(of)(tensors[name]), expected)


@every_call
def test_grad_of_all_tensors_at_once(op):
    call = DIFFERENTIABLE[op]
    tensors = call.make()
    wanted = {name: tensors[name].clone().requires_grad_() for name in call.differentiable}
    expected = torch.autograd.grad(call.function(**{**tensors, **wanted}).sum(), list(wanted.values()))
    grads = torch.func.grad(lambda wanted: call.function(**{**tensors, **wanted}).sum())(
        {name: tensors[name] for name in wanted}
    )
    for name, gradient in zip(wanted, expected):
        torch.testing.assert_close(grads[name], gradient)


@every_gradient
def test_jacrev_is_the_jacobian(op, name):
    call = DIFFERENTIABLE[op]
    tensors = call.make()

    def some(tensor: Tensor) -> Tensor:
        return call.function(**{**tensors, name: tensor}).flatten()[::7]

    expected = torch.autograd.functional.jacobian(some, tensors[name])
    torch.testing.assert_close(torch.func.jacrev(some)(tensors[name]), expected)


def every_batch(calls: dict[str, Call]) -> pytest.MarkDecorator:
    """Where one tensor differs from call to call, and where all do."""
    names = {op: tuple(call.make()) for op, call in calls.items()}
    batches = [(op, batched) for op, all in names.items() for batched in (*((name,) for name in all), all)]
    return pytest.mark.parametrize(("op", "batched"), batches, ids=[f"{op}-{'-'.join(b)}" for op, b in batches])


def single_calls(tensors: dict[str, Tensor], dims: dict[str, int | None]) -> list[dict[str, Tensor]]:
    return [
        {name: tensor if dims[name] is None else tensor.select(dims[name], i) for name, tensor in tensors.items()}
        for i in range(CALLS)
    ]


@every_batch(DIFFERENTIABLE | OTHERS)
def test_vmap_is_a_loop_of_calls(op, batched):
    call = (DIFFERENTIABLE | OTHERS)[op]
    tensors, dims = call.batch(*batched)
    expected = torch.stack([call.function(**single) for single in single_calls(tensors, dims)])
    function = functools.partial(call.of_tuple, names=tuple(tensors))
    torch.testing.assert_close(torch.vmap(function, tuple(dims.values()))(*tensors.values()), expected)


@every_batch(DIFFERENTIABLE)
def test_vmap_of_grad_is_a_loop_of_gradients(op, batched):
    call = DIFFERENTIABLE[op]
    tensors, dims = call.batch(*batched)
    grad = torch.func.grad(
        lambda wanted, rest: call.function(**{**rest, **wanted}).square().sum(),
    )

    def gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted = {name: tensors[name] for name in call.differentiable}
        return grad(wanted, tensors)

    singles = [gradients(single) for single in single_calls(tensors, dims)]
    result = torch.vmap(gradients, (dims,))(tensors)
    for name in call.differentiable:
        torch.testing.assert_close(result[name], torch.stack([single[name] for single in singles]))


def test_transforms_nest():
    call = DIFFERENTIABLE["deform_conv2d"]
    tensors, dims = call.batch("input", "offset")

    def of_calls(weight: Tensor) -> Tensor:
        return torch.vmap(lambda t: call.function(**{**t, "weight": weight}), (dims,))(tensors).square().sum()

    def one_by_one(weight: Tensor) -> Tensor:
        return sum(call.function(**{**t, "weight": weight}).square().sum() for t in single_calls(tensors, dims))

    expected = torch.func.grad(one_by_one)(tensors["weight"])
    torch.testing.assert_close(torch.func.grad(of_calls)(tensors["weight"]), expected)
    weight = tensors["weight"].clone().requires_grad_()
    torch.func.grad(lambda scale: of_calls(weight * scale))(torch.tensor(2.0, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(of_calls(weight), weight)
    torch.testing.assert_close(gradient, expected)
    twice = torch.vmap(torch.vmap(lambda x: roi_align(x, some, 2)))
    some, maps = some_rois(), randn(2, 3, 2, 4, 8, 9)
    expected = torch.stack([torch.stack([roi_align(map, some, 2) for map in row]) for row in maps])
    torch.testing.assert_close(twice(maps), expected)


def test_a_call_does_not_read_the_images_of_the_next():
    maps, rois = randn(CALLS, 2, 3, 8, 9), torch.stack([some_rois() for _ in range(CALLS)])
    for image in (2, -1, float("nan")):
        rois[0, 1, 0] = image
        with pytest.raises(RuntimeError, match="roi_align: boxes name an image that does not exist"):
            torch.vmap(lambda x, boxes: roi_align(x, boxes, 2))(maps, rois)


def test_images_of_many_calls_are_counted_in_the_low_precisions():
    maps, rois = randn(200, 2, 3, 8, 9).bfloat16(), some_rois().bfloat16()
    result = torch.vmap(lambda x: roi_align(x, rois, 2))(maps)
    torch.testing.assert_close(result[-1], roi_align(maps[-1], rois, 2))


def test_no_calls():
    rois = some_rois()
    with pytest.raises(RuntimeError, match=r"roi_align: torch\.vmap over a dimension of size 0 is not supported"):
        torch.vmap(lambda x: roi_align(x, rois, 2))(randn(0, 2, 3, 8, 9))


NOT_FORWARD = "forward-mode differentiation (torch.func.jvp, jacfwd, hessian, dual tensors) is not supported"


@every_gradient
def test_forward_mode_says_that_it_is_not_supported(op, name):
    call = DIFFERENTIABLE[op]
    tensors = call.make()

    def function(tensor: Tensor) -> Tensor:
        return call.function(**{**tensors, name: tensor})

    x = tensors[name]
    refused = pytest.raises(RuntimeError, match=re.escape(NOT_FORWARD))
    with refused:
        torch.func.jvp(function, (x,), (x,))
    with refused, forward_ad.dual_level():
        function(forward_ad.make_dual(x, x))


# The function depthwise_separable_conv2d is two convolutions where float64 has gradients, and these have more.
every_operator = pytest.mark.parametrize("op", [op for op in DIFFERENTIABLE if op != "depthwise_separable_conv2d"])


@every_operator
def test_forward_mode_of_a_gradient_says_that_it_is_not_supported(op):
    call = DIFFERENTIABLE[op]
    tensors = call.make()
    name = call.differentiable[0]
    x = tensors[name].clone().requires_grad_()
    result = call.function(**{**tensors, name: x})
    with pytest.raises(RuntimeError, match=re.escape(NOT_FORWARD)):
        torch.func.hessian(lambda x: call.function(**{**tensors, name: x}).square().sum())(tensors[name])
    with pytest.raises(RuntimeError, match=re.escape(NOT_FORWARD)):
        torch.func.jvp(lambda grad: torch.autograd.grad(result, x, grad)[0], (result.detach(),), (result.detach(),))


@every_operator
def test_double_backward_says_that_it_is_not_supported(op):
    call = DIFFERENTIABLE[op]
    tensors = call.make()
    name = call.differentiable[-1]
    grad = torch.func.grad(lambda x: call.function(**{**tensors, name: x}).square().sum())
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.func.grad(lambda x: grad(x).sum())(tensors[name])


def test_every_operator_is_batched():
    for op in OPS.values():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.overload.name(), "FuncTorchBatched"), op.name


# Compiled


def test_compiled_transforms():
    """All in one graph."""
    calls = {op: DIFFERENTIABLE[op] for op in ("deform_conv2d", "roi_align", "roi_pool")}
    batches = {op: call.batch(*call.differentiable[:1]) for op, call in calls.items()}

    def transformed() -> list[Tensor]:
        results = []
        for op, call in calls.items():
            tensors, dims = batches[op]
            name = call.differentiable[0]

            def of(tensors: dict[str, Tensor], call: Call = call) -> Tensor:
                return call.function(**tensors).square().sum()

            results.append(torch.vmap(of, (dims,))(tensors))
            results.append(torch.vmap(torch.func.grad(of), (dims,))(tensors)[name])
        return results

    expected = transformed()
    for result, want in zip(torch.compile(transformed, backend="aot_eager", fullgraph=True)(), expected, strict=True):
        torch.testing.assert_close(result, want)


@pytest.mark.parametrize("op", ["deform_conv2d", "roi_align"])
def test_compiled_forward_mode_says_that_it_is_not_supported(op):
    call = DIFFERENTIABLE[op]
    tensors = call.make()

    def function(x: Tensor) -> Tensor:
        return call.function(**{**tensors, "input": x})

    def jvp(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(function, (x,), (x,))

    x = tensors["input"]
    with pytest.raises(RuntimeError, match=re.escape(NOT_FORWARD)):
        torch.compile(jvp, backend="aot_eager", fullgraph=True)(x)
    with pytest.raises(RuntimeError, match=re.escape(NOT_FORWARD)), forward_ad.dual_level():
        torch.compile(function, backend="aot_eager")(forward_ad.make_dual(x, x))


def _overlaps(boxes: Tensor) -> Tensor:
    return box_iou_rotated(boxes, boxes)


def _lowered_scores(scores: Tensor) -> Tensor:
    return soft_nms(torch.arange(12.0).view(3, 4), scores, max_detections=3)[1]


def _best_of_heatmaps(maps: Tensor) -> Tensor:
    return heatmaps_to_keypoints(maps, torch.tensor([[1.0, 2, 9, 8]]))[1]


WITHOUT_GRADIENT = {
    "box_iou_rotated": (_overlaps, (3, 5)),
    "soft_nms": (_lowered_scores, (3,)),
    "heatmaps_to_keypoints": (_best_of_heatmaps, (1, 2, 5, 6)),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("op", WITHOUT_GRADIENT)
def test_what_has_no_gradient_is_a_constant_to_autograd_and_an_error_to_transforms(op, compiled):
    function, size = WITHOUT_GRADIENT[op]
    if compiled:
        function = torch.compile(function, backend="aot_eager")
    x = torch.rand(size) + 1
    assert not function(x.clone().requires_grad_()).requires_grad
    assert torch.equal(torch.func.vmap(function)(x[None])[0], function(x))
    for differentiated in (
        lambda: torch.func.jvp(function, (x,), (x,)),
        lambda: torch.func.grad(lambda x: function(x).sum())(x),
        lambda: torch.func.jacrev(function)(x),
    ):
        with pytest.raises(RuntimeError, match=rf"{op}: there is no gradient; call detach\(\) on what it is given"):
            differentiated()
    torch.func.grad(lambda x: function(x.detach()).sum() + x.sum())(x)
