"""Functions of ONNX, which have what translations that are traced cannot: loops. They need onnxscript."""

# mypy: ignore-errors
# It is no Python but onnxscript, which looks like it: it reads this source, and annotations, which are not postponed.

from onnxscript import FLOAT, INT64, opset18 as op, script


@script(default_opset=op)
def heatmap_peaks(maps: FLOAT[...], pixels: INT64[...]) -> FLOAT[...]:
    """``[K, N, (x, y, value)]``, where maps of ``[K, N, H, W]`` are largest, resized to ``[K, (width, height)]``."""
    channels = op.Shape(maps, start=1, end=2)
    none = op.Concat(op.Constant(value_ints=[0]), channels, op.Constant(value_ints=[3]), axis=0)
    peaks = op.Expand(op.Constant(value_float=0.0), none)
    for k in range(op.Squeeze(op.Shape(maps, start=0, end=1))):
        width, height = op.Split(op.Gather(pixels, k, axis=0), num_outputs=2)
        size = op.Concat(op.Constant(value_ints=[1]), channels, height, width, axis=0)
        map = op.Unsqueeze(op.Gather(maps, k, axis=0), op.Constant(value_ints=[0]))
        resized = op.Resize(map, None, None, size, mode="cubic", coordinate_transformation_mode="half_pixel")
        values = op.Flatten(resized, axis=2)
        first = op.ArgMax(values, axis=1, keepdims=1)
        x, y = op.Cast(op.Mod(first, width), to=FLOAT.dtype), op.Cast(op.Div(first, width), to=FLOAT.dtype)
        value = op.ReduceMax(values, op.Constant(value_ints=[1]), keepdims=1)
        peak = op.Concat(x, y, value, axis=1)
        peaks = op.Concat(peaks, op.Unsqueeze(peak, op.Constant(value_ints=[0])), axis=0)
    return peaks
