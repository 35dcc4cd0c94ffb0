"""Multi-scale deformable attention in the shapes of models: encoders, whose queries are all pixels, and decoders.

The peer is what models of transformers run on CPUs, a grid_sample for each level, as it is and compiled; ONNX Runtime
and OpenVINO run the same in their own operators. The limit reads as many bytes from cache as four corners of each point
are, one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops.multiscale_deformable_attention import multiscale_deformable_attention
from .. import backends
from ..spec import Case, Contender, Job, Prepared, Suite

_SPREAD = 2.0  # pixels, standard deviation of the offsets of an encoder's points
_BOX = 0.1  # of the map, those of a decoder's
_IN_CACHE = 64 << 10  # bytes that the limit reads again and again


@dataclasses.dataclass(frozen=True)
class Attention:
    """A call of the operator.

    Attributes:
        queries: how many; None: one for each pixel of each level, as in an encoder.
        backward: its gradients are what is measured.
    """

    sizes: tuple[tuple[int, int], ...]
    points: tuple[int, ...]
    queries: int | None = None
    heads: int = 8
    channels: int = 32
    batch: int = 1
    dtype: torch.dtype = torch.float32
    backward: bool = False

    def __str__(self) -> str:
        queries = f"{self.queries} queries" if self.queries else f"{self.pixels} queries (all pixels)"
        levels = " ".join(f"{height}x{width}" for height, width in self.sizes)
        points = "x".join(map(str, (len(self.points), self.points[0])))
        if len(set(self.points)) > 1:
            points = " ".join(map(str, self.points))
        parts = [f"{queries}, {self.heads} heads of {self.channels}, levels {levels}, points {points}"]
        parts += [f"batch {self.batch}"] if self.batch > 1 else []
        parts += [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []
        return ", ".join([*parts, *(["backward"] if self.backward else [])])

    @property
    def pixels(self) -> int:
        return sum(height * width for height, width in self.sizes)

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Value, locations and weights; the latter two are float32, as under autocast."""
        generator = torch.Generator().manual_seed(0)
        normal = functools.partial(torch.randn, generator=generator)
        value = normal(self.batch, self.pixels, self.heads, self.channels).to(self.dtype)
        queries = self.queries or self.pixels
        places = (self.batch, queries, self.heads, sum(self.points))
        if self.queries:
            locations = torch.rand(1, queries, 1, 1, 2, generator=generator) + normal(*places, 2) * _BOX
        else:
            each = [size for size, points in zip(self.sizes, self.points) for _ in range(points)]
            locations = _centres(self.sizes)[None, :, None, None] + normal(*places, 2) * _SPREAD / torch.tensor(
                each
            ).flip(1)
        return value, locations, normal(*places).softmax(-1)

    @functools.cached_property
    def grad(self) -> Tensor:
        value, locations, _ = self.tensors
        generator = torch.Generator().manual_seed(1)
        return torch.randn(*locations.shape[:2], value.shape[2] * value.shape[3], generator=generator).to(value.dtype)

    def ours(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return multiscale_deformable_attention(value, self.sizes, locations, weights, self.points)

    @property
    def stock(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """What a model of transformers runs. Its grid_sample takes value and locations of one dtype, as they are under
        autocast."""
        if len(set(self.points)) > 1:
            from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import multi_scale_deformable_attention_v2

            return lambda value, locations, weights: multi_scale_deformable_attention_v2(
                value.to(locations.dtype), self.sizes, locations, weights, self.points
            )
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

        module, levels = MultiScaleDeformableAttention(), (len(self.sizes), self.points[0])
        return lambda value, locations, weights: module(
            value.to(locations.dtype),
            None,
            self.sizes,
            None,
            locations.unflatten(3, levels),
            weights.unflatten(3, levels),
            64,
        )


def _centres(sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """The centres of all pixels, (x, y) of 0 to 1."""
    grids = [
        torch.cartesian_prod(*((torch.arange(length) + 0.5) / length for length in size)).reshape(-1, 2).flip(1)
        for size in sizes
    ]
    return torch.cat(grids)


def _reference(problem: Attention) -> Any:
    exact = [tensor.double() for tensor in problem.tensors]
    if not problem.backward:
        return problem.stock(*exact)
    leaves = [tensor.requires_grad_() for tensor in exact]
    return list(torch.autograd.grad(problem.stock(*leaves), leaves, problem.grad.double()))


def _run(job: Job, function: str, how: str) -> Prepared:
    problem = job.inputs
    called, tensors = getattr(problem, function), problem.tensors
    if problem.backward:
        return backends.gradients(called, tensors, problem.grad, compile=how == "compiled")
    if how == "compiled":
        return backends.compiled(backends.Function(called), tensors, dynamic=False)
    return getattr(backends, how)(backends.Function(called), tensors)


def _cached_reads(job: Job) -> Prepared:
    value, locations, _ = job.inputs.tensors
    corners = 4 * math.prod(locations.shape[:-1])
    read = corners * job.inputs.channels * value.dtype.itemsize
    source = torch.ones(_IN_CACHE // 4)
    return backends.eager(torch.mv, (source.expand(max(read // _IN_CACHE, 1), -1), source))


def _onnx(problem: Attention) -> tuple[bytes, dict[str, Tensor]]:
    from onnx import helper

    value, locations, weights = problem.tensors
    batch, queries, heads, points, _ = locations.shape
    images, levels = batch * heads, range(len(problem.sizes))
    constants: dict[str, Any] = {
        "two": torch.tensor(2.0),
        "one": torch.tensor(1.0),
        "pixels": torch.tensor([height * width for height, width in problem.sizes]),
        "points": torch.tensor(problem.points),
        "grid_shape": torch.tensor([images, queries, points, 2]),
        "weights_shape": torch.tensor([images, 1, queries, points]),
        "axes": torch.tensor([3]),
        "result_shape": torch.tensor([batch, heads * problem.channels, queries]),
        **{f"shape{i}": torch.tensor([images, problem.channels, *problem.sizes[i]]) for i in levels},
    }
    node = helper.make_node
    parts = {name: [f"{name}{i}" for i in levels] for name in ("value", "map", "image", "grid", "sample")}
    nodes = [
        node("Split", ["value", "pixels"], parts["value"], axis=1),
        node("Mul", ["locations", "two"], ["doubled"]),
        node("Sub", ["doubled", "one"], ["centred"]),
        node("Transpose", ["centred"], ["by_head"], perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["by_head", "grid_shape"], ["grids"]),
        node("Split", ["grids", "points"], parts["grid"], axis=2),
    ]
    for i in levels:
        nodes += [
            node("Transpose", [f"value{i}"], [f"map{i}"], perm=[0, 2, 3, 1]),
            node("Reshape", [f"map{i}", f"shape{i}"], [f"image{i}"]),
            node("GridSample", [f"image{i}", f"grid{i}"], [f"sample{i}"], mode="bilinear", padding_mode="zeros"),
        ]
    nodes += [
        node("Concat", parts["sample"], ["samples"], axis=3),
        node("Transpose", ["weights"], ["weights_by_head"], perm=[0, 2, 1, 3]),
        node("Reshape", ["weights_by_head", "weights_shape"], ["each_weight"]),
        node("Mul", ["samples", "each_weight"], ["weighted"]),
        node("ReduceSum", ["weighted", "axes"], ["sums"], keepdims=0),
        node("Reshape", ["sums", "result_shape"], ["by_channel"]),
        node("Transpose", ["by_channel"], ["out"], perm=[0, 2, 1]),
    ]
    feeds = {"value": value, "locations": locations, "weights": weights}
    return backends.onnx_model(nodes, feeds, 16, constants), feeds  # 16: the first with GridSample


def _onnxruntime(job: Job) -> Prepared:
    backends.only_float32(job.inputs.dtype, "ONNX Runtime")
    return backends.onnxruntime(*_onnx(job.inputs), job.threads)


def _openvino(job: Job) -> Prepared:
    import io

    import openvino as ov

    backends.only_float32(job.inputs.dtype, "OpenVINO")
    model, feeds = _onnx(job.inputs)
    return backends.openvino(ov.Core().read_model(io.BytesIO(model)), list(feeds.values()), job.threads)


_needs_transformers = backends.needs("transformers.modeling_utils")


def _contender(name: str, role: str, function: str, how: str, **options: Any) -> Contender:
    return Contender(
        name, role, functools.partial(_run, function=function, how=how), compiled=how != "eager", **options
    )


_CONTENDERS = backends.with_triton(
    _contender("ours-compiled", "ours", "ours", "compiled"),
    _contender("ours-aoti", "ours", "ours", "packaged"),
    _contender("ours-1-thread", "ours", "ours", "compiled", threads=1, default=False),
    _contender("decomposition", "peer", "ours", "eager", default=False),
    _contender("transformers", "peer", "stock", "eager", check=_needs_transformers),
    _contender("transformers-compiled", "peer", "stock", "compiled", check=_needs_transformers),
    Contender("onnxruntime", "peer", _onnxruntime, check=backends.needs("onnx", "onnxruntime")),
    Contender("openvino", "peer", _openvino, check=backends.needs("onnx", "openvino")),
    Contender("cached-reads", "limit", _cached_reads),
)

_TRAINING = ("ours-compiled", "transformers", "transformers-compiled", "cached-reads")
_BF16 = ("ours-compiled", "ours-aoti", "transformers", "cached-reads")

_DETR = Attention(((100, 134), (50, 67), (25, 34), (13, 17)), (4, 4, 4, 4))
_MASK2FORMER = Attention(((64, 64), (32, 32), (16, 16)), (4, 4, 4))
_RT_DETR = Attention(((80, 80), (40, 40), (20, 20)), (4, 4, 4), 300)

_vary = dataclasses.replace

SUITE = Suite(
    name="multiscale_deformable_attention",
    description="multi-scale deformable attention, forward unless said otherwise",
    reference=_reference,
    remark="In bfloat16 locations and weights are float32, and transformers' function computes in float32, as under "
    "autocast.",
    contenders=_CONTENDERS,
    cases=tuple(
        # Coordinates are float32, off by up to 1e-5 pixels on these maps, and by a pixel's fraction so are samples.
        Case(name, str(problem), lambda problem=problem: problem, 1e-4 if problem.dtype == torch.float32 else 1e-2, who)
        for name, problem, who in (
            ("detr-encoder", _DETR, ()),
            ("detr-encoder-bf16", _vary(_DETR, dtype=torch.bfloat16), _BF16),
            ("detr-decoder", _vary(_DETR, queries=300), ()),
            ("dino-decoder", _vary(_DETR, queries=900), ()),
            ("mask2former-encoder", _MASK2FORMER, ()),
            ("mask2former-encoder-bf16", _vary(_MASK2FORMER, dtype=torch.bfloat16), _BF16),
            ("mask2former-encoder-backward", _vary(_MASK2FORMER, backward=True), _TRAINING),
            ("rt-detr-decoder", _RT_DETR, ()),
            ("d-fine-decoder", _vary(_RT_DETR, points=(3, 6, 3)), ()),
            ("rf-detr-decoder", Attention(((40, 40),), (2,), 300, heads=16, channels=16), ()),
            ("odd-19-channels", _vary(_MASK2FORMER, channels=19), ()),
        )
    ),
)
