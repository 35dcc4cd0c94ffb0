"""Non-maximum suppression, of one class and of many.

A result is a list of indices, right or wrong: it is compared with what torchvision's kernel, or the decomposition where
that does not load, finds in the same precision. The limit is a copy of boxes, scores and result, which no operator that
compares boxes comes near.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from ...ops.nms import batched_nms, nms
from .. import backends
from ..boxes import COPY, OURS, Problem, case, reference
from ..regions import trusted
from ..spec import Contender, Job, Prepared, Suite, Unavailable


class Suppression(Problem):
    """For torchvision's operators and these."""

    @functools.cached_property
    def right(self) -> Tensor:
        return trusted(self.torchvision, self.ours)(*self.tensors)

    def ours(self, *tensors: Tensor) -> Tensor:
        return (nms if self.classes is None else batched_nms)(*tensors, self.threshold)

    def torchvision(self, *tensors: Tensor) -> Tensor:
        import torchvision

        return getattr(torchvision.ops, "nms" if self.classes is None else "batched_nms")(*tensors, self.threshold)


def _torchvision(job: Job) -> Prepared:
    return backends.eager(job.inputs.torchvision, job.inputs.tensors)


def _only_one_class(problem: Suppression, who: str) -> tuple[Tensor, Tensor]:
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
    prepared = backends.onnxruntime(backends.onnx_model([node], feeds, 16, dtype=torch.int64), feeds, job.threads)
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
    prepared = backends.openvino(model, feeds, job.threads)
    indices, count = prepared.output  # rows of (image, class, box), and how many of them there are
    return dataclasses.replace(prepared, output=indices[: int(count), 2].long())


_CONTENDERS = backends.with_triton(
    *OURS,
    Contender("torchvision", "peer", _torchvision, check=backends.needs_torchvision),
    Contender("onnxruntime", "peer", _onnxruntime, check=backends.needs("onnx", "onnxruntime")),
    Contender("openvino", "peer", _openvino, check=backends.needs("openvino")),
    COPY,
)

# Who takes part where boxes are so many that the others take seconds.
_MANY = ("ours-compiled", "ours-1-thread", "openvino", "copy")

SUITE = Suite(
    name="nms",
    description="non-maximum suppression",
    remark="torchvision's kernel runs on one thread.",
    reference=reference,
    contenders=_CONTENDERS,
    cases=(
        case("1000", Suppression(1000, 0.5)),
        case("4000", Suppression(4000, 0.7)),
        case("20000", Suppression(20000, 0.5)),
        case("20000-1-thread", Suppression(20000, 0.5), "ours-1-thread", "torchvision", "copy"),
        case("4000-80-classes", Suppression(4000, 0.5, classes=80)),
        case("growth-20000", Suppression(20000, 0.5, density=20000), *_MANY),
        case("growth-50000", Suppression(50000, 0.5, density=20000), *_MANY),
        case("growth-100000", Suppression(100000, 0.5, density=20000), *_MANY),
    ),
)
