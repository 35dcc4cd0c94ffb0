"""Stock torchvision models on this package's operators."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import pkgutil
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from ..lowering import registry as lowering_registry
from ..ops import heatmaps_to_keypoints, torchvision_detection  # noqa: F401  (declare what they replace)
from ..ops.registry import TORCHVISION, TORCHVISION_PYTHON

logger = logging.getLogger("inductor_vision")

# The operators of torchvision 0.28's compiled library, as it declares them.
_SCHEMAS = (
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
    "_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "SymInt batch_size, SymInt channels, SymInt height, SymInt width, int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    "_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt height, SymInt width) -> Tensor",
    "ps_roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio) -> (Tensor, Tensor)",
    "_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor channel_mapping, float spatial_scale, "
    "SymInt pooled_height, SymInt pooled_width, int sampling_ratio, SymInt batch_size, SymInt channels, "
    "SymInt height, SymInt width) -> Tensor",
    "ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    "_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor channel_mapping, float spatial_scale, "
    "SymInt pooled_height, SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt height, SymInt width) "
    "-> Tensor",
)

_HAVE_FAKE_KERNELS = ("nms", "qnms")  # torchvision registers these in Python, library or not

_REPLACED = "_inductor_vision_replaced"  # set on functions that were put in place of torchvision's

_stand_ins: torch.library.Library | None = None  # holds the definitions alive


def accelerate_torchvision() -> None:
    """Have stock torchvision models use this package's operators wherever they are compiled.

    After this call ``torch.compile``, ``torch.export`` and AOTInductor turn ``torch.ops.torchvision.*`` into the same
    kernels that the functions of this package become, forward and backward; eager mode goes on with torchvision's own
    kernels. Where torchvision's own Python is what breaks a graph or depends on data (the levels of
    ``MultiScaleRoIAlign``), compiled code gets an equivalent instead. Call it before compiling; calling it again does
    nothing.

    Where torchvision's compiled library cannot load (a CUDA wheel beside a CPU-only torch: ``import torchvision`` fails
    with "operator torchvision::nms does not exist"), the operators are defined here instead, so that torchvision
    imports and runs: those that this package has run its decompositions in eager mode, the others raise
    NotImplementedError when they are called.

    Raises:
        ImportError: torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise ImportError("torchvision is not installed: pip install inductor_vision[torchvision]")
    if _stand_ins is None and not _compiled_library_loads():
        _define_operators()
    for function, replacement in TORCHVISION_PYTHON.items():
        _replace_in_compiled_code(function, replacement)
    lowering_registry.accelerate_torchvision()


def _compiled_library_loads() -> bool:
    """Whether torchvision's own operators are there, or come with importing it."""
    try:
        import torchvision.extension
    except RuntimeError as error:  # its fake kernels are registered for operators that do not exist
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return torchvision.extension._has_ops()


def _define_operators() -> None:
    global _stand_ins
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        function = TORCHVISION.get(name) or _missing(name)
        # With its own entry for autograd the operator is gone before autograd sees it, and this package's is there.
        for key in ("CompositeExplicitAutograd", "Autograd"):
            library.impl(name, function, key)
        if name not in _HAVE_FAKE_KERNELS:
            torch.library.register_fake(f"torchvision::{name}", function, lib=library)
    _stand_ins = library
    import torchvision.extension

    torchvision.extension._has_ops = lambda: True  # its wrappers assert on it
    logger.info("torchvision's compiled library does not load; its operators are defined by inductor_vision")


def _replace_in_compiled_code(function: str, replacement: Callable[..., Any]) -> None:
    """Of a function of a module, or a method of a class."""
    path, _, name = f"torchvision.{function}".rpartition(".")
    owner = pkgutil.resolve_name(path)
    original = getattr(owner, name)
    if hasattr(original, _REPLACED):
        return

    is_compiling = torch.compiler.is_compiling

    def choose(*args: Any, **kwargs: Any) -> Any:
        return (replacement if is_compiling() else original)(*args, **kwargs)

    # torch.jit.script compiles the source of what is wrapped, and looks names up where this function would.
    choose = types.FunctionType(choose.__code__, original.__globals__, name, closure=choose.__closure__)
    functools.update_wrapper(choose, original)
    setattr(choose, _REPLACED, True)
    if inspect.isclass(owner):
        setattr(owner, name, choose)
        return
    # torch.jit.script, which cannot compile `choose`, takes the original of functions that are marked so. So does
    # Dynamo, which is told to take the replacement for the original; what traces without Dynamo calls `choose`.
    choose.__dict__.update({"__script_if_tracing_wrapper": True, "__original_fn": original})
    torch.compiler.substitute_in_graph(original, skip_signature_check=True)(replacement)
    for key, module in list(sys.modules.items()):  # torchvision's modules import functions from each other
        if key.partition(".")[0] == "torchvision" and vars(module).get(name) is original:
            setattr(module, name, choose)


def _missing(name: str):
    def raise_missing(*args, **kwargs):
        raise NotImplementedError(
            f"torchvision::{name}: torchvision's compiled library cannot load here, and inductor_vision does not have "
            "this operator"
        )

    return raise_missing
