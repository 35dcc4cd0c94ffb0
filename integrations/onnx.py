"""This package's operators as those of ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..ops.registry import OPS

_LARGEST = torch.iinfo(torch.int64).max


def onnx_translation_table() -> dict[Any, Callable[..., Any]]:
    """Return the table that ``torch.onnx.export`` needs to translate this package's operators.

    .. code-block:: python

        table = inductor_vision.onnx_translation_table()
        torch.onnx.export(model, inputs, "model.onnx", dynamo=True, opset_version=19, custom_translation_table=table)

    It translates the operators that ONNX has counterparts for: ``deform_conv2d`` (DeformConv, opset 19), ``roi_align``
    and ``multiscale_roi_align`` (RoiAlign, on each of several maps for all regions), ``nms`` and ``batched_nms``
    (NonMaxSuppression, in float32; classes must be integers, and boxes of different classes are moved apart, which
    rounds them), how detectors resize images (Resize), how Keypoint R-CNN searches its maps (Resize in a Loop), and how
    Mask R-CNN pastes its masks (products with their weights, in float32; where a mask has a NaN, all of its image has).
    The result for invalid boxes depends on the runtime.

    Stock torchvision functions need no table: given a model, ``torch.onnx.export`` exports them as torchvision's own
    operators, whether or not :func:`inductor_vision.accelerate_torchvision` was called. A program that ``torch.export``
    has made after that call contains this package's operators, and needs the table; this is how stock detectors are
    exported.

    Raises:
        ImportError: onnxscript is not installed.
    """
    import onnxscript  # noqa: F401  (here rather than in the exporter, whose errors would not name it)

    translations: dict[str, Callable[..., Any]] = {
        "deform_conv2d": _deform_conv2d,
        "roi_align": _roi_align,
        "nms": _nms,
        "upsample_bilinear2d": _upsample_bilinear2d,
        "heatmaps_to_keypoints": _heatmaps_to_keypoints,
        "paste_masks": _paste_masks,
    }
    return {OPS[name].overload: translation for name, translation in translations.items()}


# Arguments without annotations are taken as they are: values of the ONNX model, lists of these, or constants.


def _deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask):
    from onnxscript import opset19 as op

    _, group_channels, *kernel = weight.shape
    return op.DeformConv(
        input,
        weight,
        offset,
        bias,
        mask,
        strides=stride,
        pads=[*padding, *padding],
        dilations=dilation,
        group=input.shape[1] // group_channels,
        offset_group=offset.shape[1] // (2 * kernel[0] * kernel[1]),
    )


def _roi_align(inputs, rois, levels, spatial_scales, pooled_height, pooled_width, sampling_ratio, aligned):
    from onnxscript import INT64, opset18 as op

    images = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=INT64.dtype)
    boxes = op.CastLike(op.Gather(rois, op.Constant(value_ints=[1, 2, 3, 4]), axis=1), inputs[0])
    out = None
    for level, (input, spatial_scale) in enumerate(zip(inputs, spatial_scales)):
        aligned_on_it = op.RoiAlign(
            input,
            boxes,
            images,
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
            output_height=pooled_height,
            output_width=pooled_width,
            sampling_ratio=max(sampling_ratio, 0),
            spatial_scale=spatial_scale,
        )
        if levels is None:
            return aligned_on_it
        here = op.Equal(levels, op.Constant(value_int=level))
        here = op.Unsqueeze(here, op.Constant(value_ints=[1, 2, 3]))
        # A region on none of the maps stays zero.
        others = op.CastLike(op.Constant(value_float=0.0), input) if out is None else out
        out = op.Where(here, aligned_on_it, others)
    return out


def _upsample_bilinear2d(input, output_size, align_corners, scales_h, scales_w, padding):
    from onnxscript import opset18 as op

    if not (scales_h is scales_w is None):
        raise NotImplementedError(
            "upsample_bilinear2d: scales that are not those of the sizes are not translated to ONNX"
        )
    size = op.Concat(op.Shape(input, start=0, end=2), *_numbers(op, output_size), axis=0)
    mode = "align_corners" if align_corners else "half_pixel"
    resized = op.Resize(input, None, None, size, mode="linear", coordinate_transformation_mode=mode)
    return op.Pad(resized, op.Concat(op.Constant(value_ints=[0] * 6), *_numbers(op, padding), axis=0))


def _paste_masks(masks, boxes, height, width):
    from onnxscript import FLOAT, opset18 as op

    def weights(axis, size, source):  # [N, source, size]
        begin, last = (op.Gather(boxes, op.Constant(value_ints=[side]), axis=1) for side in (axis, axis + 2))
        at = op.Range(op.Constant(value_int=0), op.Squeeze(*_numbers(op, [size])), op.Constant(value_int=1))
        length = op.Max(op.Add(op.Sub(last, begin), op.Constant(value_int=1)), op.Constant(value_int=1))
        scale = op.Div(op.Constant(value_float=float(source)), op.Cast(length, to=FLOAT.dtype))
        half = op.Constant(value_float=0.5)
        place = op.Sub(op.Mul(op.Add(op.Cast(op.Sub(at, begin), to=FLOAT.dtype), half), scale), half)
        place = op.Clip(place, op.Constant(value_float=0.0), op.Constant(value_float=source - 1.0))
        pixel = op.Constant(value_floats=[float(i) for i in range(source)])
        one = op.Constant(value_ints=[1])
        distance = op.Abs(op.Sub(op.Unsqueeze(place, one), op.Unsqueeze(pixel, one)))
        inside = op.Cast(op.And(op.GreaterOrEqual(at, begin), op.LessOrEqual(at, last)), to=FLOAT.dtype)
        weight = op.Max(op.Sub(op.Constant(value_float=1.0), distance), op.Constant(value_float=0.0))
        return op.Mul(weight, op.Unsqueeze(inside, one))

    columns = op.Unsqueeze(weights(0, width, masks.shape[3]), op.Constant(value_ints=[1]))
    rows = op.Unsqueeze(weights(1, height, masks.shape[2]), op.Constant(value_ints=[1]))
    lines = op.MatMul(op.Cast(masks, to=FLOAT.dtype), columns)
    return op.CastLike(op.MatMul(op.Transpose(rows, perm=[0, 1, 3, 2]), lines), masks)


def _numbers(op, numbers):
    """Each as a vector of one."""
    return [
        op.Constant(value_ints=[number])
        if isinstance(number, int)
        else op.Reshape(number, op.Constant(value_ints=[-1]))
        for number in numbers
    ]


def _nms(boxes, scores, classes, iou_threshold):
    from onnxscript import FLOAT, opset18 as op

    boxes, scores = op.Cast(boxes, to=FLOAT.dtype), op.Cast(scores, to=FLOAT.dtype)
    if classes is not None:
        boxes = op.Add(boxes, _moved_apart(op, boxes, classes))
    chosen = op.NonMaxSuppression(
        op.Unsqueeze(boxes, op.Constant(value_ints=[0])),
        op.Unsqueeze(scores, op.Constant(value_ints=[0, 1])),
        op.Constant(value_int=_LARGEST),
        op.Constant(value_float=iou_threshold),
    )  # [M, 3]: image, class, box
    kept = op.Gather(chosen, op.Constant(value_int=2), axis=1)
    missing = op.Sub(op.Shape(boxes, start=0, end=1), op.Shape(kept))
    return op.Concat(kept, op.Expand(op.Constant(value_int=-1), missing), axis=0)


def _moved_apart(op, boxes, classes):
    """The distance, [N, 1], that each box is moved by, so that none meets one of another class."""
    from onnxscript import FLOAT

    zero = op.Constant(value_floats=[0.0])  # there may be no boxes
    coordinates = op.Concat(op.Reshape(boxes, op.Constant(value_ints=[-1])), zero, axis=0)
    extent = op.Sub(op.ReduceMax(coordinates, keepdims=0), op.ReduceMin(coordinates, keepdims=0))
    _, _, number, _ = op.Unique(classes)
    moved = op.Mul(op.Cast(number, to=FLOAT.dtype), op.Add(extent, op.Constant(value_float=1.0)))
    return op.Unsqueeze(moved, op.Constant(value_ints=[1]))


def _heatmaps_to_keypoints(maps, rois):
    from onnxscript import FLOAT, INT64, opset18 as op

    from .onnx_functions import heatmap_peaks

    maps, rois = op.Cast(maps, to=FLOAT.dtype), op.Cast(rois, to=FLOAT.dtype)
    begin, end = op.Split(rois, num_outputs=2, axis=1)  # [K, (x, y)] each
    lengths = op.Max(op.Sub(end, begin), op.Constant(value_float=1.0))
    pixels = op.Ceil(lengths)
    peaks = heatmap_peaks(maps, op.Cast(pixels, to=INT64.dtype))
    place, value = (op.Gather(peaks, op.Constant(value_ints=numbers), axis=2) for numbers in ([0, 1], [2]))
    scale, begin = (op.Unsqueeze(each, op.Constant(value_ints=[1])) for each in (op.Div(lengths, pixels), begin))
    position = op.Mul(op.Add(place, op.Constant(value_float=0.5)), scale)
    return op.Concat(op.Add(position, begin), value, axis=2)
