"""nms as one C++ kernel: see cpp/nms.h."""

from __future__ import annotations

import torch

from .boxes import ScoredBoxesTemplate
from .common.registry import Template, serve_all, template_for
from .common.template import double
from .inductor.codegen import ir


class NMSTemplate(ScoredBoxesTemplate):
    """See cpp/nms.h."""

    op = "nms"
    header = "nms.h"

    def __init__(
        self, boxes: ir.TensorBox, scores: ir.TensorBox, classes: ir.TensorBox | None, iou_threshold: float
    ) -> None:
        super().__init__(boxes, scores, classes)
        self.iou_threshold = iou_threshold

    def arguments(self) -> list[str]:
        return [double(self.iou_threshold)]

    @classmethod
    def lower(
        cls, boxes: ir.TensorBox, scores: ir.TensorBox, classes: ir.TensorBox | None, iou_threshold: float
    ) -> ir.TensorBox:
        (indices,) = cls(boxes, scores, classes, iou_threshold).add_for_each_box(torch.int64)
        return indices


template_for("nms", Template(serve_all, NMSTemplate.lower))
