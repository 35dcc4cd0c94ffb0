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
from torch import Tensor

from ..lowering.installation import installer
from ..lowering.workarounds.tracing import install_for_tracing
from ..ops import heatmaps_to_keypoints, torchvision_detection  # noqa: F401  (declare what they replace)
from ..ops.boxes import check_scored_boxes
from ..ops.registry import TORCHVISION, TORCHVISION_PYTHON
from ..version import __version__

logger = logging.getLogger("inductor_vision")

TESTED = "torchvision 0.28"

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
        _exchange(function, replacement, _in_compiled_code)
    _exchange("_meta_registrations.meta_nms", _fake_nms, _always)
    install_for_tracing()
    schemas = {schema.partition("(")[0]: torch._C.parse_schema(f"torchvision::{schema}") for schema in _SCHEMAS}
    installer.accelerate_torchvision(
        [name for name in TORCHVISION if _is_as_tested(name, _declared_schema(name), schemas[name])]
    )


def _declared_schema(name: str) -> torch._C.FunctionSchema | None:
    operator = getattr(torch.ops.torchvision, name, None)
    return None if operator is None or "default" not in operator.overloads() else operator.default._schema


def _is_as_tested(name: str, found: object, expected: object) -> bool:
    """Whether torchvision declares something as this package knows it; if not, a warning says so."""
    if str(found) == str(expected):
        return True
    version = getattr(sys.modules.get("torchvision"), "__version__", "of unknown version")
    logger.warning(
        "torchvision's %s is left as it is: expected %s, got %s (this is torchvision %s; %s)",
        *(name, expected, found, version, f"inductor_vision {__version__} is tested with {TESTED}"),
    )
    return False


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
    """Have a function of torchvision's, or a method of one of its classes, run what is chosen at each call.

    What is exchanged is the function's code, not the name of the function in a module: who has imported the function
    before, or keeps it in a class, a closure, a default argument or a partial, has the very same object, so that
    there is nobody whom this does not reach. ``__wrapped__`` is the function as it was, which is where its signature
    and the source that torch.jit.script compiles are looked up.

    Args:
        choose: from the replacement and the function as it was, what runs.
    """
    owner_path, _, name = f"torchvision.{path}".rpartition(".")
    try:
        owner = pkgutil.resolve_name(owner_path)
        function: Any = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        _is_as_tested(path, error, "a function")
        return
    if not isinstance(function, types.FunctionType) or function.__closure__:
        _is_as_tested(path, function, "a function that is not decorated")
        return
    chosen = f"_inductor_vision_{function.__qualname__.replace('.', '_')}"  # in the function's module
    if chosen in function.__globals__:
        return
    first = 1 if inspect.isclass(owner) else 0  # `self` has other names here
    found, expected = (list(inspect.signature(of).parameters)[first:] for of in (function, replacement))
    if not _is_as_tested(path, found, expected):
        return
    stock: Any = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    functools.update_wrapper(stock, function, updated=())
    del stock.__wrapped__
    stock.__kwdefaults__ = function.__kwdefaults__
    function.__globals__[chosen] = functools.partial(choose, replacement, stock)
    function.__code__ = _run_chosen.__code__.replace(co_name=function.__name__, co_names=(chosen,))
    function.__defaults__ = function.__kwdefaults__ = None  # those of what runs count
    function.__wrapped__ = stock  # type: ignore[attr-defined]  # functions take any attribute


def _run_chosen(*args: Any, **kwargs: Any) -> Any:
    return _CHOOSE()(*args, **kwargs)  # type: ignore[name-defined]  # noqa: F821 (a copy of this code names it)


def _in_compiled_code(replacement: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    # Programs for ONNX have no use for this package's operators, and its exporter does not know them.
    for_inductor = torch.compiler.is_compiling() and not torch.onnx.is_in_onnx_export()
    return replacement if for_inductor else stock


def _always(replacement: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    return replacement


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
