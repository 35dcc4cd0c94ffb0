"""Multi-scale deformable attention: https://arxiv.org/abs/2010.04159, https://arxiv.org/abs/2407.17140."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .gradients import Gradient
from .registry import accumulate_dtype, check, define_op, is_proxy, not_scriptable, record_call
from .transforms import as_one_batch

METHODS = ("default", "discrete")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@not_scriptable
def multiscale_deformable_attention(
    value: Tensor,
    value_spatial_shapes: Tensor | Sequence[Sequence[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int] | None = None,
    method: Literal["default", "discrete"] = "default",
) -> Tensor:
    r"""Sum weighted samples of a pyramid of maps, at places of its own for each query and head.

    .. math::
        \text{out}[b, q, hD + d] = \sum_{l, p} \text{weight}[b, q, h, l, p] \cdot
            \text{value}_l[b, \cdot, h, d](y, x)

        x = \text{location}_x[b, q, h, l, p] \cdot W_l - 0.5 \qquad
        y = \text{location}_y[b, q, h, l, p] \cdot H_l - 0.5

    Pixel centres are at integers, and values between them are interpolated bilinearly; pixels outside the map count as
    zero. A sample counts only if :math:`-1 < x < W_l` and :math:`-1 < y < H_l`; NaN does not. The method "discrete" of
    RT-DETRv2 does not interpolate: it reads the pixel at :math:`x + 1` and :math:`y + 1`, truncated toward zero, then
    clamped to the map; there a sample counts unless a coordinate is NaN or infinite, and locations have no gradient.

    Sources: Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection",
    https://arxiv.org/abs/2010.04159; Lv et al., "RT-DETRv2", https://arxiv.org/abs/2407.17140.

    Args:
        value: ``[B, S, H, D]``, S pixels of all levels, one level after the other, row by row; H heads of D channels.
            float32, float64, bfloat16 or float16; the low precisions are computed in float32.
        value_spatial_shapes: height and width of each of the L levels, pairs of numbers or an integer tensor
            ``[L, 2]``. Compiled code reads a tensor when it runs, and is the same for all sizes.
        sampling_locations: ``[B, Q, H, L, P, 2]``, (x, y), 0 and 1 being the borders of the map; or
            ``[B, Q, H, K, 2]``, the K points of all levels, one level after the other. They are float32, bfloat16 or
            float16, or have the dtype of ``value``; float32 beside a low precision is kept, because the low precisions
            cannot represent the pixels of large maps.
        attention_weights: ``[B, Q, H, L, P]``, or ``[B, Q, H, K]``; of any of these dtypes.
        num_points: how many points each level has; None means that all have as many.
        method: "default" or "discrete".

    Returns:
        ``[B, Q, H * D]``, contiguous, in the dtype of ``value``.

    Raises:
        RuntimeError: shapes, dtypes or devices are not compatible, a level has no pixel, or ``method`` is neither of
            the two. The message says what was expected.
    """
    if is_proxy(value, value_spatial_shapes, sampling_locations, attention_weights):
        return record_call(multiscale_deformable_attention, **locals())
    require = functools.partial(check, "multiscale_deformable_attention")
    if isinstance(value_spatial_shapes, Tensor):
        shapes, sizes = value_spatial_shapes, []
        kind = shapes.dtype
        require(not (kind.is_floating_point or kind.is_complex), f"value_spatial_shapes must be integers, got {kind}")
        shapes = shapes.long()
    else:
        shapes, sizes = None, [size for shape in value_spatial_shapes for size in shape]
        # A message is made only where it is raised: Dynamo takes none of sizes that are symbols.
        if not all(len(shape) == 2 for shape in value_spatial_shapes):
            require(False, f"value_spatial_shapes must be pairs of (height, width), got {value_spatial_shapes}")
    levels = len(value_spatial_shapes)
    locations, weights = sampling_locations, attention_weights
    if locations.dim() == 6:
        if weights.dim() != 5 or locations.shape[3] != levels or weights.shape[3:] != locations.shape[3:5]:
            require(
                False,
                f"sampling_locations must be [B, Q, H, {levels}, P, 2] and attention_weights [B, Q, H, {levels}, P], "
                f"or both without levels; got shapes {tuple(locations.shape)} and {tuple(weights.shape)}",
            )
        locations, weights = locations.flatten(3, 4), weights.flatten(3, 4)
    if num_points is None:
        points = int(locations.shape[3]) if locations.dim() == 5 else 0
        if levels == 0 or points % levels != 0:
            require(
                False,
                f"sampling_locations of {points} points must have as many on each of {levels} levels, or num_points "
                "must say how many",
            )
        num_points = [points // levels] * levels
    return _op(value, sizes, shapes, locations, weights, list(num_points), method)


@not_scriptable
class MultiScaleDeformableAttention(nn.Module):
    """Module that calls :func:`multiscale_deformable_attention`; a drop-in for the core that the models of transformers
    have, which makes locations and weights of queries outside of it."""

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor | None,
        value_spatial_shapes_list: Sequence[Sequence[int]] | None,
        level_start_index: Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int | None = None,
    ) -> Tensor:
        """Call :func:`multiscale_deformable_attention`, which describes the arguments.

        Args:
            value_spatial_shapes_list: the shapes as numbers; they are taken if both are given.
            level_start_index, im2col_step: for the CUDA kernel of other packages; nothing here needs them.
        """
        shapes = value_spatial_shapes if value_spatial_shapes_list is None else value_spatial_shapes_list
        if shapes is None:
            raise ValueError(
                "MultiScaleDeformableAttention: value_spatial_shapes or value_spatial_shapes_list must be given"
            )
        return multiscale_deformable_attention(value, shapes, sampling_locations, attention_weights)


class Arguments(NamedTuple):
    """What the operator takes, in its order.

    Attributes:
        sizes: height and width of each level, flattened; empty where there is a tensor.
        shapes: the same as a tensor, int64 ``[L, 2]``.
        locations: ``[B, Q, H, K, 2]``.
        weights: ``[B, Q, H, K]``.
        points: of each level; K in total.
    """

    value: Tensor
    sizes: Sequence[Any]
    shapes: Tensor | None
    locations: Tensor
    weights: Tensor
    points: Sequence[int]
    method: str


def check_arguments(call: Arguments) -> tuple[Any, Any, Any]:
    """Raise RuntimeError unless the arguments are compatible; return the output's shape.

    What a tensor of shapes holds is checked where it is read.
    """
    value, sizes, shapes, locations, weights, points, method = call
    require = functools.partial(check, "multiscale_deformable_attention")

    require(value.dim() == 4, f"value must be [B, S, H, D], got shape {tuple(value.shape)}")
    require(value.dtype in _DTYPES, f"value must be one of {', '.join(map(str, _DTYPES))}, got {value.dtype}")
    for name, tensor in (("sampling_locations", locations), ("attention_weights", weights)):
        require(
            tensor.dtype in (torch.float32, torch.bfloat16, torch.float16, value.dtype),
            f"{name} must be float32, bfloat16 or float16, or have value's dtype {value.dtype}, got {tensor.dtype}",
        )
    for name, other in (("sampling_locations", locations), ("attention_weights", weights), ("shapes", shapes)):
        if other is not None:
            name = "value_spatial_shapes" if other is shapes else name
            require(
                other.device == value.device, f"{name} must be on value's device {value.device}, got {other.device}"
            )
    require(method in METHODS, f"method must be one of {', '.join(METHODS)}; got {method!r}")

    require(len(points) > 0 and min(points) > 0, f"each level must have a point, and there must be one; got {points}")
    if shapes is None:
        levels = [tuple(sizes[i : i + 2]) for i in range(0, len(sizes), 2)]
        require(
            len(levels) == len(points),
            f"value_spatial_shapes must have a (height, width) for each of {len(points)} levels, got {levels}",
        )
        for size in sizes:
            require(size > 0, f"value_spatial_shapes must be positive, got {levels}")
        require(
            value.shape[1] == sum(height * width for height, width in levels),
            f"value must have as many pixels as the levels have, of heights and widths {levels}, got {value.shape[1]}",
        )
    else:
        require(
            tuple(shapes.shape) == (len(points), 2),
            f"value_spatial_shapes must be [{len(points)}, 2], got shape {tuple(shapes.shape)}",
        )
        require(shapes.dtype == torch.int64, f"value_spatial_shapes must be int64, got {shapes.dtype}")

    batch, _, heads, channels = value.shape
    require(
        locations.dim() == 5,
        "sampling_locations must be [B, Q, H, L, P, 2] or [B, Q, H, K, 2] with the K points of all levels, "
        f"got shape {tuple(locations.shape)}",
    )
    queries = locations.shape[1]
    shape = (batch, queries, heads, sum(points))
    for name, tensor, expected in (
        ("sampling_locations", locations, (*shape, 2)),
        ("attention_weights", weights, shape),
    ):
        require(
            tensor.dim() == len(expected) and all(got == want for got, want in zip(tensor.shape, expected)),
            f"{name} must have shape {expected}, the points of all levels together, got {tuple(tensor.shape)}",
        )
    return batch, queries, heads * channels


def _fake(*args: Any) -> Tensor:
    call = Arguments(*args)
    return call.value.new_empty(check_arguments(call))


class _Corner(NamedTuple):
    """A pixel that a sample is interpolated from: where it is among all levels' pixels, its weight, and whether it
    exists; else it is not to be read. ``[B, H, Q, K]`` each."""

    pixel: Tensor
    weight: Tensor
    exists: Tensor


class _Sampling:
    """Where each point samples, and what it finds there.

    Shapes: ``B`` batch, ``S`` pixels of all levels, ``Q`` queries, ``H`` heads of ``D`` channels, ``K`` points.

    Attributes:
        inside: whether a point counts, ``[B, H, Q, K]``.
        size: width and height of the level of each point, ``[K, 2]``.
    """

    def __init__(self, call: Arguments) -> None:
        self.dtype = accumulate_dtype(call.value.dtype)
        self.table = call.value.to(self.dtype).transpose(1, 2)  # [B, H, S, D]
        self.discrete = call.method == "discrete"
        shapes = _shapes(call)  # [L, 2]
        pixels = shapes.prod(1)
        levels = torch.cat([shapes, (pixels.cumsum(0) - pixels)[:, None]], dim=1)  # [L, 3]
        each = torch.cat([level.expand(points, 3) for level, points in zip(levels, call.points)])  # [K, 3]
        self.height, self.width, self.first = each.unbind(1)
        self.size = each[:, :2].flip(1).to(self.dtype)

        place = call.locations.to(self.dtype) * self.size  # [B, Q, H, K, 2]
        x, y = (place + (0.5 if self.discrete else -0.5)).permute(4, 0, 2, 1, 3)  # [B, H, Q, K]
        # NaN fails the test, and the test comes before the conversion to an integer.
        if self.discrete:
            self.inside = x.isfinite() & y.isfinite()
        else:
            self.inside = (x > -1) & (y > -1) & (x < self.size[:, 0]) & (y < self.size[:, 1])
        self.x, self.y = x.where(self.inside, 0), y.where(self.inside, 0)

    def corners(self) -> Iterator[_Corner]:
        """The pixel of each point, or the four around it, row by row."""
        if self.discrete:
            x, y = (torch.minimum(at.clamp(min=0), size - 1) for at, size in zip((self.x, self.y), self.size.unbind(1)))
            # As integers too: beside a side above 2^24, a float may be rounded up to it.
            column, row = torch.minimum(x.long(), self.width - 1), torch.minimum(y.long(), self.height - 1)
            yield _Corner(self._index(column, row), torch.ones_like(x), self.inside)
            return
        left, top = self.x.floor().long(), self.y.floor().long()
        fraction_y, fraction_x = self.fractions()
        for row, weight_y in ((top, 1 - fraction_y), (top + 1, fraction_y)):
            for column, weight_x in ((left, 1 - fraction_x), (left + 1, fraction_x)):
                exists = self.inside & (row >= 0) & (row < self.height) & (column >= 0) & (column < self.width)
                yield _Corner(self._index(column, row).where(exists, 0), weight_y * weight_x, exists)

    def fractions(self) -> tuple[Tensor, Tensor]:
        """How far points are below and to the right of their first corner."""
        return self.y - self.y.floor(), self.x - self.x.floor()

    def _index(self, column: Tensor, row: Tensor) -> Tensor:
        return self.first + row * self.width + column

    def read(self, corner: _Corner) -> Tensor:
        """What is at a corner, zero if it does not exist (never 0 * value: that would keep NaN). [B, H, Q, K, D]"""
        return (
            self.table.gather(2, self._expanded(corner)).reshape(self._shape(corner)).where(corner.exists[..., None], 0)
        )

    def samples(self) -> Tensor:
        """What is at each point. [B, H, Q, K, D]"""
        return sum(corner.weight[..., None] * self.read(corner) for corner in self.corners())  # type: ignore[return-value]  # there is a corner

    def spread(self, samples: Tensor) -> Tensor:
        """The gradient of all pixels, ``[B, S, H, D]``, from that of samples, ``[B, H, Q, K, D]``."""
        table = torch.zeros_like(self.table, memory_format=torch.contiguous_format)
        for corner in self.corners():
            share = (corner.weight[..., None] * samples).where(corner.exists[..., None], 0)
            table = table.scatter_add(2, self._expanded(corner), share.flatten(2, 3))
        return table.transpose(1, 2)

    def _shape(self, corner: _Corner) -> tuple[Any, ...]:
        return (*corner.pixel.shape, self.table.shape[3])

    def _expanded(self, corner: _Corner) -> Tensor:
        """The index of a corner for each channel. [B, H, Q * K, D]"""
        return corner.pixel[..., None].expand(self._shape(corner)).flatten(2, 3)


def _shapes(call: Arguments) -> Tensor:
    """Height and width of each level, int64 ``[L, 2]``.

    Raises:
        RuntimeError: they come as a tensor, and are not those of ``value``.
    """
    if call.shapes is None:
        device = call.value.device
        # Not torch.tensor, which would make constants of sizes that are symbolic.
        sizes = [torch.full((1,), size, dtype=torch.int64, device=device) for size in call.sizes]
        return torch.cat(sizes).reshape(-1, 2)
    pixels = call.value.shape[1]
    each = (call.shapes > 0) & (call.shapes <= pixels)  # or a product could overflow
    fits = each.all() & (call.shapes.where(each, 0).prod(1).sum() == pixels)
    message = "value_spatial_shapes must be positive, and have as many pixels as value"
    torch._assert_async(fits, f"multiscale_deformable_attention: {message}")
    return call.shapes.where(fits, 1)  # a GPU may read before it finds out


def _decomposition(*args: Any) -> Tensor:
    call = Arguments(*args)
    shape = check_arguments(call)
    sampling = _Sampling(call)
    weights = call.weights.to(sampling.dtype).transpose(1, 2)  # [B, H, Q, K]
    weights = weights.where(sampling.inside, 0)
    out = (weights[..., None] * sampling.samples()).sum(3)  # [B, H, Q, D]
    return out.transpose(1, 2).reshape(shape).to(call.value.dtype).contiguous()


def _check_backward(op: str, grad: Tensor, **arguments: Any) -> None:
    call = Arguments(**arguments)
    shape = check_arguments(call)
    check(
        op,
        grad.dim() == 3 and all(got == want for got, want in zip(grad.shape, shape)),
        f"grad must have shape {shape}, got {tuple(grad.shape)}",
    )
    check(op, grad.dtype == call.value.dtype, f"grad must have value's dtype {call.value.dtype}, got {grad.dtype}")
    check(op, grad.device == call.value.device, f"grad must be on {call.value.device}, got {grad.device}")


def _backward(grad: Tensor, *args: Any, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of value, locations and weights.

    At the kinks of the interpolation, integer coordinates, the derivative by the location is the one to the right.
    """
    call = Arguments(*args)
    sampling = _Sampling(call)
    _, _, heads, channels = call.value.shape
    grad = grad.to(sampling.dtype).unflatten(2, (heads, channels)).transpose(1, 2)[:, :, :, None]  # [B, H, Q, 1, D]
    weights = call.weights.to(sampling.dtype).transpose(1, 2)  # [B, H, Q, K]
    weights = weights.where(sampling.inside, 0)
    results: list[Tensor | None] = [None] * 3
    if wanted[0]:
        results[0] = sampling.spread(weights[..., None] * grad)
    if wanted[1] and sampling.discrete:
        results[1] = torch.zeros_like(call.locations)
    elif wanted[1]:
        v00, v01, v10, v11 = map(sampling.read, sampling.corners())
        fraction_y, fraction_x = (fraction[..., None] for fraction in sampling.fractions())
        slope_x = (1 - fraction_y) * (v01 - v00) + fraction_y * (v11 - v10)
        slope_y = (1 - fraction_x) * (v10 - v00) + fraction_x * (v11 - v01)
        slopes = [weights * (grad * slope).sum(4) for slope in (slope_x, slope_y)]  # [B, H, Q, K]
        results[1] = (torch.stack(slopes, dim=-1) * sampling.size).transpose(1, 2)  # [B, Q, H, K, 2]
    if wanted[2]:
        results[2] = (grad * sampling.samples()).sum(4).transpose(1, 2)  # [B, Q, H, K]
    return results


def _contiguous(gradient: Tensor, tensor: Tensor) -> Tensor:
    return gradient.contiguous()  # values and weights are no images, even if sizes and strides would do for it


_op = define_op(
    "multiscale_deformable_attention(Tensor value, SymInt[] sizes, Tensor? shapes, Tensor locations, Tensor weights, "
    "int[] points, str method) -> Tensor",
    decomposition=_decomposition,
    fake=_fake,
    gradient=Gradient(_backward, of="value, locations, weights", check=_check_backward, arrange=_contiguous),
    autocast=False,  # it computes in float32 as it is, and takes dtypes that differ
    fold=as_one_batch("value", "locations", "weights"),
)
