"""Regions of interest, as all operators on them take and read them.

Sizes: ``K`` regions, ``B`` images of ``C`` channels and ``H`` x ``W`` pixels, ``PH`` x ``PW`` bins in each region. A
region is a row (image, x1, y1, x2, y2) of a ``[K, 5]`` tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._pytree import tree_leaves, tree_map

from .boxes import rounded_quotient
from .registry import accumulate_dtype, check, pair
from .transforms import flattened, of_all_calls, unflattened

_FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Beside input's own. Under autocast boxes may be of a lower precision than the map.
_BOX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Pixels from the origin beyond which a rounded coordinate counts as this one.
_FARTHEST = 2.0**30


def regions_of(op: str, boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """``[K, 5]`` regions from what users give: the same, or a list of ``[L, 4]`` boxes for each image.

    Raises:
        AssertionError: neither of the two, as in torchvision.
        ValueError: an empty list.
    """
    if isinstance(boxes, Tensor):
        if boxes.dim() != 2 or boxes.size(1) != 5:
            raise AssertionError(
                f"{op}: boxes as one tensor must be [K, 5], rows of (image, x1, y1, x2, y2); got {tuple(boxes.shape)}"
            )
        return boxes
    if not isinstance(boxes, (list, tuple)) or not all(isinstance(box, Tensor) for box in boxes):
        raise AssertionError(
            f"{op}: boxes must be a [K, 5] tensor or a list of [L, 4] tensors, got {type(boxes).__name__}"
        )
    if not boxes:
        raise ValueError(f"{op}: boxes must be a [K, 5] tensor or a list with a [L, 4] tensor for each image, got []")
    for i, box in enumerate(boxes):
        if box.dim() != 2 or box.size(1) != 4:
            raise AssertionError(f"{op}: boxes[{i}] must be [L, 4], rows of (x1, y1, x2, y2); got {tuple(box.shape)}")
    # Dynamo cannot ask torchvision's tv_tensors for shape and dtype; what is made of them is a tensor.
    joined = torch.cat(list(boxes))
    joined = joined.to(accumulate_dtype(joined.dtype))  # the low precisions cannot count images
    images = [torch.full_like(box[:, :1], i, dtype=joined.dtype) for i, box in enumerate(boxes)]
    return torch.cat([torch.cat(images), joined], dim=1)


def bins_of(op: str, output_size: int | Sequence[int]) -> tuple[int, int]:
    """PH and PW from what users give.

    Raises:
        ValueError: neither one number nor two.
    """
    bins = pair("output_size", output_size)
    if len(bins) != 2:
        raise ValueError(f"{op}: output_size must be a number or a pair, got {bins}")
    return bins


class MapSize(NamedTuple):
    """The shape of a batch of feature maps."""

    batch: Any
    channels: int
    height: Any
    width: Any


def check_regions(op: str, inputs: Sequence[Tensor], rois: Tensor, bins: Sequence[int]) -> MapSize:
    """Raise RuntimeError unless the arguments that all operators on regions share are compatible.

    Returns:
        The size of the first of ``inputs``.
    """
    input = inputs[0]
    for name, tensor in zip(input_names(inputs), inputs):
        check(op, tensor.dim() == 4, f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
        check(
            op,
            tensor.dtype in _FLOAT_DTYPES,
            f"{name} must be one of {', '.join(map(str, _FLOAT_DTYPES))}, got {tensor.dtype}",
        )
        check(
            op,
            tensor.shape[2] > 0 and tensor.shape[3] > 0,
            f"{name} must have a positive height and width, got shape {tuple(tensor.shape)}",
        )
        for what, got, expected in (
            ("dtype", tensor.dtype, input.dtype),
            ("device", tensor.device, input.device),
            ("batch", tensor.shape[0], input.shape[0]),
            ("number of channels", tensor.shape[1], input.shape[1]),
        ):
            check(op, got == expected, f"{name} must have the {what} of the first map, {expected}, got {got}")
    check_rois(op, rois, input)
    check(op, bins[0] > 0 and bins[1] > 0, f"output_size must be positive, got {tuple(bins)}")
    return MapSize(input.shape[0], int(input.shape[1]), *input.shape[2:])


def check_position_sensitive(op: str, input: Tensor, rois: Tensor, bins: Sequence[int]) -> tuple[Any, ...]:
    """Call :func:`check_regions` for operators whose bins have their own channels; return the shape of the result."""
    height, width = bins
    size = check_regions(op, [input], rois, bins)
    check(
        op,
        size.channels % (height * width) == 0,
        f"input must have a multiple of {height} * {width} channels, got {size.channels}",
    )
    return rois.shape[0], size.channels // (height * width), height, width


def channel_mapping(out: Tensor) -> Tensor:
    """The input channel that each element of a position-sensitive result is made from, int32 as in torchvision."""
    channels = torch.arange(math.prod(out.shape[1:]), dtype=torch.int32, device=out.device)
    return channels.reshape(out.shape[1:]).expand_as(out).clone()


def check_rois(op: str, rois: Tensor, like: Tensor) -> None:
    """Raise RuntimeError unless they are regions for maps, or gradients, like this."""
    check(op, rois.dim() == 2 and rois.shape[1] == 5, f"boxes must be [K, 5], got shape {tuple(rois.shape)}")
    check(
        op,
        rois.dtype in (*_BOX_DTYPES, like.dtype),
        f"boxes must be float32, bfloat16 or float16, or have input's dtype {like.dtype}, got {rois.dtype}",
    )
    check(op, rois.device == like.device, f"boxes must be on input's device {like.device}, got {rois.device}")


def check_grad(op: str, grad: Tensor, rois: Tensor, size: Sequence[int], **others: Any) -> None:
    """Raise RuntimeError unless this can be the gradient of a result for maps of that size."""
    check(
        op,
        grad.dim() == 4 and grad.shape[0] == rois.shape[0],
        f"grad must be [K, channels, PH, PW] with K = {rois.shape[0]}, got shape {tuple(grad.shape)}",
    )
    check(
        op,
        len(size) == 4 and size[2] > 0 and size[3] > 0,  # min() would compare them with each other: a guard
        f"the size of input must be [B, C, H, W], got {tuple(size)}",
    )
    check_rois(op, rois, grad)


def input_names(inputs: Sequence[Tensor]) -> list[str]:
    """Their names in messages."""
    return ["input"] if len(inputs) == 1 else [f"features[{i}]" for i in range(len(inputs))]


def empty_regions(like: Tensor, shape: Sequence[Any]) -> Tensor:
    """An uninitialized result of this shape, in the dtype, on the device and in the memory format of a tensor."""
    return like.new_empty(shape).contiguous(memory_format=suggest_memory_format(like))


def images_of(op: str, rois: Tensor, batch: Any) -> Tensor:
    """The image of each region, int64 ``[K]``.

    Raises:
        RuntimeError: there is no such image.
    """
    image = rois[:, 0].double()
    exists = (image > -1) & (image.trunc() < batch)  # NaN fails
    torch._assert_async(exists.all(), f"{op}: boxes name an image that does not exist")
    return image.where(exists, 0).long()  # a GPU may read before it finds out


def on_all_images(op: Any, count: int, args: Mapping[str, Any], differ: Mapping[str, bool]) -> Any:
    """How :func:`torch.vmap` computes calls of an operator on regions as one: all of their regions on all their images.

    An operator takes maps first, and regions; its gradient the size of a map, which is that of its result.
    """
    first, *_ = args
    maps = None if op.gradient_of else first
    folded = {
        name: flattened(arg, differ[name], count) if isinstance(arg, Tensor) and name != maps else arg
        for name, arg in args.items()
    }
    if maps is None:
        folded["size"] = of_all_calls(args["size"], count)
        folded["rois"] = _on_images_of_calls(folded["rois"], count, args["size"][0])
    elif differ[maps]:
        folded[maps] = tree_map(lambda map: map.flatten(0, 1), args[maps])
        folded["rois"] = _on_images_of_calls(folded["rois"], count, tree_leaves(args[maps])[0].shape[1])
    return tree_map(lambda result: unflattened(result, count), op(*folded.values()))


def _on_images_of_calls(rois: Tensor, count: int, batch: Any) -> Tensor:
    """Regions of one call after the other, on images of one call after the other."""
    rois = unflattened(
        rois.to(accumulate_dtype(rois.dtype)), count
    )  # [V, K, 5]; the low precisions cannot count images
    image, box = rois.split((1, 4), dim=2)
    exists = (image > -1) & (image.trunc() < batch)
    first = torch.arange(count, device=rois.device)[:, None, None] * batch
    return torch.cat([(image.trunc() + first).where(exists, -1), box], dim=2).flatten(0, 1)


class Pixels:
    """The pixels that bins read, as rows of a table: a row holds what one pixel has for one bin, in all channels.

    Where the operator is position-sensitive each bin has channels of its own: input channel ``(c * PH + ph) * PW + pw``
    belongs to bin (ph, pw).
    """

    def __init__(self, image: Tensor, size: MapSize, bins: Sequence[int], position_sensitive: bool = False) -> None:
        """
        Args:
            image: of each region, ``[K]``.
            size: of the maps.
            bins: ``(PH, PW)``.
        """
        self.image = image[:, None, None]  # [K, 1, 1]
        self.size = size
        self.split = tuple(bins) if position_sensitive else (1, 1)
        self.rows = torch.arange(self.split[0], device=image.device)[:, None]
        self.columns = torch.arange(self.split[1], device=image.device)

    def table(self, input: Tensor) -> Tensor:
        """``[B * H * W * (bins that have channels of their own), channels of a bin]``"""
        batch, channels, height, width = self.size
        of_a_bin = channels // (self.split[0] * self.split[1])
        split = input.reshape(batch, of_a_bin, *self.split, height, width)
        return split.permute(0, 4, 5, 2, 3, 1).flatten(0, 4)

    def index(self, y: Tensor, x: Tensor) -> Tensor:
        """The row of pixel (y, x), for y of ``[K, PH, 1]`` and x of ``[K, 1, PW]``: ``[K, PH, PW]``"""
        pixel = (self.image * self.size.height + y) * self.size.width + x
        return (pixel * self.split[0] + self.rows) * self.split[1] + self.columns

    def read(self, table: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """``[K, PH, PW, channels of a bin]``"""
        index = self.index(y, x)
        return table.index_select(0, index.flatten()).view(*index.shape, table.shape[1])

    def add(self, table: Tensor, y: Tensor, x: Tensor, values: Tensor) -> Tensor:
        """The table with ``values`` of ``[K, PH, PW, channels of a bin]`` added to the pixels."""
        return table.index_add(0, self.index(y, x).flatten(), values.flatten(0, 2))

    def untable(self, table: Tensor) -> Tensor:
        """The reverse of :meth:`table`: ``[B, C, H, W]``"""
        batch, channels, height, width = self.size
        split = table.reshape(batch, height, width, *self.split, table.shape[1])
        return split.permute(0, 5, 3, 4, 1, 2).reshape(batch, channels, height, width)

    # What operators do with the pixels of their bins, in loops over these. Of ``input`` they take maps, of ``grad``
    # gradients ``[K, channels of a bin, PH, PW]``, of any dtype, and compute in that of the boxes.

    def mean_of_samples(
        self,
        input: Tensor,
        y: SampledAxis,
        x: SampledAxis,
        count: Tensor,
        here: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The sum over the samples of each bin divided by ``count``, ``[K]``: ``[K, channels of a bin, PH, PW]``.

        Args:
            here: ``[K]``, which regions are meant; none means all.
            out: what is returned of the others.
        """
        table = self.table(input.to(count.dtype))
        total = table.new_zeros(*count.shape, y.bins, x.bins, table.shape[1])  # [K, PH, PW, C]
        for row, column, weight, inside in bilinear_samples(y, x):
            total = total + (weight * self.read(table, row, column)).where(inside, 0)
        mean = channels_first(total / _each(count))
        return mean if here is None or out is None else mean.where(_each(here), out)

    def spread_to_samples(
        self, grad: Tensor, y: SampledAxis, x: SampledAxis, count: Tensor, here: Tensor | None = None
    ) -> Tensor:
        """The gradient ``[B, C, H, W]`` of what :meth:`mean_of_samples` takes, by the regions that are meant."""
        share = channels_last(grad.to(count.dtype)) / _each(count)  # [K, PH, PW, C]
        table = self.table(count.new_zeros(self.size)).contiguous()
        for row, column, weight, inside in bilinear_samples(y, x):
            counts = inside if here is None else inside & _each(here)
            table = self.add(table, row, column, (weight * share).where(counts, 0))
        return self.untable(table)

    def mean_of_pixels(self, input: Tensor, y: PooledAxis, x: PooledAxis, area: Tensor) -> Tensor:
        """The sum over the pixels of each bin divided by ``area``, ``[K, PH, PW]``.

        Returns:
            ``[K, channels of a bin, PH, PW]``
        """
        table = self.table(input.to(area.dtype))
        total = table.new_zeros(*area.shape, table.shape[1])  # [K, PH, PW, C]
        for row, column, inside in pooled_pixels(y, x):
            total = total + self.read(table, row, column).where(inside, 0)
        return channels_first(total / area[..., None])

    def spread_to_pixels(self, grad: Tensor, y: PooledAxis, x: PooledAxis, area: Tensor) -> Tensor:
        """The gradient ``[B, C, H, W]`` of what :meth:`mean_of_pixels` takes."""
        share = channels_last(grad.to(area.dtype)) / area[..., None]  # [K, PH, PW, C]
        table = self.table(area.new_zeros(self.size)).contiguous()
        for row, column, inside in pooled_pixels(y, x):
            table = self.add(table, row, column, share.where(inside, 0))
        return self.untable(table)

    def maximum_of_pixels(
        self, input: Tensor, y: PooledAxis, x: PooledAxis, lowest: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The first maximum of the pixels of each bin, and where in its plane it is, int32, row by row.

        Where none is greater than ``lowest`` it is that, and -1; in a bin without pixels 0 and -1. ``dtype`` has room
        for ``lowest``; it is not that of the result.

        Returns:
            ``[K, C, PH, PW]`` each.
        """
        table = self.table(input.to(dtype))
        empty = ((y.size == 0)[:, :, None] | (x.size == 0)[:, None, :])[..., None]  # [K, PH, PW, 1]
        best = table.new_full((*empty.shape[:3], table.shape[1]), lowest).where(~empty, 0)  # [K, PH, PW, C]
        argmax = torch.full_like(best, -1, dtype=torch.int32)
        for row, column, inside in pooled_pixels(y, x):
            value = self.read(table, row, column)
            greater = inside & (value > best)
            best = value.where(greater, best)
            argmax = (row * self.size.width + column)[..., None].int().where(greater, argmax)
        return channels_first(best).to(input.dtype), channels_first(argmax)


def _each(values: Tensor) -> Tensor:
    """Expand a value for each region, ``[K]``, to everything that the region has: ``[K, 1, 1, 1]``."""
    return values[:, None, None, None]


def channels_first(values: Tensor) -> Tensor:
    """``[K, C, PH, PW]`` from ``[K, PH, PW, C]``."""
    return values.permute(0, 3, 1, 2)


def channels_last(values: Tensor) -> Tensor:
    """``[K, PH, PW, C]`` from ``[K, C, PH, PW]``."""
    return values.permute(0, 2, 3, 1)


class SampledAxis:
    """Where the bins of regions sample one axis of a map, for roi_align and ps_roi_align.

    ``count`` points are spread evenly over each bin. A point outside [-1, length] counts as zero; from one inside, but
    beyond the outermost pixel centre, the outermost pixel is read.

    Attributes:
        first: where bins begin, ``[K, bins]``.
        bin_size: their length, ``[K]``.
        count: points of a bin, float ``[K]``; it can be zero or less.
        skipped: how many points of a bin are not looked at because they are before the map, float ``[K, bins]``.
        needed: how many are, from there on, float ``[K, bins]``.
    """

    def __init__(self, begin: Tensor, size: Tensor, bins: int, sampling_ratio: int, length: Any) -> None:
        """
        Args:
            begin: where regions begin, ``[K]``, in pixels of the map.
            size: how long they are, ``[K]``.
            bins: bins of a region.
            sampling_ratio: points of a bin; if it is not positive, as many as the bin is long in pixels, rounded up.
            length: of the axis.
        """
        self.length, self.bins, self.sampling_ratio = length, bins, sampling_ratio
        self.bin_size = rounded_quotient(size, bins)
        self.first = begin[:, None] + torch.arange(bins, device=begin.device) * self.bin_size[:, None]  # [K, bins]
        if sampling_ratio > 0:
            self.count = torch.full_like(size, sampling_ratio)
            self.skipped, self.needed = torch.zeros_like(self.first), torch.full_like(self.first, sampling_ratio)
        else:
            # Points before the map are skipped, and those behind it never reached, however large a region is.
            self.count = self.bin_size.ceil()
            spacing = (self.bin_size / self.count)[:, None]  # at most 1 where there are points
            self.skipped = ((-1 - self.first) / spacing - 1).floor().nan_to_num(0).clamp(min=0)
            behind = ((length - self.first) / spacing + 1).ceil().nan_to_num(0)
            needed = torch.minimum(behind, self.count[:, None]) - self.skipped
            self.needed = needed.nan_to_num(0).clamp(min=0)

    @property
    def steps(self) -> int:
        """How many times :meth:`sample` is to be called for all points, which depends on data where they are as many as
        a bin is long."""
        if self.sampling_ratio > 0:
            return self.sampling_ratio
        return 0 if self.needed.numel() == 0 else int(self.needed.max())

    def sample(self, step: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """One point of each bin: whether it counts, and the two pixels that it lies between with their weights."""
        i = self.skipped + step
        point = self.first + (i + 0.5) * self.bin_size[:, None] / self.count[:, None]
        inside = (point >= -1) & (point <= self.length) & (i < self.count[:, None])  # NaN fails
        point = point.where(inside, 0).clamp(min=0)
        low = point.long().clamp(0, self.length - 1)
        high = (low + 1).clamp(max=self.length - 1)
        fraction = (point - low).where(low < self.length - 1, 0)
        return inside, [low, high], [1 - fraction, fraction]


def bilinear_samples(y: SampledAxis, x: SampledAxis):
    """For each sample of the bins and each of its four corners: row, column and weight.

    Rows are ``[K, PH, 1]``, columns ``[K, 1, PW]``, weights ``[K, PH, PW, 1]``. The last says, in the shape of the
    weights, which samples count: what is read for the others is not to be multiplied by zero but left out.
    """
    for iy in range(y.steps):
        inside_y, rows, weights_y = y.sample(iy)
        for ix in range(x.steps):
            inside_x, columns, weights_x = x.sample(ix)
            inside = (inside_y[:, :, None] & inside_x[:, None, :])[..., None]  # [K, PH, PW, 1]
            for i in (0, 1):
                for j in (0, 1):
                    weight = (weights_y[i][:, :, None] * weights_x[j][:, None, :])[..., None]
                    yield rows[i][:, :, None], columns[j][:, None, :], weight, inside


def adaptive_grid(sampling_ratio: int, **others: Any) -> str | None:
    """Why a decomposition that samples cannot be traced, if it cannot."""
    return None if sampling_ratio > 0 else "how many samples an adaptive grid has depends on the values of the boxes"


class PooledAxis:
    """Which pixels of one axis bins cover, for roi_pool and ps_roi_pool: ``[begin, end)``, int64 ``[K, bins]``.

    A region with a coordinate that is NaN or infinite covers none.

    Attributes:
        begin: the first pixel of a bin, int64 ``[K, bins]``.
        size: how many pixels a bin covers, int64 ``[K, bins]``.
    """

    def __init__(self, begin: Tensor, end: Tensor, bins: int, inclusive: bool, limit: Any) -> None:
        """
        Args:
            begin, end: of regions, ``[K]``, in pixels of the map; they are rounded here.
            bins: bins of a region.
            inclusive: whether the pixel at ``end`` belongs to the region.
            limit: where bins are cut off.
        """
        finite = (begin.isfinite() & end.isfinite())[:, None]
        begin, end = _round(begin), _round(end)
        size = (end - begin + inclusive).clamp(min=1).to(begin.dtype)
        edges = torch.arange(bins + 1, device=begin.device) * rounded_quotient(size, bins)[:, None]  # [K, bins + 1]
        start = begin[:, None].long()
        self.begin = (edges[:, :-1].floor().long() + start).clamp(0, limit)
        end = (edges[:, 1:].ceil().long() + start).clamp(0, limit).where(finite, self.begin)
        self.size = (end - self.begin).clamp(min=0)

    @property
    def steps(self) -> int:
        """How many pixels the longest bin covers."""
        return 0 if self.size.numel() == 0 else int(self.size.max())

    def pixel(self, step: int) -> tuple[Tensor, Tensor]:
        """One pixel of each bin: whether there is one, and where."""
        inside = step < self.size
        return inside, (self.begin + step).where(inside, 0)


def _round(coordinate: Tensor) -> Tensor:
    """Round to the nearest integer, halves away from zero as in C; torch.round takes them to the even one."""
    coordinate = coordinate.nan_to_num(0).clamp(-_FARTHEST, _FARTHEST)
    whole = coordinate.trunc()
    return whole + coordinate.sign() * ((coordinate - whole).abs() >= 0.5)


def pooled_pixels(y: PooledAxis, x: PooledAxis):
    """For each pixel of the bins, row by row: its row ``[K, PH, 1]``, its column ``[K, 1, PW]``, and whether the bin
    has it ``[K, PH, PW, 1]``."""
    for iy in range(y.steps):
        inside_y, row = y.pixel(iy)
        for ix in range(x.steps):
            inside_x, column = x.pixel(ix)
            yield row[:, :, None], column[:, None, :], (inside_y[:, :, None] & inside_x[:, None, :])[..., None]


def pooled_bins(**arguments: Any) -> str:
    """Why a decomposition that pools cannot be traced."""
    return "how many pixels a bin has depends on the values of the boxes"
