"""aten's sampling operators on this package's kernels."""

from __future__ import annotations

from ..lowering.installation import installer
from ..ops import grid_sampler_2d, upsample2d  # noqa: F401  (declare what they serve)


def accelerate_sampling() -> None:
    """Have ``grid_sample``, and bilinear and bicubic ``interpolate``, compile to this package's kernels in any model.

    After this call ``torch.compile`` and AOTInductor compile these to the kernels of this package, in every floating
    dtype: :func:`torch.nn.functional.grid_sample` of images, and its gradients;
    :func:`torch.nn.functional.interpolate` of images with ``mode="bicubic"``, and with ``mode="bilinear"`` to larger
    sizes, both without ``antialias``. What was measured not to become faster is left to Inductor: gradients of bilinear
    ``grid_sample`` of fewer than 8 channels in float32 and float64, and bilinear ``interpolate`` to smaller sizes. Of
    all modes, dtypes and memory formats a random sample was measured
    (``python -m inductor_vision.perf.sampling_modes``).
    Values, borders and what becomes of NaN are aten's. Results differ by rounding. Eager mode, ``torch.export``, and
    what is compiled for other devices, stay as they are.

    :func:`inductor_vision.explain` and the ``inductor_vision`` logger say which calls are served, and why others are
    left alone. A program in which aten's operators were decomposed before, by
    :meth:`torch.export.ExportedProgram.run_decompositions`, has none left to be served. Call it before compiling;
    calling it again does nothing.
    """
    installer.accelerate_sampling()
