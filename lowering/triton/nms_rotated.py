"""nms_rotated with a Triton kernel that chooses: see boxes.py."""

from __future__ import annotations

from torch import Tensor

from ...ops.box_iou_rotated import COLUMNS, overlap, rectangles
from ...ops.boxes import check_scored_boxes
from ..common.registry import TritonProgram, triton_program_for
from .boxes import suppress_greedily


def _nms_rotated(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    check_scored_boxes("nms_rotated", boxes, scores, classes, COLUMNS)
    return suppress_greedily(rectangles(boxes), scores, classes, iou_threshold, overlap)


triton_program_for("nms_rotated", TritonProgram(_nms_rotated))
