"""This package's operators in models that were written without them."""

from __future__ import annotations

from ..lowering.installation import installer
from ..ops import direct_conv2d, inverted_residual_conv2d  # noqa: F401  (declares what takes convolutions' place)
from ..ops.winograd_conv2d import ALGORITHMS


def fuse_depthwise_separable() -> None:
    """Make each depthwise-separable pair of convolutions, in any model in eval mode, compile to one kernel.

    After this call ``torch.compile`` and AOTInductor look for a depthwise :class:`torch.nn.Conv2d` that is followed by
    a pointwise one (1 x 1, no stride), with or without a batch norm and an activation between them, as in MobileNets.
    They compute both as :func:`inductor_vision.depthwise_separable_conv2d`. In inference the same kernel computes the
    pointwise convolution before them, if it is there for them alone, as in inverted residuals, and estimated to gain
    by it with the number of threads that torch has at that time. Batch norms become part of the weights, at compile
    time if these are constants (under freezing, and in packages). Results differ by rounding. The models themselves and
    eager mode are not changed.

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


def use_winograd(tile: int = 4, growth: float = 0.5) -> None:
    """Have 3 x 3 convolutions of any model compile to Winograd's algorithm where that makes them faster.

    After this call ``torch.compile`` and AOTInductor compute stock convolutions (modules, functions, those of blocks
    such as torchvision's ``Conv2dNormActivation``) as :func:`inductor_vision.winograd_conv2d` does, in inference and in
    training, where the gradient by the input is such a convolution too. It multiplies less than a half, and results
    differ in the fifth digit: docs/numerics.md says how much. Models and eager mode are not changed.

    Which ones become faster is estimated from their sizes, for the processor that code is generated for; of dynamic
    sizes, those that the model is compiled with. Left alone are convolutions with other kernels than 3 x 3, a stride or
    a dilation, those of float64, and those in a low precision that the processor multiplies by itself. Under freezing,
    norms behind those that are taken are folded as :func:`inductor_vision.fold_norms` does it.

    A weight that is a constant (under freezing, and in packages) is transformed at compile time, and is then 4 times as
    large for tile 4, 1.8 times for tile 2; ``growth`` limits what that takes. Others are transformed in each call.

    :func:`inductor_vision.explain` and the ``inductor_vision`` logger say of each convolution what became of it, and
    why. Call it before compiling; the last call counts.

    It is a pass in ``torch._inductor.config.joint_custom_pre_pass``, which runs after passes that are already there. A
    pass that is *assigned* there later replaces it.

    Args:
        tile: 4, or 2 for a smaller error, at less gain.
        growth: by how much of their size the constants of a model may grow. Those that save most time for their size
            come first. 0 keeps packages as small as they are, ``math.inf`` is without limit.

    Raises:
        ValueError: there is no such tile, or ``growth`` is negative.
    """
    if tile not in ALGORITHMS:
        raise ValueError(f"use_winograd: tile must be {' or '.join(map(str, ALGORITHMS))}, got {tile!r}")
    if not growth >= 0:
        raise ValueError(f"use_winograd: growth must not be negative, got {growth!r}")
    installer.use_winograd(tile, growth)


def use_direct_convolutions() -> None:
    """Have convolutions of frozen models compile to this package's own kernel where that is faster than oneDNN.

    After this call ``torch.compile`` with ``torch._inductor.config.freezing``, and packages, compute stock convolutions
    whose weights are constants, 1 x 1 and larger ones, with a stride or without, dense and depthwise, in one C++ kernel
    each, with what follows in its store: activation, residual, scale. There is no call of oneDNN, which takes 13 to 22
    microseconds more than PyTorch's own; that is much of a small model's time. Results differ by rounding.

    Which ones become faster is estimated from their sizes, for the processor that code is generated for; of dynamic
    sizes, those that the model is compiled with. Left alone are convolutions with groups of more than one channel,
    dense ones dilated along the width, those whose weight is not a constant, and those in a low precision that the
    processor multiplies by itself. Norms behind those that are taken are folded as :func:`inductor_vision.fold_norms`
    does it. Together with :func:`inductor_vision.use_winograd` each convolution gets what is estimated to be fastest.

    :func:`inductor_vision.explain` and the ``inductor_vision`` logger say of each convolution what became of it, and
    why. Models, eager mode and training are not changed. Call it before compiling; calling it again does nothing.

    It is a pass in ``torch._inductor.config.joint_custom_pre_pass``, which runs after passes that are already there. A
    pass that is *assigned* there later replaces it.
    """
    installer.use_direct_convolutions()


def fold_norms() -> None:
    """Make convolutions of frozen models compute the norms behind them, in each dtype.

    After this call ``torch.compile`` with ``torch._inductor.config.freezing``, and packages that are compiled with it,
    compute whatever is an affine map of each channel by constants behind a convolution, ``a * conv(x) + c``, as part of
    it: batch norms in eval mode, torchvision's ``FrozenBatchNorm2d``, scales and shifts. Inductor does so where all is
    of one dtype; here it is done under autocast and in models of bfloat16 too, where casts stand between. New weights
    are computed in float64 and rounded once. What the convolution gives is rounded to its dtype once, behind the norm,
    the residual and the activation, instead of before each.

    A convolution is left alone if its result is used elsewhere too, its weight is not a constant, it is in bfloat16 and
    what the norm gives is returned, or computed with further, in float32, or it is in float16, whose range is too small
    for products of weights and scales. Models, eager mode and training are not changed.

    A linear layer that reads the flattened map of a convolution gets its weight in the order in which the map lies in
    memory, so that the map is not copied. Convolutions of one map with few filters each, such as a detector's heads for
    scores and boxes, are computed as one.

    :func:`inductor_vision.accelerate` and :func:`inductor_vision.export_detector` call it.
    :func:`inductor_vision.explain` and the ``inductor_vision`` logger say what became of each convolution before such a
    map. Call it before compiling; calling it again does nothing.

    It is a pass in ``torch._inductor.config.joint_custom_pre_pass``, which runs after passes that are already there. A
    pass that is *assigned* there later replaces it.
    """
    installer.fold_norms()
