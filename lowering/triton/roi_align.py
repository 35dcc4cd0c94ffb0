"""roi_align with Triton kernels for its loops: see regions.py."""

from __future__ import annotations

from ...ops import roi_align
from ..common.registry import triton_program_for
from .regions import gradient_program, region_program

triton_program_for("roi_align", region_program(roi_align.forward))
triton_program_for("roi_align_backward", gradient_program("roi_align", roi_align.backward))
