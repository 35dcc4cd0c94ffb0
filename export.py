"""Exports detectors as one file that needs no Python, nor the library that they are from, nor this package to run."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .integrations.one_image import OneImage, OneImageOfTransformers, one_image
from .integrations.torchvision import accelerate_torchvision
from .integrations.transformers import accelerate_transformers
from .lowering.installation.installer import fold_norms, hide_long_sizes, require_lowerings
from .lowering.workarounds.sizes_in_tensors import sizes_in_tensors
from .lowering.workarounds.tracing import install_for_tracing
from .target import check_target, package_target

_LARGEST_SIDE = 1 << 16  # of an image, in pixels
_LARGEST_RATIO = 10  # of its sides


class _AnyImage(nn.Module):
    """Wrap a model that takes one image, and check that this one's sides differ no more than :func:`export_detector`
    allows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        sides = torch.sym_min(*image.shape[1:]), torch.sym_max(*image.shape[1:])
        shorter, longer = (torch.scalar_tensor(side, dtype=torch.int64) for side in sides)
        message = f"an image must not be more than {_LARGEST_RATIO} times as long as it is wide"
        torch._assert_async(longer <= _LARGEST_RATIO * shorter, message)
        return self.model(image)


def export_detector(
    model: nn.Module,
    example_image: Tensor,
    path: str | os.PathLike[str],
    *,
    any_size: bool = True,
    labels: Sequence[str] = (),
    threshold: float | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    target: str | None = None,
) -> pathlib.Path:
    """Compile a detector into an AOTInductor package that takes an image and returns its detections.

    A model of torchvision resizes the image, and returns results in pixels of the image that it was given. A model of
    transformers takes what its image processor makes of an image, and the package does afterwards what this processor
    would: it returns "scores", "labels" and "boxes", corners in pixels of what it was given, of those that detect
    objects, and also "masks" of those that segment them.

    The package runs with neither of these libraries nor this package. Load it with
    :func:`torch._inductor.aoti_load_package`, or from C++ as ``examples/cpp/run.cpp`` does; in C++ the results are a
    list, and their names are in the package's metadata under "outputs", separated by commas. Images must be contiguous.
    The package raises an error for an image that it cannot take.

    Weights are frozen, with the norms behind convolutions in them, except in a model that has some in float64. For
    lower precision, let the model itself enter autocast, or convert model and ``example_image``: see docs/detectors.md.
    This function calls :func:`inductor_vision.fold_norms` and, if these libraries are installed,
    :func:`inductor_vision.accelerate_torchvision` and :func:`inductor_vision.accelerate_transformers`.

    Args:
        model: a detector of torchvision, or a module with the same interface: in eval mode it takes a list of images
            and returns a dictionary of tensors for each. Or a model of transformers that returns ``pred_boxes`` or
            ``masks_queries_logits``.
        example_image: ``[C, H, W]``, of the dtype that images will have. Choose a typical size: stock poolers derive
            the scales of their maps from it.
        path: the file to write; its name must end with ".pt2".
        any_size: True if images may have any height and width, from 2 to 65536 pixels (models of transformers from 128,
            some only multiples of 32 or the like), with neither more than ten times the other; False if all have the
            size of ``example_image``, which compiles faster. Not every model allows True: one whose ``max_size`` is so
            small that a feature map may become a single pixel does not, nor does transformers' RF-DETR.
        labels: names of the classes; they are put into the package's metadata under "labels", separated by commas.
        threshold: what scores must be above, in a model of transformers; None: 0.5. Those of torchvision have a
            threshold of their own.
        inputs: what a model of transformers is called with besides ``pixel_values``, such as the tokens of a prompt;
            they become constants of the package.
        target: the machines that the package is for, as :func:`inductor_vision.package_target` takes it; None: such as
            this one.

    Returns:
        ``path``.

    Raises:
        ValueError: the file's name does not end with ".pt2", the model is in training mode, the image is not
            ``[C, H, W]``, a label contains a comma, the model does not return detections or does not take ``threshold``
            or ``inputs``, or ``any_size`` is True and the model does not allow it; or ``target`` is not known.
        RuntimeError: kernels cannot be compiled with the installed torch.
    """
    path = pathlib.Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"export_detector: path must end with .pt2, got {str(path)!r}")
    if model.training:
        raise ValueError("export_detector: the model is in training mode; call its eval() first")
    if example_image.dim() != 3:
        raise ValueError(f"export_detector: example_image must be [C, H, W], got {tuple(example_image.shape)}")
    if any("," in label for label in labels):
        raise ValueError(f"export_detector: labels must not have commas, got {list(labels)}")
    check_target("export_detector", target)
    example_image = example_image.contiguous()
    detector = one_image(model, threshold, inputs)
    require_lowerings("export_detector")
    fold_norms()
    if importlib.util.find_spec("torchvision") is not None:
        accelerate_torchvision()
    if importlib.util.find_spec("transformers") is not None:
        accelerate_transformers()
    install_for_tracing()
    hide_long_sizes("export_detector")
    from .lowering.workarounds.unchecked_inputs import inputs_checked
    from .lowering.workarounds.unpacked_weights import weights_packed

    with torch.no_grad():
        names = _names(_call_eagerly(detector, example_image))  # also lets stock poolers find out their scales
        exported = _export_any_size(detector, example_image) if any_size else _export(detector, example_image)
        options = {
            # Weights are converted and brought into oneDNN's order now, not at every call; it has none for float64.
            "freezing": not any(tensor.dtype == torch.float64 for tensor in model.state_dict().values()),
            "aot_inductor.metadata": {"outputs": ",".join(names), "labels": ",".join(labels)},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with package_target(target), inputs_checked(), weights_packed():
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)
    return path


def _call_eagerly(detector: nn.Module, image: Tensor) -> object:
    """The detector's result; torchvision's kernels do not have the low precisions, but under autocast."""
    low = image.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(image.device.type, image.dtype if low else torch.bfloat16, enabled=low):
        return detector(image)


def _names(detections: object) -> list[str]:
    if not isinstance(detections, dict) or not all(isinstance(value, Tensor) for value in detections.values()):
        raise ValueError(
            "export_detector: the model must return a dictionary of tensors for each image, "
            f"got {type(detections).__name__}"
        )
    return list(detections)


def _export(detector: nn.Module, example_image: Tensor, dynamic_shapes: Any = None) -> torch.export.ExportedProgram:
    with sizes_in_tensors():
        return torch.export.export(detector.eval(), (example_image,), dynamic_shapes=dynamic_shapes)


def _export_any_size(
    detector: OneImage | OneImageOfTransformers, example_image: Tensor
) -> torch.export.ExportedProgram:
    smallest, divisor = detector.smallest, detector.divisor
    bounds = {"min": -(-smallest // divisor), "max": _LARGEST_SIDE // divisor}
    sides = (torch.export.Dim(name, **bounds) for name in ("height", "width"))
    height, width = (side if divisor == 1 else divisor * side for side in sides)
    try:
        exported = _export(_AnyImage(detector), example_image, ({1: height, 2: width},))
        _check_guards(exported, example_image, smallest, divisor)
    except (torch._dynamo.exc.UserError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(
            "export_detector: this model does not allow images of any height and width; with any_size=False it can be "
            f"exported for those of {example_image.shape[1]} x {example_image.shape[2]} pixels. The reason: {error}"
        ) from error
    return exported


def _check_guards(exported: torch.export.ExportedProgram, example_image: Tensor, smallest: int, divisor: int) -> None:
    """Raise AssertionError where what was decided while the model was traced does not hold for all images.

    A package does not check that: what is decided with the size of an image in hand (`if height > 1000`) would silently
    be so for every image.
    """
    guards = exported.module().get_submodule("_guards_fn")
    sides = [2, 3, *(round(2 ** (i / 2)) for i in range(4, 33))]  # up to the largest
    sides = sorted({side // divisor * divisor for side in sides if side >= smallest})
    for height, width in itertools.product(sides, sides):
        if max(height, width) <= _LARGEST_RATIO * min(height, width):
            guards(example_image.new_empty((example_image.shape[0], height, width), device="meta"))
