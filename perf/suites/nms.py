"""Non-maximum suppression, of one class and of many.

A result is a list of indices, right or wrong: it is compared with what torchvision's kernel, or the decomposition where
that does not load, finds in the same precision. The limit is a copy of boxes, scores and result, which no operator that
compares boxes comes near.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...ops.nms import batched_nms, nms
from .. import backends
from ..regions import compiled, trusted
from ..spec import Case, Contender, Job, Prepared, Suite, Unavailable

_IMAGE = 1000, 800  # width and height


@dataclasses.dataclass(frozen=True)
class Problem:
    """Boxes with centres anywhere on an image of 1000 x 800, or a larger one, and sides of up to 0.4 of 1000 x 800.

    Attributes:
        density: how many boxes there are on 1000 x 800; the image is as large as ``count`` of them need. None: all.
        classes: how many; None for :func:`nms`.
    """

    count: int
    threshold: float
    density: int | None = None
    classes: int | None = None

    def __str__(self) -> str:
        parts = [f"{self.count} boxes, threshold {self.threshold}"]
        parts += [f"{self.classes} classes"] if self.classes else []
        parts += [f"{self.density} on 1000x800"] if self.density else []
        return ", ".join(parts)

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Boxes, scores, no two of them equal and none 0, and classes if there are any."""
        generator = torch.Generator().manual_seed(0)
        uniform = functools.partial(torch.rand, self.count, 2, generator=generator)
        image = torch.tensor(_IMAGE) * math.sqrt(self.count / (self.density or self.count))
        centres, sides = uniform() * image, uniform() * 0.4 * torch.tensor(_IMAGE) + 4
        boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
        scores = (torch.randperm(self.count, generator=generator) + 1) / self.count
        if self.classes is None:
            return boxes, scores
        return boxes, scores, torch.randint(self.classes, (self.count,), generator=generator)

    @functools.cached_property
    def right(self) -> Tensor:
        return trusted(self.torchvision, self.ours)(*self.tensors)

    def ours(self, *tensors: Tensor) -> Tensor:
        return (nms if self.classes is None else batched_nms)(*tensors, self.threshold)

    def torchvision(self, *tensors: Tensor) -> Tensor:
        import torchvision

        return getattr(torchvision.ops, "nms" if self.classes is None else "batched_nms")(*tensors, self.threshold)


def _reference(problem: Problem) -> Tensor:
    return problem.right


def _compiled(job: Job) -> Prepared:
    return compiled(job.inputs.ours, job.inputs.tensors)


def _packaged(job: Job) -> Prepared:
    return backends.packaged(backends.Function(job.inputs.ours), job.inputs.tensors)


def _torchvision(job: Job) -> Prepared:
    return backends.eager(job.inputs.torchvision, job.inputs.tensors)


def _only_one_class(problem: Problem, who: str) -> tuple[Tensor, Tensor]:
    """The boxes of an image, ``[1, N, 4]``, and their scores, ``[1, 1, N]``, for who takes a score for each class."""
    if problem.classes is not None:
        raise Unavailable(f"{who} takes every box for every class")
    boxes, scores = problem.tensors
    return boxes[None], scores[None, None]


def _onnxruntime(job: Job) -> Prepared:
    from onnx import helper

    problem = job.inputs
    boxes, scores = _only_one_class(problem, "ONNX Runtime")
    feeds = {
        "boxes": boxes[..., [1, 0, 3, 2]].contiguous(),  # y before x
        "scores": scores,
        "most": torch.tensor([problem.count]),
        "threshold": torch.tensor([problem.threshold]),
    }
    node = helper.make_node("NonMaxSuppression", list(feeds), ["indices"])
    prepared = backends.onnxruntime(backends.onnx_model(node, feeds, 16, dtype=torch.int64), feeds, job.threads)
    return dataclasses.replace(prepared, output=prepared.output[0][:, 2])  # rows of (image, class, box)


def _openvino(job: Job) -> Prepared:
    import numpy as np
    from openvino import Model, opset9

    problem = job.inputs
    feeds = _only_one_class(problem, "OpenVINO")
    parameters = [opset9.parameter(tensor.shape, tensor.numpy().dtype) for tensor in feeds]
    most, threshold = opset9.constant(np.int64(problem.count)), opset9.constant(np.float32(problem.threshold))
    node = opset9.non_max_suppression(*parameters, most, threshold)
    model = Model([node.output(0), node.output(2)], parameters)
    prepared = backends.openvino(model, feeds, job.threads, "f32")
    indices, count = prepared.output  # rows of (image, class, box), and how many of them there are
    return dataclasses.replace(prepared, output=indices[: int(count), 2].long())


def _copy(job: Job) -> Prepared:
    moved = sum(tensor.nbytes for tensor in job.inputs.tensors) + job.inputs.right.nbytes
    return backends.copy(moved)


_ALONE: dict[str, Any] = {"threads": 1, "default": False}
_CONTENDERS = (
    Contender("ours-compiled", "ours", _compiled, compiled=True),
    Contender("ours-aoti", "ours", _packaged, compiled=True),
    Contender("ours-1-thread", "ours", _compiled, compiled=True, **_ALONE),
    Contender("torchvision", "peer", _torchvision, check=backends.needs_torchvision),
    Contender("onnxruntime", "peer", _onnxruntime, check=backends.needs("onnx", "onnxruntime")),
    Contender("openvino", "peer", _openvino, check=backends.needs("openvino")),
    Contender("copy", "limit", _copy),
)


def _case(name: str, problem: Problem, *contenders: str) -> Case:
    return Case(name, str(problem), lambda: problem, 0.0, contenders)


# Who takes part where boxes are so many that the others take seconds.
_MANY = ("ours-compiled", "ours-1-thread", "openvino", "copy")

SUITE = Suite(
    name="nms",
    description="non-maximum suppression",
    reference=_reference,
    contenders=_CONTENDERS,
    cases=(
        _case("1000", Problem(1000, 0.5)),
        _case("4000", Problem(4000, 0.7)),
        _case("20000", Problem(20000, 0.5)),
        _case("20000-1-thread", Problem(20000, 0.5), "ours-1-thread", "torchvision", "copy"),
        _case("4000-80-classes", Problem(4000, 0.5, classes=80)),
        _case("growth-20000", Problem(20000, 0.5, density=20000), *_MANY),
        _case("growth-50000", Problem(50000, 0.5, density=20000), *_MANY),
        _case("growth-100000", Problem(100000, 0.5, density=20000), *_MANY),
    ),
)
