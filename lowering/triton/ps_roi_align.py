"""ps_roi_align with Triton kernels for its loops: see regions.py."""

from __future__ import annotations

from ...ops import ps_roi_align
from ..common.registry import triton_program_for
from .regions import gradient_program, region_program

triton_program_for("ps_roi_align", region_program(ps_roi_align.forward))
triton_program_for("ps_roi_align_backward", gradient_program("ps_roi_align", ps_roi_align.backward))
