"""nms_rotated as one C++ kernel: see cpp/nms_rotated.h."""

from __future__ import annotations

from .common.registry import Template, serve_all, template_for
from .nms import NMSTemplate


class RotatedNMSTemplate(NMSTemplate):
    """See cpp/nms_rotated.h."""

    op = "nms_rotated"
    header = "nms_rotated.h"


template_for("nms_rotated", Template(serve_all, RotatedNMSTemplate.lower))
