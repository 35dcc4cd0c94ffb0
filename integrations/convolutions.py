"""This package's operators in models that were written without them."""

from __future__ import annotations

from ..lowering.installation import installer


def fuse_depthwise_separable() -> None:
    """Make each depthwise-separable pair of convolutions, in any model in eval mode, compile to one kernel.

    After this call ``torch.compile`` and AOTInductor look for a depthwise :class:`torch.nn.Conv2d` that is followed by
    a pointwise one (1 x 1, no stride), with or without a batch norm and an activation between them, as in MobileNets.
    They compute both as :func:`inductor_vision.depthwise_separable_conv2d`. Batch norms become part of the weights, at
    compile time if these are constants (under freezing, and in packages). Results differ by rounding. The models
    themselves and eager mode are not changed.

    A pair is left alone if its batch norm is in training mode, it is not on the CPU, the operator does not have its
    activation, that is a PReLU with more than one slope, its intermediate result is used elsewhere too, the graph
    changes it in place, or fusing it was measured not to be faster. A pair without a batch norm, which would tell the
    mode, is fused in training too; its compiled gradients are the operator's.

    :func:`inductor_vision.explain` and the ``inductor_vision`` logger say what was fused, what was left alone, and why.
    Call it before compiling; calling it again does nothing.

    It is a pass in ``torch._inductor.config.pre_grad_custom_pass``, which runs after passes that are already there. A
    pass that is *assigned* there later replaces it.
    """
    installer.fuse_depthwise_separable()
