"""nms with a Triton kernel that chooses: see boxes.py."""

from __future__ import annotations

import functools

from torch import Tensor

from ...ops.boxes import check_scored_boxes, iou, rounded_quotient
from ...ops.registry import accumulate_dtype
from ..common.registry import TritonProgram, triton_program_for
from .boxes import suppress_greedily


def _nms(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    check_scored_boxes("nms", boxes, scores, classes)
    overlap = functools.partial(iou, divide=rounded_quotient)
    return suppress_greedily(boxes.to(accumulate_dtype(boxes.dtype)), scores, classes, iou_threshold, overlap)


triton_program_for("nms", TritonProgram(_nms))
