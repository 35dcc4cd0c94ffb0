"""soft_nms as one C++ kernel: see cpp/soft_nms.h."""

from __future__ import annotations

from typing import Any

import torch

from .boxes import ScoredBoxesTemplate
from .common.registry import Template, serve_all, template_for
from .common.template import double, struct
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
        self.rule = struct(
            "SoftRule",
            gaussian=method == "gaussian",
            threshold=double(iou_threshold),
            sigma=double(sigma),
            least_score=double(min_score),
        )

    def arguments(self) -> list[str]:
        return [self.rule]


def _lower(boxes: ir.TensorBox, scores: ir.TensorBox, *rest: Any) -> list[ir.TensorBox]:
    return SoftNMSTemplate(boxes, scores, *rest).add_for_each_box(torch.int64, scores.get_dtype())


template_for("soft_nms", Template(serve_all, _lower))
