"""Stock torchvision models on this package's operators."""

from __future__ import annotations

import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..lowering.installation import installer
from ..lowering.workarounds.tracing import install_for_tracing
from ..ops import heatmaps_to_keypoints, torchvision_detection  # noqa: F401  (declare what they replace)
from ..ops.boxes import check_scored_boxes
from ..ops.registry import TORCHVISION, TORCHVISION_PYTHON
from .exchange import Library, always, in_compiled_code, logger

_TORCHVISION = Library("torchvision", "0.28")

# The operators of its compiled library, as it declares them.
_SCHEMAS = (
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
    "_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor",
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

_stand_ins: torch.library.Library | None = None  # holds the definitions alive


def accelerate_torchvision() -> None:
    """Make stock torchvision models use this package's operators wherever they are compiled.

    After this call ``torch.compile``, ``torch.export`` and AOTInductor compile ``torch.ops.torchvision.*`` to this
    package's kernels, forward and backward. Eager mode keeps torchvision's own kernels. Where torchvision's Python code
    breaks a graph or depends on data (the levels of ``MultiScaleRoIAlign``), compiled code runs an equivalent instead,
    no matter who holds the function or how early it was imported. Call it before compiling; calling it again does
    nothing. Code made by ``torch.jit.script`` and models made by ``torch.onnx.export`` keep torchvision's operators.

    If torchvision's compiled library cannot load (a CUDA wheel beside a CPU-only torch: ``import torchvision`` fails
    with "operator torchvision::nms does not exist"), this call defines its operators, so that torchvision imports and
    runs. Those that this package has run their decompositions in eager mode; the others raise NotImplementedError when
    they are called.

    Operators and functions that the installed torchvision declares differently from the version that this package is
    tested with are left as they are, with a warning.

    Raises:
        ImportError: torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise ImportError("torchvision is not installed: pip install inductor_vision[torchvision]")
    if _stand_ins is None and not _compiled_library_loads():
        _define_operators()
    for function, replacement in TORCHVISION_PYTHON.items():
        _exchange(function, replacement, in_compiled_code)
    _exchange("_meta_registrations.meta_nms", _fake_nms, always)
    install_for_tracing()
    installer.hide_long_sizes("accelerate_torchvision")
    schemas = {schema.partition("(")[0]: torch._C.parse_schema(f"torchvision::{schema}") for schema in _SCHEMAS}
    installer.accelerate_torchvision(
        [name for name in TORCHVISION if _TORCHVISION.is_as_tested(name, _declared_schema(name), schemas[name])]
    )


def _declared_schema(name: str) -> torch._C.FunctionSchema | None:
    operator = getattr(torch.ops.torchvision, name, None)
    return None if operator is None or "default" not in operator.overloads() else operator.default._schema


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

    # Its wrappers ask for it, scripted ones too, and where it is not so roi_align is a Python function of other values.
    # All of its modules have this very function.
    torchvision.extension._has_ops.__code__ = _has_ops.__code__
    logger.info("torchvision's compiled library does not load; its operators are defined by inductor_vision")


def _has_ops():
    return True


def _exchange(path: str, replacement: Callable[..., Any], choose: Callable[..., Callable[..., Any]]) -> None:
    try:
        owner = pkgutil.resolve_name(f"torchvision.{path}".rpartition(".")[0])
    except (ImportError, AttributeError) as error:
        _TORCHVISION.is_as_tested(path, error, "a function")
        return
    _TORCHVISION.exchange(path, owner, replacement, choose)


def _fake_nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """torchvision's says that at least two boxes are kept, and programs that call its operator stop where fewer are."""
    check_scored_boxes("nms", dets, scores, None)
    return dets.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _missing(name: str):
    def raise_missing(*args, **kwargs):
        raise NotImplementedError(
            f"torchvision::{name}: torchvision's compiled library cannot load here, and inductor_vision does not have "
            "this operator"
        )

    return raise_missing
