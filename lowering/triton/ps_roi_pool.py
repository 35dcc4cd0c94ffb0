"""ps_roi_pool with Triton kernels for its loops: see regions.py."""

from __future__ import annotations

from ...ops import ps_roi_pool
from ..common.registry import triton_program_for
from .regions import gradient_program, region_program

triton_program_for("ps_roi_pool", region_program(ps_roi_pool.forward))
triton_program_for("ps_roi_pool_backward", gradient_program("ps_roi_pool", ps_roi_pool.backward))
