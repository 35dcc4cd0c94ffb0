"""This package's operators in models that were written without them."""

from __future__ import annotations

from ..lowering.installation import installer


def fuse_depthwise_separable() -> None:
    """Have depthwise-separable convolutions of any model in eval mode compiled to one kernel.

    After this call ``torch.compile`` and AOTInductor look for a depthwise :class:`torch.nn.Conv2d` that is followed,
    with a batch norm and an activation between them or without, by a pointwise one (1 x 1, no stride), as in
    MobileNets, and compute both as :func:`inductor_vision.depthwise_separable_conv2d`. Batch norms become part of the
    weights, at compile time if these are constants (under freezing, and in packages). Results differ by rounding.
    Models are not changed, and eager mode is not either. Left alone are batch norms in training mode, other devices
    than the CPU, activations that the operator does not have, a PReLU with more than one slope, pairs whose
    intermediate result is used elsewhere too, pairs that a graph changes in place, and what was measured not to become
    faster.
    Where no batch norm tells the mode, a pair is fused in training too, and its compiled gradients are the operator's.

    What was found, what was left alone, and why, is in :func:`inductor_vision.explain` and in the ``inductor_vision``
    logger. Call it before compiling; calling it again does nothing.

    It is a pass in ``torch._inductor.config.pre_grad_custom_pass``, behind those that are there already; one that is
    *assigned* later takes its place.
    """
    installer.fuse_depthwise_separable()
