"""What the operators on regions of interest compile to: that templates take them, forward and backward, what those
compute, and what is fused into them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import inductor_vision
import pytest
import torch
from inductor_vision import multiscale_roi_align, ps_roi_align, ps_roi_pool, roi_align, roi_pool
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Compiled, caches_disabled, compile_and_run
from inductor_vision.tests.support.layouts import LAYOUTS, has_both_formats, strides_of
from inductor_vision.tests.support.regions import (
    CASES,
    HOSTILE,
    OPERATORS,
    PYRAMIDS,
    Case,
    Pyramid,
    PyramidSample,
    Sample,
    pyramid,
    pyramid_gradient_oracle,
    pyramid_oracle,
    sample,
)
from torch import Tensor, nn
from torch._inductor import config
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = pytest.mark.usefixtures("optimized")

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

every_op = pytest.mark.parametrize("op", OPERATORS)


def call(s: Sample) -> Tensor:
    return getattr(inductor_vision, s.op)(*s.arguments)


def call_all(calls: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Tensor]:
    return [getattr(inductor_vision, op)(*arguments) for op, arguments in calls]


def first(result: Any) -> Tensor:
    """The result; roi_pool's oracle says where it was found as well."""
    return result if isinstance(result, Tensor) else result[0]


def assert_is_oracle(s: Sample, result: Tensor, gradient: Tensor | None = None, what: str = "result") -> None:
    expected = first(OPERATORS[s.op].oracle(*s.arguments))
    assert result.dtype == s.input.dtype
    if s.op == "roi_pool":  # a maximum has no rounding errors
        assert torch.equal(result, expected.to(result.dtype)), what
    elif s.case.values == "bad":
        assert_close(*infinities_as_nan(result, expected), result.dtype, what)
    else:
        assert_close(result, expected, result.dtype, what)
    if gradient is not None:
        assert gradient.dtype == s.input.dtype
        expected = OPERATORS[s.op].gradient_oracle(s.gradient, *s.arguments)
        assert_close(gradient, expected, gradient.dtype, f"gradient of {what}")


def infinities_as_nan(*tensors: Tensor) -> list[Tensor]:
    """The kernels add up the weights of a pixel: an infinite one stays so where a zero among them makes it NaN."""
    return [torch.where(tensor.isinf(), math.nan, tensor) for tensor in tensors]


def like_result(s: Sample, result: Tensor) -> Tensor:
    """The sample's gradient in the memory format of the result, as a compiled backward wants it."""
    return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype).copy_(s.gradient)


def train(function: Callable[..., list[Tensor]], samples: Sequence[Sample]) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of the maps, where ``function`` takes the maps and the boxes of all samples."""
    inputs = [s.input.detach().requires_grad_() for s in samples]
    results = function(inputs, [s.rois.clone() for s in samples])  # no views: Dynamo cares about what they are of
    gradients = torch.autograd.grad(results, inputs, [like_result(s, result) for s, result in zip(samples, results)])
    return [result.detach() for result in results], list(gradients)


def paths_of_training(ops: Sequence[str]) -> list[tuple[str, str]]:
    return sorted((name, "template") for op in ops for name in (op, f"{op}_backward"))


def taken(compiled: Compiled) -> list[tuple[str, str]]:
    return sorted((path.op, path.kind) for path in compiled.paths)


# Many sizes through one compilation: all operators, each with all ways to place samples.

VARIANTS = {
    "roi_align": ("roi_align", {}),
    "roi_align_aligned": ("roi_align", {"aligned": True}),
    "roi_align_adaptive": ("roi_align", {"sampling_ratio": -1}),
    "roi_align_adaptive_aligned": ("roi_align", {"sampling_ratio": 0, "aligned": True}),
    "roi_pool": ("roi_pool", {}),
    "ps_roi_align": ("ps_roi_align", {}),
    "ps_roi_align_adaptive": ("ps_roi_align", {"sampling_ratio": -1}),
    "ps_roi_pool": ("ps_roi_pool", {}),
}
# Both ways to count samples, and both meanings of `aligned`.
QUICK = (
    "roi_align",
    "roi_align_adaptive_aligned",
    "roi_pool",
    "ps_roi_align",
    "ps_roi_align_adaptive",
    "ps_roi_pool",
)
EACH_OP = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")


def fits(case: Case) -> bool:
    """Whether a case has the properties that are constants in the compiled code."""
    sizes = (case.batch, case.regions, *case.size)
    return (case.channels, case.bins, case.layout, case.rois_layout) == (5, (2, 3), "contiguous", "contiguous") and (
        min(sizes) > 1  # Dynamo makes constants of 0 and 1
    )


FITTING = {name: case for name, case in {**CASES, **HOSTILE}.items() if fits(case)}
FITTING |= {
    "large": Case(batch=5, size=(23, 14), regions=37, boxes="inside"),
    "large_borders": Case(batch=7, size=(19, 3), regions=30, boxes="corners_at_borders"),
    "wide": Case(size=(2, 300), regions=5, boxes="crossing"),
}
FEW = ("plain", "adaptive_larger", "samples_at_borders", "tied", "bad", "hostile", "large")
FEW = tuple(name for name in FEW if name in FITTING)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is constant in one compilation."""

    dtype: torch.dtype
    layout: str = "contiguous"
    variants: tuple[str, ...] = tuple(VARIANTS)

    def sample(self, variant: str, name: str) -> Sample:
        op, options = VARIANTS[variant]
        options = {"sampling_ratio": 2, "aligned": False, **options}
        case = dataclasses.replace(FITTING[name], layout=self.layout, spatial_scale=0.5, **options)
        return sample(op, case, self.dtype)

    def samples(self, name: str) -> list[Sample]:
        return [self.sample(variant, name) for variant in self.variants]

    def __call__(self, inputs: Sequence[Tensor], rois: Sequence[Tensor]) -> list[Tensor]:
        calls = [(VARIANTS[variant], input, boxes) for variant, input, boxes in zip(self.variants, inputs, rois)]
        results = []
        for (op, options), input, boxes in calls:
            chosen = {"sampling_ratio": 2, "aligned": False, **options}
            options = [chosen[option] for option in OPERATORS[op].options]
            results.append(getattr(inductor_vision, op)(input, boxes, (2, 3), 0.5, *options))
        return results


@dataclasses.dataclass(frozen=True)
class Trained:
    """What one compilation gave for many sizes.

    Attributes:
        compiled: of the first case.
        results: by case, results and gradients of each variant.
        repeated: of the largest case, three times; the last after the errors.
        messages: by variant and image that does not exist, what was raised.
    """

    kind: Kind
    compiled: Compiled
    results: dict[str, tuple[list[Tensor], list[Tensor]]]
    repeated: list[tuple[list[Tensor], list[Tensor]]]
    messages: dict[tuple[str, float], str]

    def assert_right(self, name: str, variant: str) -> None:
        s, which = self.kind.sample(variant, name), self.kind.variants.index(variant)
        results, gradients = self.results[name]
        assert_is_oracle(s, results[which], gradients[which])
        x = s.input.detach().requires_grad_()
        eager = call(s.replace(input=x))
        (gradient,) = torch.autograd.grad(eager, x, like_result(s, eager))
        assert results[which].stride() == eager.stride()
        assert gradients[which].stride() == gradient.stride()

    def assert_takes_templates(self) -> None:
        ops = [VARIANTS[variant][0] for variant in self.kind.variants]
        assert taken(self.compiled) == paths_of_training(ops)
        assert self.compiled.templates == self.compiled.kernels == 2 * len(ops)
        results = self.compiled.result[0]
        written = "channels_last" if self.kind.layout == "channels_last" else "contiguous"
        assert {path.detail for path in self.compiled.paths} == {f"fused, {written} result"}
        assert len(results) == len(ops)


NO_IMAGES = (2.0, -1.0, math.nan, math.inf, -math.inf, 1e30)


def compile_kind(kind: Kind, names: Sequence[str], threads: int = 2, **options: Any) -> Trained:
    torch.set_num_threads(threads)
    compiled = compile_and_run(kind, kind.samples("plain"), dynamic=True, config=options, run=train)
    function, messages = compiled.function, {}
    with torch.compiler.set_stance("fail_on_recompile"):
        results = {name: train(function, kind.samples(name)) for name in names}
        repeated = [train(function, kind.samples("large")) for _ in range(2)]
        for which, variant in enumerate(kind.variants):
            for image in NO_IMAGES:
                samples = kind.samples("plain")
                samples[which] = naming(samples[which], image)
                with pytest.raises(RuntimeError) as error:
                    train(function, samples)
                messages[variant, image] = str(error.value)
        repeated.append(train(function, kind.samples("large")))
    return Trained(kind, compiled, results, repeated, messages)


def naming(s: Sample, image: float) -> Sample:
    """The call with a box, not the first, that names that image."""
    rois = s.rois.clone()
    rois[-2, 0] = image
    return s.replace(rois=rois)


def same_bits(a: Any, b: Any) -> bool:
    """NaN is the same as NaN."""
    return all(
        torch.equal(x.nan_to_num(0.125), y.nan_to_num(0.125)) and torch.equal(x.isnan(), y.isnan())
        for xs, ys in zip(a, b)
        for x, y in zip(xs, ys, strict=True)
    )


def assert_error_names(op: str, message: str, image: float) -> None:
    assert message.startswith(f"{op}: boxes["), message
    assert "names image" in message and message.endswith("which does not exist: there are 2"), message


@pytest.fixture(scope="module")
def float32() -> Trained:
    return compile_kind(Kind(FP32, variants=QUICK), list(FITTING), cpp_wrapper=True)


every_variant = pytest.mark.parametrize("variant", QUICK)


def test_every_call_is_a_template_forward_and_backward(float32):
    float32.assert_takes_templates()


@every_variant
@pytest.mark.parametrize("name", FITTING)
def test_values_and_gradients(float32, name, variant):
    float32.assert_right(name, variant)


def test_every_run_gives_the_same_bits(float32):
    """Also after errors."""
    once, *others = float32.repeated
    assert all(gradient.any() for gradient in once[1])
    for other in others:
        assert same_bits(once, other)


@every_variant
@pytest.mark.parametrize("image", NO_IMAGES)
def test_a_box_that_names_no_image_is_an_error(float32, variant, image):
    assert_error_names(VARIANTS[variant][0], float32.messages[variant, image], image)


@pytest.fixture(scope="module")
def channels_last() -> Trained:
    return compile_kind(Kind(FP32, "channels_last", EACH_OP), FEW, cpp_wrapper=True)


def test_channels_last(channels_last):
    channels_last.assert_takes_templates()
    for name in FEW:
        for variant in channels_last.kind.variants:
            channels_last.assert_right(name, variant)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_number_of_threads_gives_the_same_bits(channels_last, threads):
    """The kernels' text is the same, so C++ is compiled once."""
    other = compile_kind(channels_last.kind, [], threads, cpp_wrapper=True)
    assert other.compiled.source == channels_last.compiled.source
    assert same_bits(other.repeated[0], channels_last.repeated[0])


def assert_kind_is_right(kind: Kind, names: Sequence[str], **options: Any) -> None:
    trained = compile_kind(kind, names, **options)
    trained.assert_takes_templates()
    for name in names:
        for variant in kind.variants:
            trained.assert_right(name, variant)
    for (variant, image), message in trained.messages.items():
        assert_error_names(VARIANTS[variant][0], message, image)


def test_bfloat16_with_float32_boxes():
    assert_kind_is_right(Kind(BF16, variants=("roi_align", "roi_pool")), FEW, cpp_wrapper=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (FP32, "contiguous"),
        (FP32, "channels_last"),
        (FP64, "contiguous"),
        (BF16, "contiguous"),
        (BF16, "channels_last"),
        (FP16, "channels_last"),
    ],
    ids=str,
)
def test_all_variants(dtype, layout):
    assert_kind_is_right(Kind(dtype, layout), list(FITTING), cpp_wrapper=True)


# Several maps


PYRAMID_OPTIONS = {"plain": (2, False), "adaptive_aligned": (-1, True)}
PYRAMID_CASES = {
    "plain": Pyramid(image=(100, 210)),
    "many_images": Pyramid(batch=7),
    "large": Pyramid(batch=3, image=(90, 161), regions=53),
    "hostile": Pyramid(boxes="hostile", regions=40),
}


def pyramids(name: str, dtype: torch.dtype = FP32, layout: str = "contiguous") -> list[PyramidSample]:
    return [
        pyramid(dataclasses.replace(PYRAMID_CASES[name], sampling_ratio=ratio, aligned=aligned, layout=layout), dtype)
        for ratio, aligned in PYRAMID_OPTIONS.values()
    ]


def pool_pyramids(features: Sequence[Sequence[Tensor]], rois: Sequence[Tensor]) -> list[Tensor]:
    return [
        multiscale_roi_align(
            maps, boxes, (2, 3), (0.25, 0.125, 0.0625), ratio, canonical_scale=32, canonical_level=3, aligned=aligned
        )
        for maps, boxes, (ratio, aligned) in zip(features, rois, PYRAMID_OPTIONS.values())
    ]


def train_pyramids(
    function: Callable[..., list[Tensor]], samples: Sequence[PyramidSample]
) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    features = [[feature.detach().requires_grad_() for feature in s.features] for s in samples]
    results = function(features, [s.rois.clone() for s in samples])
    gradients = [torch.empty_like(result).copy_(s.gradient) for s, result in zip(samples, results)]
    leaves = [feature for maps in features for feature in maps]
    of_leaves = torch.autograd.grad(results, leaves, gradients)
    return results, [of_leaves[3 * i : 3 * i + 3] for i in range(len(samples))]


def assert_pyramids_are_right(dtype: torch.dtype, layout: str = "contiguous", **options: Any) -> Compiled:
    compiled = compile_and_run(
        pool_pyramids, pyramids("plain", dtype, layout), dynamic=True, config=options, run=train_pyramids
    )
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in PYRAMID_CASES:
            samples = pyramids(name, dtype, layout)
            results, gradients = train_pyramids(compiled.function, samples)
            eager = train_pyramids(pool_pyramids, samples)
            for i, (s, option) in enumerate(zip(samples, PYRAMID_OPTIONS)):
                assert results[i].dtype == dtype
                assert_close(results[i], pyramid_oracle(s), dtype, f"{name}, {option}")
                assert results[i].stride() == eager[0][i].stride()
                for level, expected in enumerate(pyramid_gradient_oracle(s)):
                    assert_close(gradients[i][level], expected, dtype, f"gradient {level} of {name}, {option}")
                    assert gradients[i][level].stride() == eager[1][i][level].stride()
        for i in (0, 1):
            samples = pyramids("plain", dtype, layout)
            samples[i].boxes.append(torch.tensor([[1.0, 2.0, 30.0, 20.0]], dtype=samples[i].boxes[0].dtype))
            samples = [
                s if j == i else dataclasses.replace(s, boxes=[*s.boxes[:-1], torch.cat([s.boxes[-1], s.boxes[0][:1]])])
                for j, s in enumerate(samples)
            ]
            samples = [dataclasses.replace(s, gradient=torch.cat([s.gradient, s.gradient[:1]])) for s in samples]
            with pytest.raises(RuntimeError, match=r"^roi_align: boxes\[20\] names image 2.* there are 2$"):
                train_pyramids(compiled.function, samples)
    return compiled


def test_pyramids():
    compiled = assert_pyramids_are_right(FP32, cpp_wrapper=True)
    assert taken(compiled) == sorted([("roi_align", "template")] * 2 + [("roi_align_backward", "template")] * 6)
    assert compiled.templates == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "layout"), [(FP64, "channels_last"), (BF16, "contiguous"), (FP16, "channels_last")], ids=str
)
def test_pyramids_of_other_dtypes(dtype, layout):
    assert assert_pyramids_are_right(dtype, layout, cpp_wrapper=True).templates == 8


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
def test_all_other_pyramids():
    samples = [pyramid(name) for name in PYRAMIDS if name != "plain"]
    with torch.no_grad():
        compiled = compile_and_run(
            lambda calls: [multiscale_roi_align(*args, **kwargs) for args, kwargs in calls],
            [(s.arguments, s.kwargs) for s in samples],
            config={"cpp_wrapper": True},
        )
    assert compiled.kinds == ["template"] * len(samples)
    for s, result in zip(samples, compiled.result):
        assert_close(result, pyramid_oracle(s), FP32, s.name)
        assert strides_of(result) == strides_of(multiscale_roi_align(*s.arguments, **s.kwargs)), s.name


class Head(nn.Module):
    """A backbone of two levels, and what is pooled from them."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.coarse = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6 * 4, 2)

    def forward(self, image: Tensor, boxes: list[Tensor]) -> Tensor:
        fine = self.fine(image)
        maps = [fine, self.coarse(fine.relu())]
        pooled = multiscale_roi_align(maps, boxes, 2, (0.25, 0.125), 2, canonical_scale=16, canonical_level=3)
        return self.head(pooled.flatten(1))


def boxes_in(size: int, *counts: int) -> list[Tensor]:
    """So many boxes for each image, of all sizes."""
    generator = torch.Generator().manual_seed(sum(counts))
    boxes = [torch.rand(count, 4, generator=generator) * size for count in counts]
    return [torch.cat([box[:, :2].minimum(box[:, 2:]), box[:, :2].maximum(box[:, 2:])], 1) for box in boxes]


def step(function: Callable[..., Tensor], network: nn.Module, image: Tensor, boxes: list[Tensor]) -> list[Tensor]:
    """Gradients of the network, which ``function`` is made of."""
    network.zero_grad()
    function(image, boxes).square().sum().backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


def assert_same_step(gradients: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (gradient, value) in enumerate(zip(gradients, expected, strict=True)):
        assert value.any()
        assert_close(gradient, value, FP32, f"gradient {i}")


def test_gradients_are_fused_with_what_else_reaches_their_map():
    """The gradient of a map that regions and a convolution read; the next convolution wants the sum channels_last."""
    network, call = Head(), (torch.randn(2, 3, 32, 40), boxes_in(40, 7, 9))
    compiled = compile_and_run(network, network, *call, run=step, config={"cpp_wrapper": True})
    assert taken(compiled) == sorted([("roi_align", "template")] + [("roi_align_backward", "template")] * 2)
    assert compiled.templates == 3
    assert_same_step(compiled.result, step(network, network, *call))


@pytest.mark.slow
def test_an_exported_network_trains_on_any_number_of_boxes():
    network, image = Head(), torch.randn(2, 3, 32, 40)
    count = [{0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}]
    exported = torch.export.export(network, (image, boxes_in(40, 7, 9)), dynamic_shapes=(None, count)).module()
    compiled, numbers = torch.compile(exported, fullgraph=True, dynamic=True), ((7, 9), (11, 6))
    with caches_disabled(), recorded_paths() as paths:
        results = [step(compiled, exported, image, boxes_in(40, *counts)) for counts in numbers]
    assert len(paths) == 3  # the other number of boxes has the same
    assert {(path.op, path.kind) for path in paths} == set(paths_of_training(["roi_align"]))
    for counts, gradients in zip(numbers, results):
        assert_same_step(gradients, step(network, network, image, boxes_in(40, *counts)))


# Whatever is constant: sizes that Dynamo makes so, numbers of channels, layouts


def compute(samples: Sequence[Sample]) -> Compiled:
    """All samples in one graph and one source file, which takes little longer to compile than one of them."""
    with torch.no_grad():
        return compile_and_run(call_all, [(s.op, s.arguments) for s in samples], config={"cpp_wrapper": True})


def assert_computed(samples: Sequence[Sample]) -> None:
    compiled = compute(samples)
    assert taken(compiled) == sorted((s.op, "template") for s in samples)
    assert compiled.templates == len(samples)
    for s, result in zip(samples, compiled.result):
        assert_is_oracle(s, result, what=f"{s.op}, {s.name}")
        assert result.stride() == call(s).stride(), s.name


def test_layouts():
    """Also of boxes, and boxes of a low precision."""
    layouts = [f"input_{layout}" for layout in LAYOUTS[2:]]  # the first two have tests of their own
    samples = [sample("roi_align", name) for name in (*layouts, "rois_sliced", "rois_transposed")]
    samples += [sample(op, "input_sliced_channels_last") for op in EACH_OP[1:]]
    samples += [sample("ps_roi_align", "input_transposed"), sample("roi_pool", "input_stepped")]
    low = sample("roi_align", Case(boxes="integers", spatial_scale=1.0), BF16)
    samples.append(low.replace(rois=low.rois.bfloat16()))
    assert_computed(samples)


def test_the_place_of_the_maximum():
    names = ("tied", "bad", "outside", "large")
    samples = [sample("roi_pool", FITTING[name]) for name in names]

    def places(inputs: Sequence[Tensor], rois: Sequence[Tensor]) -> list[Any]:
        options = (0.5, 2, 3)
        return [torch.ops.inductor_vision.roi_pool(x, boxes, *options) for x, boxes in zip(inputs, rois)]

    with torch.no_grad():
        compiled = compile_and_run(
            places, [samples[0].input], [samples[0].rois.clone()], dynamic=True, config={"cpp_wrapper": True}
        )
        assert compiled.kinds == ["template"]
        for s in samples:
            ((out, argmax),) = compiled.function([s.input], [s.rois.clone()])
            expected, where = OPERATORS["roi_pool"].oracle(*s.arguments)
            assert argmax.dtype == torch.int32
            assert torch.equal(argmax, where), s.name
            assert torch.equal(out, expected.float()), s.name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_the_place_of_the_maximum_alone(layout, cpp_wrapper):
    s = sample("roi_pool", dataclasses.replace(FITTING["tied"], layout=layout))
    _, where = OPERATORS["roi_pool"].oracle(*s.arguments)
    with torch.no_grad():
        compiled = compile_and_run(
            lambda x, rois: torch.ops.inductor_vision.roi_pool(x, rois, 0.5, 2, 3)[1],
            s.input,
            s.rois,
            config={"cpp_wrapper": cpp_wrapper},
        )
    assert compiled.kinds == ["template"]
    assert compiled.source.count("prepare_output(&") == 1  # there is no memory for the maxima
    assert torch.equal(compiled.result, where)


class Calls(nn.Module):
    """Samples as a function that takes maps and boxes."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        super().__init__()
        self.calls = [(s.op, s.arguments[2:]) for s in samples]

    def forward(self, inputs: Sequence[Tensor], rois: Sequence[Tensor]) -> list[Tensor]:
        return call_all([(op, (x, boxes, *options)) for (op, options), x, boxes in zip(self.calls, inputs, rois)])


def assert_trained(samples: Sequence[Sample]) -> None:
    compiled = compile_and_run(Calls(samples), samples, config={"cpp_wrapper": True}, run=train)
    assert taken(compiled) == paths_of_training([s.op for s in samples])
    assert compiled.templates >= 2 * sum(s.input.numel() * s.gradient.numel() > 0 for s in samples)
    eager = train(Calls(samples), samples)
    for i, s in enumerate(samples):
        result, gradient = compiled.result[0][i], compiled.result[1][i]
        assert_is_oracle(s, result, gradient, f"{s.op}, {s.name}")
        assert strides_of(result) == strides_of(eager[0][i]), s.name
        if not has_both_formats(result):  # its gradient does not say which to follow
            assert strides_of(gradient) == strides_of(eager[1][i]), s.name


EDGES = {
    "roi_align": ("no_regions", "no_images", "no_channels", "channels_17"),
    "roi_pool": ("no_channels",),
    "ps_roi_align": ("no_channels", "one_pixel"),
    "ps_roi_pool": ("no_regions", "one_row"),
}


def test_edges():
    assert_trained([sample(op, name) for op, names in EDGES.items() for name in names])


OTHERS = [name for name in (*CASES, *HOSTILE) if name not in FITTING]


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
@every_op
def test_all_other_cases(op):
    assert_trained([sample(op, name) for name in OTHERS])


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
@every_op
def test_layouts_and_channels_in_bfloat16(op):
    names = [name for name in OTHERS if "channels" in name or name.startswith(("input", "rois"))]
    assert_trained([sample(op, name, BF16) for name in names])


# Errors of static compilations, of the gradients' operators, and in Inductor's default mode


STATIC = [("roi_pool", False), *((op, True) for op in EACH_OP)]


def call_static(arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    ops = torch.ops.inductor_vision
    return [
        getattr(ops, f"{op}_backward" if backward else op)(*call) for (op, backward), call in zip(STATIC, arguments)
    ]


def static_arguments(bad: int | None = None) -> list[tuple[Any, ...]]:
    """Calls of all operators; the one at ``bad`` has a box that names no image."""
    arguments = []
    for i, (op, backward) in enumerate(STATIC):
        s = sample(op, "plain")
        call = s.positional_backward if backward else s.positional
        rois = (naming(s, math.nan) if i == bad else s).rois.clone()
        arguments.append((call[0], rois, *call[2:]))
    return arguments


def test_static_compilation_and_its_errors():
    compiled = compile_and_run(call_static, static_arguments(), dynamic=False)
    assert taken(compiled) == sorted((f"{op}{'_backward' * backward}", "template") for op, backward in STATIC)
    right = call_static(static_arguments())
    with torch.compiler.set_stance("fail_on_recompile"):
        for bad, (op, _) in enumerate(STATIC):
            with pytest.raises(
                RuntimeError, match=rf"^{op}: boxes\[6\] names image nan, which does not exist: there are 2$"
            ):
                compiled.function(static_arguments(bad))
        for result, expected in zip(compiled.function(static_arguments()), right):
            assert_close(first(result), first(expected), FP32)


# What is fused into the store, and what is written for what follows


def fusing(arguments: Sequence[Any]) -> list[tuple[str, Callable[[], Tensor]]]:
    """A call of each operator."""
    calls = [(op, lambda op=op, call=call: getattr(inductor_vision, op)(*call)) for op, call in zip(EACH_OP, arguments)]
    maps, boxes = arguments[-1]

    def pool_pyramid() -> Tensor:
        return multiscale_roi_align(
            maps, boxes, (2, 3), (0.25, 0.125, 0.0625), 2, canonical_scale=32, canonical_level=3
        )

    return [*calls, ("roi_align", pool_pyramid)]


def arguments_of_each(name: str, dtype: torch.dtype = FP32) -> list[Any]:
    p = pyramid("plain", dtype)
    return [*(sample(op, name, dtype).arguments for op in EACH_OP), (p.features, p.rois)]


def test_what_follows_is_fused():
    def follow(arguments: Sequence[Any]) -> list[Any]:
        results = []
        for i, (_, call) in enumerate(fusing(arguments)):
            y = call()
            results.append((y, y.relu() * 3) if i % 2 else (y.relu() * 3 + 1,))  # where it is used itself, and not
        return results

    arguments = arguments_of_each("plain")
    with torch.no_grad():
        compiled = compile_and_run(follow, arguments, config={"cpp_wrapper": True})
    assert taken(compiled) == sorted([*((op, "template") for op in EACH_OP), ("roi_align", "template")])
    assert compiled.templates == compiled.fused == 5
    assert compiled.kernels == 6  # one finds the levels
    for results, expected in zip(compiled.result, follow(arguments)):
        for result, value in zip(results, expected):
            assert_close(result, value, FP32)
            assert result.stride() == value.stride()


def test_nothing_is_fused_into_a_kernel_of_several_results():
    s = sample("roi_pool", "plain")

    def pool(x: Tensor) -> Tensor:
        return (roi_pool(x, *s.arguments[1:]) * 2).double()

    gradients = []
    for function in (pool, torch.compile(pool, fullgraph=True)):
        x = s.input.clone().requires_grad_()
        result = function(x)
        gradients.append(torch.autograd.grad(result, x, s.gradient.double())[0])
        assert_close(result, 2 * OPERATORS["roi_pool"].oracle(*s.arguments)[0], FP32)
    assert torch.equal(*gradients)


def test_conversions_are_fused_and_see_what_is_not_rounded():
    def convert(arguments: Sequence[Any]) -> list[Tensor]:
        return [call().float() for _, call in fusing(arguments)[-2:]]

    arguments = arguments_of_each("plain", BF16)
    with torch.no_grad():
        compiled = compile_and_run(convert, arguments, config={"cpp_wrapper": True})
    assert compiled.templates == compiled.fused == 2
    assert compiled.kernels == 3
    pooled, pyramids_pooled = compiled.result
    assert_close(pooled, OPERATORS["ps_roi_pool"].oracle(*arguments[-2]), FP32)
    assert_close(pyramids_pooled, pyramid_oracle(pyramid("plain", BF16)), FP32)


class BetweenConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)

    def pool(self, image: Tensor, boxes: Tensor) -> Tensor:
        return roi_align(self.before(image), boxes, 3, 1.0, 2)

    def forward(self, image: Tensor, boxes: Tensor) -> Tensor:
        return self.behind(self.pool(image, boxes).relu())


def image_and_boxes() -> tuple[Tensor, Tensor]:
    boxes = boxes_in(12, 6)[0]
    return torch.randn(2, 3, 12, 12), torch.cat([torch.arange(6)[:, None] % 2, boxes], 1)


def test_a_convolution_behind_gets_what_it_wants_without_a_copy():
    network, call = BetweenConvolutions().eval(), image_and_boxes()
    with torch.no_grad():
        compiled = compile_and_run(network, *call, config={"freezing": True})
        assert_close(compiled.result, network(*call), FP32)
    assert [str(path) for path in compiled.paths] == ["roi_align: template (fused, channels_last result)"]
    assert (compiled.templates, compiled.fused) == (1, 1)
    (written,) = re.findall(r"^ *cpp_fused_\w*roi_align\w*\(.*, (\w+)\)$", compiled.source, flags=re.MULTILINE)
    assert f"torch.ops.mkldnn._convolution_pointwise.default({written}, " in compiled.source


class BeforeLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 9, 8)

    def forward(self, image: Tensor, boxes: Tensor) -> Tensor:
        return self.behind(roi_align(self.before(image), boxes, 3, 1.0, 2).flatten(1))


FLATTENED = "roi_align: template (fused, contiguous result)"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_linear_layer_behind_gets_what_it_wants_without_a_copy(dynamic, autocast):
    network, (image, boxes) = BeforeLinear().eval(), image_and_boxes()
    call = image.contiguous(memory_format=torch.channels_last), boxes
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=autocast):
        compiled = compile_and_run(network, *call, dynamic=dynamic, config={"freezing": True})
        assert_close(compiled.result, network(*call), BF16 if autocast else FP32)
    assert [str(path) for path in compiled.paths] == [FLATTENED]
    (written,) = re.findall(r"^ *cpp_fused_\w*roi_align\w*\(.*(buf\d+)\b.*\)$", compiled.source, flags=re.MULTILINE)
    # oneDNN's, or aten's where the processor has no instructions for the dtype.
    reads = rf"(linear\w*\.default\(|addmm\(\w+, )reinterpret_tensor\({written}, "
    assert re.search(reads, compiled.source)


def test_a_linear_layer_is_trained_without_a_copy():
    network, (image, boxes) = BeforeLinear().to(memory_format=torch.channels_last), image_and_boxes()
    call = image.contiguous(memory_format=torch.channels_last), boxes
    compiled = compile_and_run(network, network, *call, run=step, config={"cpp_wrapper": True})
    assert FLATTENED in map(str, compiled.paths)
    assert compiled.fused == 1  # the clone that eager mode makes
    assert_same_step(compiled.result, step(network, network, *call))


def test_autocast_leaves_boxes_in_float32():
    network, (image, boxes) = BetweenConvolutions(), image_and_boxes()
    image = torch.cat([image] * 151)  # bfloat16 cannot count to 301
    boxes[:, 0] += 299
    with torch.no_grad(), torch.autocast("cpu", BF16):
        compiled = compile_and_run(network.pool, image, boxes)
        maps = network.before(image)
    assert maps.dtype == compiled.result.dtype == BF16
    assert compiled.kinds == ["template"]
    assert compiled.templates == 1
    assert_close(compiled.result, OPERATORS["roi_align"].oracle(maps, boxes, (3, 3), 1.0, 2, False), BF16)


# Where no template takes a call


def traced(op: str, backward: bool, **changes: Any) -> tuple[list[str], list[Any], Any, Any]:
    """How a call goes into a graph for a backend without kernels: paths, targets, what graph and call give."""
    from torch._inductor.decomposition import select_decomp_table

    s = sample(op, Case(**changes))
    call = getattr(torch.ops.inductor_vision, f"{op}_backward" if backward else op)
    arguments = s.positional_backward if backward else s.positional

    def function(x: Tensor, rois: Tensor) -> Any:
        return call([x] if isinstance(arguments[0], list) else x, rois, *arguments[2:])

    inputs = (s.gradient if backward else s.input), s.rois
    with config.patch(cpu_backend="halide"), recorded_paths() as paths:
        graph = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
    targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [str(path) for path in paths], targets, graph(*inputs), function(*inputs)


NOT_CPP = "torch._inductor.config.cpu_backend is 'halide', not 'cpp'"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("op", ["roi_align", "ps_roi_align"])
def test_other_backends_get_the_decomposition_of_a_fixed_grid(op, backward):
    paths, targets, result, expected = traced(op, backward)
    assert paths == [f"{op}{'_backward' * backward}: decomposition ({NOT_CPP})"]
    assert targets and not [target for target in targets if target.namespace not in ("aten", "prims")]
    assert_close(result, expected, FP32)


LOOPS = {
    "roi_align": "how many samples an adaptive grid has",
    "ps_roi_align": "how many samples an adaptive grid has",
    "roi_pool": "how many pixels a bin has",
    "ps_roi_pool": "how many pixels a bin has",
}


@pytest.mark.parametrize(
    ("op", "backward"),
    [(op, backward) for op in LOOPS for backward in (False, True) if (op, backward) != ("roi_pool", 1)],
)
def test_other_backends_get_what_loops_over_data_as_it_is(op, backward):
    name = f"{op}_backward" if backward else op
    paths, targets, result, expected = traced(op, backward, sampling_ratio=-1)
    reason = (
        f"{NOT_CPP}; {LOOPS[op]} depends on the values of the boxes: the compiled graph runs the aten decomposition"
    )
    assert set(paths) == {f"{name}: eager ({reason})"}
    assert getattr(torch.ops.inductor_vision, name).default in targets
    assert_close(first(result), first(expected), FP32)


def test_the_number_of_bins_may_vary(unoptimized):
    def pool(maps, rois, n):
        fine, coarse = maps
        return [
            roi_align(fine, rois, n, 0.5, 2),
            roi_pool(fine, rois, (n, 3)),
            ps_roi_align(fine, rois, (n, 2), 0.5, 2),
            ps_roi_pool(fine, rois, (2, n)),
            multiscale_roi_align([fine, coarse], rois, n, [0.5, 0.25], 2),
        ]

    def train(pool, n):
        torch.manual_seed(n)
        maps = [torch.randn(2, 24, size, size, requires_grad=True) for size in (12, 6)]
        rois = torch.tensor([[0.0, 1, 1, 9, 9], [1, 2, 2, 8, 11], [0, 3, 0, 20, 24]])
        results = pool(maps, rois, n)
        gradients = torch.autograd.grad(sum(result.square().sum() for result in results), maps)
        return [*results, *gradients]

    compiled = compile_and_run(pool, 2, dynamic=True, run=train, config={"cpp_wrapper": True})
    assert [(path.op, path.kind) for path in compiled.paths if not path.op.endswith("backward")] == [
        (op, "template") for op in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "roi_align")
    ]
    for n in (3, 4):
        with torch.compiler.set_stance("fail_on_recompile"):
            result = train(compiled.function, n)
        for one, expected in zip(result, train(pool, n), strict=True):
            assert_close(one, expected, FP32)
