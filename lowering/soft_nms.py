"""soft_nms as one C++ kernel: see cpp/soft_nms.h."""

from __future__ import annotations

from typing import Any

import torch

from .boxes import ScoredBoxesTemplate
from .common.registry import Template, serve_all, template_for
from .common.template import double
from .inductor.codegen import ir


class SoftNMSTemplate(ScoredBoxesTemplate):
    """See cpp/soft_nms.h."""

    op = "soft_nms"
    header = "soft_nms.h"

    def __init__(
        self,
        boxes: ir.TensorBox,
        scores: ir.TensorBox,
        classes: ir.TensorBox | None,
        iou_threshold: float,
        sigma: float,
        min_score: float,
        method: str,
    ) -> None:
        super().__init__(boxes, scores, classes)
        self.numbers = iou_threshold, sigma, min_score
        self.gaussian = method == "gaussian"

    def arguments(self) -> list[str]:
        fields = ", ".join([str(self.gaussian).lower(), *map(double, self.numbers)])
        return [f"inductor_vision::SoftRule{{{fields}}}"]


def _lower(boxes: ir.TensorBox, scores: ir.TensorBox, *rest: Any) -> list[ir.TensorBox]:
    return SoftNMSTemplate(boxes, scores, *rest).add_for_each_box(torch.int64, scores.get_dtype())


template_for("soft_nms", Template(serve_all, _lower))
