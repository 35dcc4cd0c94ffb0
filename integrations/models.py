"""What this package has for whole models, in one call, and what makes their calls cheap."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..lowering.installation import installer
from ..memory import keep_memory
from .convolutions import fold_norms, fuse_depthwise_separable, use_winograd
from .sampling import accelerate_sampling
from .torchvision import accelerate_torchvision
from .transformers import accelerate_transformers


def accelerate(
    *,
    torchvision: bool = True,
    transformers: bool = True,
    depthwise_separable: bool = True,
    norms: bool = True,
    sampling: bool = True,
    winograd: bool = False,
    freezing: bool = False,
    memory: bool = False,
) -> None:
    """Have whatever is compiled in this process use what this package has for it.

    It makes the calls that apply here, each of which says what it changes:

    * :func:`inductor_vision.accelerate_torchvision`, if torchvision is installed,
    * :func:`inductor_vision.accelerate_transformers`, if transformers is installed,
    * :func:`inductor_vision.fuse_depthwise_separable`,
    * :func:`inductor_vision.fold_norms`,
    * :func:`inductor_vision.accelerate_sampling`,
    * with ``winograd``, :func:`inductor_vision.use_winograd`, unless it was called before, perhaps with arguments; not
      by default, since numbers change in the fifth digit,
    * with ``freezing``, :func:`inductor_vision.freeze_weights`; not by default, since what is compiled then does not
      see later changes of weights,
    * with ``memory``, :func:`inductor_vision.keep_memory`; not by default, since the process then stays as large as it
      has ever been.

    Models and eager mode stay as they are, and so do the other settings of Dynamo and Inductor, which are the user's:
    what makes calls cheap is given to ``torch.compile``, see :func:`inductor_vision.inference_options`. Call it before
    compiling; what was called before is not done twice.

    Args:
        torchvision, transformers, depthwise_separable, norms, sampling, winograd, freezing, memory: whether to make
            these calls.

    Raises:
        TypeError: an argument is not a bool; nothing was called then.
    """
    arguments = {
        "torchvision": torchvision,
        "transformers": transformers,
        "depthwise_separable": depthwise_separable,
        "norms": norms,
        "sampling": sampling,
        "winograd": winograd,
        "freezing": freezing,
        "memory": memory,
    }
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise TypeError(f"accelerate: {name} must be True or False, got {value!r}")
    if torchvision and importlib.util.find_spec("torchvision") is not None:
        accelerate_torchvision()  # first: a broken torchvision raises when it is imported, and nothing was changed then
    if transformers and importlib.util.find_spec("transformers") is not None:
        accelerate_transformers()
    if depthwise_separable:
        fuse_depthwise_separable()
    if norms:
        fold_norms()
    if sampling:
        accelerate_sampling()
    if winograd and not installer.uses_winograd():
        use_winograd()
    if freezing:
        freeze_weights()
    if memory:
        keep_memory()


def freeze_weights() -> None:
    """Have models that are compiled for inference take their weights for constants.

    It sets ``torch._inductor.config.freezing``. From then on, whatever this process compiles under
    :func:`torch.no_grad` computes at compile time what follows from weights alone: they are converted, brought into
    the order in which kernels and oneDNN read them, and multiplied by the norms behind them. A parameter that is
    replaced is noticed; one that is changed in place later is not, as when training goes on. What is compiled while
    gradients are wanted is not frozen.

    As an option, ``torch.compile(model, options={"freezing": True})``, it comes too late in the releases of torch that
    this package is tested with: Dynamo has made inputs of a module's weights by then, and nothing is frozen.
    """
    import torch._inductor.config

    torch._inductor.config.freezing = True


def inference_options() -> dict[str, Any]:
    """Options of ``torch.compile`` that make calls of a model cheap: ``torch.compile(model, options=...)``.

    The calls between kernels are compiled C++ (``cpp_wrapper``), which takes longer to compile, and do not check again
    at each call the sizes that custom operators and libraries have promised (``size_asserts``). See docs/guide.md for
    what each of them saves. They go well with :func:`inductor_vision.freeze_weights`.

    Returns:
        A new dictionary, to which others may be added.
    """
    return {"cpp_wrapper": True, "size_asserts": False}
