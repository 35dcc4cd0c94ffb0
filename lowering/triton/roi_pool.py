"""roi_pool with a Triton kernel for its loop: see regions.py. Its gradient has none."""

from __future__ import annotations

from ...ops import roi_pool
from ..common.registry import triton_program_for
from .regions import region_program

triton_program_for("roi_pool", region_program(roi_pool.forward))
