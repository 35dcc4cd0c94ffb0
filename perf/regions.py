"""What the suites of the operators on regions share: shapes, boxes, contenders, the reference and the limit."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .spec import Case, Contender, Job, Prepared, Unavailable

_LARGEST, _SMALLEST = 0.4, 4  # sides of boxes: up to this part of the image, and so many pixels more


@dataclasses.dataclass(frozen=True)
class Shape:
    """Feature maps, the boxes on them, and what is made of a box.

    Attributes:
        size: height and width of the image that the boxes are on.
        boxes: on all images together.
        bins: of a box, in each direction.
        samples: of a bin, in each direction; 0 for as many as it is long in pixels, None for operators without.
        strides: of the maps, in pixels of the image. A single map is the image.
    """

    channels: int
    size: tuple[int, int]
    boxes: int
    bins: int = 7
    samples: int | None = None
    aligned: bool = False
    batch: int = 1
    strides: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        height, width = self.size
        boxes = "1 box" if self.boxes == 1 else f"{self.boxes} boxes"
        parts = [f"{self.channels} ch, {height}x{width}, batch {self.batch}, {boxes}, {self.bins}x{self.bins} bins"]
        if self.samples is not None:
            parts.append(f"{self.samples}x{self.samples} samples" if self.samples else "adaptive samples")
        parts += ["aligned"] if self.aligned else []
        parts += [f"strides {' '.join(map(str, self.strides))}"] if len(self.strides) > 1 else []
        parts += [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of an operator.

    Attributes:
        tensors: what goes in: maps or gradients, then boxes and whatever else.
        result: the shape of what comes out.
        ours, decomposition, torchvision: functions of ``tensors``, each with the same result.
        further_bytes: of what comes out beside that, for training.
    """

    shape: Shape
    tensors: tuple[Tensor, ...]
    result: tuple[int, ...]
    ours: Callable[..., Any]
    decomposition: Callable[..., Any]
    torchvision: Callable[..., Any]
    further_bytes: int = 0


def maps_and_rois(shape: Shape) -> tuple[Tensor, ...]:
    """The maps, and ``[K, 5]`` float32 boxes: centres anywhere on the image, sides of any length up to the largest, as
    many boxes on each image. Some of them leave it."""
    generator = torch.Generator().manual_seed(0)
    uniform = functools.partial(torch.rand, shape.boxes, 2, generator=generator)
    height, width = shape.size
    extent = torch.tensor([width, height])
    centres, sides = uniform() * extent, uniform() * _LARGEST * extent + _SMALLEST
    images = torch.arange(shape.boxes)[:, None] * shape.batch // shape.boxes
    rois = torch.cat([images, centres - sides / 2, centres + sides / 2], dim=1)
    sizes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in shape.strides]
    maps = [torch.randn(shape.batch, shape.channels, *size, generator=generator).to(shape.dtype) for size in sizes]
    return *maps, rois


def with_certain_bins(rois: Tensor, bins: int, inclusive: bool) -> Tensor:
    """The boxes for operators whose bins are whole pixels: some are a few pixels longer.

    A box of 57 pixels has its seventh bin end at pixel 57 or, as 7 * (57 / 7) is computed in float32, 58. Boxes of such
    sizes come out differently in float64 and in other libraries, and are avoided.

    Args:
        inclusive: whether the pixel at which a box ends belongs to it.
    """
    rois = rois.clone()
    for begin, end in ((1, 3), (2, 4)):
        while (doubtful := _is_doubtful(rois[:, end].round() - rois[:, begin].round() + inclusive, bins)).any():
            rois[doubtful, end] += 1
    return rois


def _is_doubtful(lengths: Tensor, bins: int) -> Tensor:
    edges = torch.arange(bins + 1)
    single, double = (edges * (lengths.to(dtype)[:, None] / bins) for dtype in (torch.float32, torch.float64))
    return ((single.floor() != double.floor()) | (single.ceil() != double.ceil())).any(dim=1)


def gradient(shape: Shape, channels: int) -> Tensor:
    """Shape of the result of an operator that makes so many channels."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape.boxes, channels, shape.bins, shape.bins, generator=generator).to(shape.dtype)


def boxes_and_images(rois: Tensor) -> tuple[Tensor, Tensor]:
    """``[K, 4]`` boxes, and the image that each is on, int64 ``[K]``, for those who want them apart."""
    return rois[:, 1:].contiguous(), rois[:, 0].long()


def trusted(torchvision: Callable[..., Any], decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """torchvision's kernel, or the decomposition, which takes longer, where that does not load."""
    try:
        backends.needs_torchvision()
    except Unavailable:
        return decomposition
    return torchvision


def reference(problem: Problem) -> Any:
    """The right result, in float64."""
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in problem.tensors]
    with torch.no_grad():
        return trusted(problem.torchvision, problem.decomposition)(*exact)


def compiled(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Prepared:
    """Compiled for these shapes alone: to Dynamo all contenders are one function, and sizes that differ are dynamic."""
    return backends.compiled(backends.Function(function), tensors, dynamic=False)


def _compiled(job: Job, channels_last: bool = False) -> Prepared:
    tensors = job.inputs.tensors
    return compiled(job.inputs.ours, _channels_last(tensors) if channels_last else tensors)


def _channels_last(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors)


def _packaged(job: Job) -> Prepared:
    return backends.packaged(backends.Function(job.inputs.ours), job.inputs.tensors)


def _decomposition(job: Job) -> Prepared:
    return backends.eager(job.inputs.decomposition, job.inputs.tensors)


def _compiled_decomposition(job: Job) -> Prepared:
    return compiled(job.inputs.decomposition, job.inputs.tensors)


def _torchvision(job: Job) -> Prepared:
    backends.only_float32(job.inputs.shape.dtype, "torchvision")
    return backends.eager(job.inputs.torchvision, job.inputs.tensors)


def _copy(job: Job) -> Prepared:
    """Move as many bytes as the operator must: read its inputs once and write its result once.

    The copy reads half of these bytes and writes the other half, into memory that is there already. Of the inputs all
    is counted, or what four pixels for each sample are where that is less: few boxes do not need the whole map.
    """
    problem, shape = job.inputs, job.inputs.shape
    read = sum(tensor.nbytes for tensor in problem.tensors)
    if shape.samples:
        read = min(read, 4 * shape.boxes * (shape.bins * shape.samples) ** 2 * shape.channels * shape.dtype.itemsize)
    written = math.prod(problem.result) * shape.dtype.itemsize + problem.further_bytes
    return backends.copy(read + written)


def _onnxruntime(job: Job, node: Callable[[Problem], tuple[Any, dict[str, Tensor]]]) -> Prepared:
    backends.only_float32(job.inputs.shape.dtype, "ONNX Runtime")
    made, feeds = node(job.inputs)
    model = backends.onnx_model([made], feeds, 16)  # 16: the first whose RoiAlign can compute aligned=False
    return backends.onnxruntime(model, feeds, job.threads)


def _openvino(job: Job, node: Callable[[Problem], tuple[Callable[..., Any], list[Tensor]]]) -> Prepared:
    """Maps in bfloat16 come in, and their result goes out, as such; boxes stay float32, as they are for all contenders.

    OpenVINO merges the conversions that this takes with the node where it has a bfloat16 kernel.
    """
    import openvino as ov
    from openvino import opset9

    make, feeds = node(job.inputs)
    types = [ov.Type.bf16 if tensor.dtype == torch.bfloat16 else tensor.numpy().dtype for tensor in feeds]
    parameters = [opset9.parameter(tensor.shape, type) for tensor, type in zip(feeds, types)]
    output = make(*(opset9.convert(p, "f32") if p.get_element_type() == ov.Type.bf16 else p for p in parameters))
    dtype = job.inputs.shape.dtype
    if dtype == torch.bfloat16:
        output = opset9.convert(output, "bf16")
    return backends.openvino(ov.Model([output], parameters), feeds, job.threads, dtype)


REMARK = (
    "torchvision's kernels run on one thread. Results larger than 32 MB are memory fresh from the system at every call "
    "unless freed memory is kept: to have the 50 MB of 1000 boxes mapped takes 3 to 5 ms. ONNX Runtime and OpenVINO "
    "keep such memory, and the copy writes to memory that is there."
)


def contenders(
    *more: Contender,
    onnx_node: Callable[[Problem], tuple[Any, dict[str, Tensor]]] | None = None,
    openvino_node: Callable[[Problem], tuple[Callable[..., Any], list[Tensor]]] | None = None,
) -> tuple[Contender, ...]:
    """Those of all suites, and ``more`` of a suite's own.

    Args:
        onnx_node: makes an ONNX node, and says what its inputs are; where ONNX has the operator.
        openvino_node: gives a function from OpenVINO's parameters to a node, and the parameters' values; where OpenVINO
            has the operator.
    """
    peers = []
    if onnx_node:
        prepare = functools.partial(_onnxruntime, node=onnx_node)
        peers.append(("onnxruntime", prepare, backends.needs("onnx", "onnxruntime")))
    if openvino_node:
        peers.append(("openvino", functools.partial(_openvino, node=openvino_node), backends.needs("openvino")))
    alone: dict[str, Any] = {"threads": 1, "default": False}
    return backends.with_triton(
        Contender("ours-compiled", "ours", _compiled, compiled=True),
        Contender("ours-channels-last", "ours", functools.partial(_compiled, channels_last=True), compiled=True),
        Contender("ours-aoti", "ours", _packaged, compiled=True),
        Contender("ours-1-thread", "ours", _compiled, compiled=True, **alone),
        *more,
        Contender("torchvision", "peer", _torchvision, check=backends.needs_torchvision),
        *(Contender(name, "peer", prepare, check) for name, prepare, check in peers),
        *(Contender(f"{name}-1-thread", "peer", prepare, check, **alone) for name, prepare, check in peers),
        Contender("copy", "limit", _copy),
        Contender("copy-1-thread", "limit", _copy, **alone),
    )


# For suites and cases in which they do not take seconds. A decomposition that loops over data cannot be compiled.
DECOMPOSITION = Contender("decomposition", "peer", _decomposition, default=False)
COMPILED_DECOMPOSITION = Contender(
    "decomposition-compiled", "peer", _compiled_decomposition, compiled=True, default=False
)


def case(name: str, build: Callable[[Shape], Problem], shape: Shape, *contenders: str, note: str = "") -> Case:
    """A case of a suite; ``contenders`` are names, none for the suite's defaults.

    In float32 a coordinate is off by up to 1e-5 pixels where maps are a few hundred pixels long, and so is, by several
    times that, what is interpolated there: torchvision's kernel differs from itself in float64 by 4e-5.
    """
    tolerance = 1e-4 if shape.dtype == torch.float32 else 1e-2
    return Case(name, f"{shape}{note}", functools.partial(build, shape), tolerance, contenders)


# Who takes part in a case that only training has.
TRAINING = ("ours-compiled", "ours-channels-last", "torchvision", "copy")


def all_threads(contenders: tuple[Contender, ...]) -> list[str]:
    """Who takes part in a case for which the decomposition is quick enough."""
    return [contender.name for contender in contenders if contender.threads is None]


def one_thread(contenders: tuple[Contender, ...]) -> list[str]:
    """Who takes part in a case of a single thread; torchvision's kernels never use more."""
    return [contender.name for contender in contenders if contender.threads == 1 or contender.name == "torchvision"]
