"""aten's sampling operators on this package's kernels."""

from __future__ import annotations

from ..lowering.installation import installer
from ..ops import grid_sampler_2d, upsample_bilinear2d  # noqa: F401  (declare what they serve)


def accelerate_sampling() -> None:
    """Have ``grid_sample`` and bilinear ``interpolate``, in any model, compile to this package's kernels.

    After this call ``torch.compile`` and AOTInductor compile these to the kernels of this package, in float32 and
    bfloat16: :func:`torch.nn.functional.grid_sample` of images, bilinear and with zeros as padding, and its gradients;
    :func:`torch.nn.functional.interpolate` with ``mode="bilinear"`` to larger sizes. Left to Inductor are other modes
    and dtypes, which were not measured to become faster; images of fewer than 8 channels in float32, and the gradients
    of such images in any dtype; ``interpolate`` of channels_last images in float32. Values, borders and what
    becomes of NaN are aten's. Results differ by rounding. Eager mode, ``torch.export``, and what is compiled for other
    devices, stay as they are.

    :func:`inductor_vision.explain` and the ``inductor_vision`` logger say which calls are served, and why others are
    left alone. A program in which aten's operators were decomposed before, by
    :meth:`torch.export.ExportedProgram.run_decompositions`, has none left to be served. Call it before compiling;
    calling it again does nothing.
    """
    installer.accelerate_sampling()
