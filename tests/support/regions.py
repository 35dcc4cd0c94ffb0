"""Calls of the operators on regions of interest, and oracles, for the tests of what they mean and compile to.

A :class:`Case` says what a call looks like, of any of ``OPERATORS``; :func:`sample` makes its tensors, always the same
ones. ``CASES`` are the calls that every implementation is tested on, ``HOSTILE`` those with boxes that are NaN,
infinite or huge. A :class:`Pyramid` is the same for several feature maps.
"""

from __future__ import annotations

import dataclasses
import decimal
import fractions
import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from inductor_vision.tests.support.layouts import LAYOUTS, arrange
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Case:
    """What a call looks like.

    Attributes:
        channels: of the result; the input of a position-sensitive operator has as many for each bin.
        size: height and width of the feature map.
        boxes: where boxes are, one of ``BOXES``.
        values: what is in the feature map, one of ``VALUES``.
        layout: memory layout of the feature map, one of ``LAYOUTS``.
        rois_layout: that of the boxes, one of ``ROIS_LAYOUTS``.
    """

    batch: int = 2
    channels: int = 5
    size: tuple[int, int] = (7, 9)
    bins: tuple[int, int] = (2, 3)
    regions: int = 8
    spatial_scale: float = 0.5
    sampling_ratio: int = 2
    aligned: bool = False
    boxes: str = "mixed"
    values: str = "normal"
    layout: str = "contiguous"
    rois_layout: str = "contiguous"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One call of an operator.

    Attributes:
        op: which, one of ``OPERATORS``.
        gradient: a gradient of its result.
    """

    op: str
    name: str
    case: Case
    input: Tensor
    rois: Tensor
    gradient: Tensor

    @property
    def _options(self) -> list[Any]:
        return [getattr(self.case, option) for option in OPERATORS[self.op].options]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the public function, of torchvision's function, and of the oracle."""
        return (self.input, self.rois, self.case.bins, self.case.spatial_scale, *self._options)

    @property
    def positional(self) -> tuple[Any, ...]:
        """The arguments in the order of the custom operator's schema."""
        if self.op == "roi_align":
            return ([self.input], self.rois, None, [self.case.spatial_scale], *self.case.bins, *self._options)
        return self.positional_of_torchvision

    @property
    def positional_backward(self) -> tuple[Any, ...]:
        """The arguments in the order of the schema of the custom operator's backward."""
        scale, size = self.case.spatial_scale, list(self.input.shape)
        if self.op == "roi_align":
            return (self.gradient, self.rois, None, [scale], size, *self._options, 0)
        if self.op == "roi_pool":
            return (self.gradient, self.rois, self._argmax(), size)
        return (self.gradient, self.rois, scale, size, *self._options)

    @property
    def positional_of_torchvision(self) -> tuple[Any, ...]:
        """The arguments in the order of the schema of torchvision's operator."""
        return (self.input, self.rois, self.case.spatial_scale, *self.case.bins, *self._options)

    @property
    def positional_backward_of_torchvision(self) -> tuple[Any, ...]:
        """The arguments in the order of the schema of torchvision's backward operator."""
        scale, bins, size = self.case.spatial_scale, self.case.bins, self.input.shape
        if self.op == "roi_align":
            ratio, aligned = self._options
            return (self.gradient, self.rois, scale, *bins, *size, ratio, aligned)
        extra = self._argmax() if self.op == "roi_pool" else self.channel_mapping
        return (self.gradient, self.rois, extra, scale, *bins, *self._options, *size)

    def _argmax(self) -> Tensor:
        return roi_pool_oracle(*self.arguments)[1]

    @property
    def channel_mapping(self) -> Tensor:
        """Which channel of the input each element of a position-sensitive result is made from: int32."""
        _, c, p, q = np.indices(self.gradient.shape, dtype=np.int32)
        return torch.from_numpy((c * self.case.bins[0] + p) * self.case.bins[1] + q)

    def replace(self, **tensors: Tensor) -> Sample:
        """This call on other tensors."""
        return dataclasses.replace(self, **tensors)

    def keep(self, regions: Tensor) -> Sample:
        """This call on some of the regions."""
        return self.replace(rois=self.rois[regions], gradient=self.gradient[regions])

    def to_double(self) -> Sample:
        """This call in float64."""
        return self.replace(input=self.input.double(), rois=self.rois.double(), gradient=self.gradient.double())


# Where boxes are. Each kind is an interval of one axis, in pixels of a map of that length, whatever the spatial scale.


def _inside(rng: random.Random, length: int, bins: int, ratio: int) -> tuple[float, float]:
    begin, end = sorted(rng.uniform(0, length - 1) for _ in "12")
    return begin, end


def _crossing(rng: random.Random, length: int, bins: int, ratio: int) -> tuple[float, float]:
    if rng.random() < 0.5:
        return rng.uniform(-4, 0), rng.uniform(0, length - 1)
    return rng.uniform(0, length - 1), rng.uniform(length - 1, length + 4)


def _outside(rng: random.Random, length: int, bins: int, ratio: int) -> tuple[float, float]:
    if rng.random() < 0.5:
        return rng.uniform(-9, -6), rng.uniform(-5, -2)
    return rng.uniform(length + 1.5, length + 4), rng.uniform(length + 5, length + 9)


def _empty(rng: random.Random, length: int, bins: int, ratio: int) -> tuple[float, float]:
    begin = rng.uniform(0, length - 1)
    return begin, begin


def _inverted(rng: random.Random, length: int, bins: int, ratio: int) -> tuple[float, float]:
    begin, end = sorted(rng.uniform(-1, length) for _ in "12")
    return end, begin


def _integers(rng: random.Random, length: int, bins: int, ratio: int) -> tuple[float, float]:
    begin = rng.randint(-2, length)
    return begin, rng.randint(begin - 1, length + 1)


def _corners_at_borders(rng: random.Random, length: int, bins: int, ratio: int) -> tuple[float, float]:
    at = [-1, -0.5, 0, length - 1, length - 0.5, length]
    return rng.choice(at), rng.choice(at)


def _samples_at_borders(rng: random.Random, length: int, bins: int, ratio: int) -> tuple[float, float]:
    """One of the samples lies exactly at a border, or just beside it, if ``aligned`` is as drawn here."""
    bin_size = rng.choice([1, 2, 4])
    samples = ratio if ratio > 0 else bin_size
    which = samples // 2 if samples % 2 else rng.randrange(samples)  # others would not be exact
    beside = 2.0**-10
    ends = [end + shift for end in (-1, length) for shift in (-beside, 0, beside)]
    at = rng.choice([*ends, 0, length - 1, length - 0.5])
    begin = at - (rng.randrange(bins) + (which + 0.5) / samples) * bin_size + rng.choice([0, 0.5])
    return begin, begin + bins * bin_size


def _halves(rng: random.Random, length: int, bins: int, ratio: int) -> tuple[float, float]:
    """Coordinates that lie between two integers, or just below."""

    def half() -> float:
        number = np.float32(rng.randint(-3, length) + 0.5)
        return float(rng.choice([number, np.nextafter(number, np.float32(-100))]))

    begin, end = sorted((half(), half()))
    return begin, end


def _larger(rng: random.Random, length: int, bins: int, ratio: int) -> tuple[float, float]:
    return -length * rng.uniform(0.5, 2), length * rng.uniform(1.5, 3)


_INTERVALS: dict[str, Callable[[random.Random, int, int, int], tuple[float, float]]] = {
    "inside": _inside,
    "crossing": _crossing,
    "outside": _outside,
    "empty": _empty,
    "inverted": _inverted,
    "integers": _integers,
    "corners_at_borders": _corners_at_borders,
    "samples_at_borders": _samples_at_borders,
    "halves": _halves,
    "larger": _larger,
}
BOXES = (*_INTERVALS, "mixed", "hostile")

_HUGE = (1e9, 1e30, 2.0**31, 2.0**63, math.inf)
_HOSTILE = (math.nan, *_HUGE, *(-number for number in _HUGE))


def _box(case: Case, rng: random.Random) -> list[float]:
    """(x1, y1, x2, y2), in pixels of the map."""
    if case.boxes in _INTERVALS:  # along one axis or along both
        kinds = rng.choice([(case.boxes, case.boxes), (case.boxes, "inside"), ("inside", case.boxes)])
    elif case.boxes in ("mixed", "hostile"):
        kinds = tuple("inside" if rng.random() < 0.3 else rng.choice(list(_INTERVALS)) for _ in "yx")
    else:
        raise ValueError(f"no boxes {case.boxes!r}; there are: {', '.join(BOXES)}")
    (y1, y2), (x1, x2) = (
        _INTERVALS[kind](rng, length, bins, case.sampling_ratio)
        for kind, length, bins in zip(kinds, case.size, case.bins)
    )
    box = [x1, y1, x2, y2]
    if case.boxes == "hostile":
        box = [rng.choice(_HOSTILE) if rng.random() < 0.25 else coordinate for coordinate in box]
    return box


def _rois(case: Case, rng: random.Random) -> Tensor:
    """[K, 5]; numbers that float32 has, so that boxes are the same in every dtype."""
    rows = [
        [rng.randrange(case.batch), *(coordinate / case.spatial_scale for coordinate in _box(case, rng))]
        for _ in range(case.regions)
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)


ROIS_LAYOUTS = ("contiguous", "sliced", "transposed")


def _arrange_rois(rois: Tensor, layout: str) -> Tensor:
    if layout == "contiguous":
        return rois
    if layout == "transposed":
        return rois.t().contiguous().t()
    if layout == "sliced":
        room = rois.new_full((2 * len(rois), 8), math.nan)
        return room[1::2, 2:7].copy_(rois)
    raise ValueError(f"no layout {layout!r} of boxes; there are: {', '.join(ROIS_LAYOUTS)}")


VALUES = ("normal", "tied", "bad")


def _values(case: Case, channels: int, generator: torch.Generator) -> Tensor:
    shape = (case.batch, channels, *case.size)
    if case.values == "tied":
        return torch.randint(-2, 3, shape, generator=generator).double()
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if case.values == "bad":
        bad = torch.tensor([math.nan, math.nan, -math.inf, -math.inf, math.inf], dtype=torch.float64)
        bad = bad[torch.randint(len(bad), shape, generator=generator)]
        values = torch.where(torch.rand(shape, generator=generator) < 0.5, bad, values)
    elif case.values != "normal":
        raise ValueError(f"no values {case.values!r}; there are: {', '.join(VALUES)}")
    return values


def rois_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of the boxes that go with maps of a dtype: the low precisions lose coordinates."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sample(op: str, case: str | Case, dtype: torch.dtype = torch.float32) -> Sample:
    """The call of an operator that a case, or the case of that name, describes. The values depend on these alone."""
    name = case if isinstance(case, str) else "drawn"
    if isinstance(case, str):
        case = CASES[case] if case in CASES else HOSTILE[case]
    seed = zlib.crc32(repr(case).encode())
    generator = torch.Generator().manual_seed(seed)
    channels = case.channels * (math.prod(case.bins) if OPERATORS[op].position_sensitive else 1)
    input = _values(case, channels, generator)
    rois = _rois(case, random.Random(seed))
    gradient = torch.randn(case.regions, case.channels, *case.bins, generator=generator, dtype=torch.float64)
    return Sample(
        op,
        name,
        case,
        arrange(input.to(dtype), case.layout),
        _arrange_rois(rois.to(rois_dtype(dtype)), case.rois_layout),
        gradient.to(dtype),
    )


CASES = {
    "plain": Case(),
    "aligned": Case(aligned=True),
    "ratio_1": Case(sampling_ratio=1),
    "ratio_3": Case(sampling_ratio=3, aligned=True),
    "adaptive": Case(sampling_ratio=-1),
    "adaptive_aligned": Case(sampling_ratio=0, aligned=True),
    "adaptive_larger": Case(sampling_ratio=-1, aligned=True, boxes="larger", regions=4, channels=2),
    "adaptive_empty": Case(sampling_ratio=-1, aligned=True, boxes="empty"),
    "adaptive_inverted": Case(sampling_ratio=-1, aligned=True, boxes="inverted"),
    "adaptive_samples_at_borders": Case(sampling_ratio=-1, boxes="samples_at_borders"),
    "adaptive_samples_at_borders_aligned": Case(sampling_ratio=-1, aligned=True, boxes="samples_at_borders"),
    "inside": Case(boxes="inside"),
    "crossing": Case(boxes="crossing"),
    "outside": Case(boxes="outside"),
    "empty": Case(boxes="empty"),
    "empty_aligned": Case(boxes="empty", aligned=True),
    "inverted": Case(boxes="inverted"),
    "inverted_aligned": Case(boxes="inverted", aligned=True),
    "integers": Case(boxes="integers", regions=12),
    "corners_at_borders": Case(boxes="corners_at_borders", regions=16),
    "corners_at_borders_aligned": Case(boxes="corners_at_borders", regions=16, aligned=True),
    "samples_at_borders": Case(boxes="samples_at_borders", regions=16),
    "samples_at_borders_aligned": Case(boxes="samples_at_borders", regions=16, sampling_ratio=1, aligned=True),
    "halves": Case(boxes="halves", regions=16),
    "halves_one_bin": Case(boxes="halves", regions=16, bins=(1, 1), spatial_scale=0.25),
    "larger": Case(boxes="larger"),
    "full_scale": Case(spatial_scale=1.0),
    "odd_scale": Case(spatial_scale=0.3, aligned=True),
    "no_regions": Case(regions=0),
    "one_region": Case(regions=1, boxes="inside", batch=1),
    "many_regions": Case(regions=37, channels=2, batch=5),
    "no_images": Case(batch=0, regions=0),
    "one_image": Case(batch=1),
    "no_channels": Case(channels=0),
    "one_pixel": Case(size=(1, 1)),
    "one_pixel_adaptive": Case(size=(1, 1), sampling_ratio=-1, aligned=True),
    "one_row": Case(size=(1, 13)),
    "one_column": Case(size=(13, 1)),
    "one_bin": Case(bins=(1, 1), boxes="inside"),
    "bins_4x1": Case(bins=(4, 1)),
    "bins_1x5": Case(bins=(1, 5)),
    "more_bins_than_pixels": Case(bins=(7, 7), size=(3, 4), channels=2, regions=4),
    "channels_1": Case(channels=1),
    "channels_3": Case(channels=3),
    "channels_16": Case(channels=16),
    "channels_17": Case(channels=17),
    "channels_37": Case(channels=37, size=(5, 6)),
    "channels_64": Case(channels=64, size=(5, 6), bins=(2, 2)),
    "tied": Case(values="tied"),
    "tied_one_bin": Case(values="tied", bins=(1, 1), boxes="larger"),
    "bad": Case(values="bad"),
    **{f"input_{layout}": Case(layout=layout) for layout in LAYOUTS[1:]},
    "channels_37_channels_last": Case(channels=37, size=(5, 6), layout="channels_last"),
    "adaptive_channels_last": Case(channels=16, sampling_ratio=-1, layout="channels_last"),
    "channels_17_sliced_channels_last": Case(channels=17, layout="sliced_channels_last"),
    **{f"rois_{layout}": Case(rois_layout=layout) for layout in ROIS_LAYOUTS[1:]},
}

HOSTILE = {
    "hostile": Case(boxes="hostile", regions=24),
    "hostile_aligned": Case(boxes="hostile", regions=24, aligned=True),
    "hostile_one_bin": Case(boxes="hostile", regions=24, bins=(1, 1)),
    "hostile_adaptive": Case(boxes="hostile", regions=24, sampling_ratio=-1),
    "hostile_adaptive_aligned": Case(boxes="hostile", regions=24, sampling_ratio=0, aligned=True),
    "hostile_channels_last": Case(boxes="hostile", regions=24, channels=17, layout="channels_last"),
    "hostile_one_pixel": Case(boxes="hostile", regions=24, size=(1, 1), sampling_ratio=-1),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small case."""
    batch = draw(st.integers(0, 3))
    return Case(
        batch=batch,
        channels=draw(st.integers(1, 5)),
        size=(draw(st.integers(1, 8)), draw(st.integers(1, 8))),
        bins=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        regions=draw(st.integers(0, 4)) if batch > 0 else 0,
        spatial_scale=draw(st.sampled_from([1.0, 0.5, 0.0625, 0.3, 2.0])),
        sampling_ratio=draw(st.integers(-1, 4)),
        aligned=draw(st.booleans()),
        boxes=draw(st.sampled_from([boxes for boxes in BOXES if boxes != "hostile"])),
        values=draw(st.sampled_from(["normal", "tied"])),
        layout=draw(st.sampled_from(LAYOUTS)),
        rois_layout=draw(st.sampled_from(ROIS_LAYOUTS)),
    )


# Oracles: values in float64, one term of one bin at a time; coordinates in the dtype that torchvision's kernels would
# compute them in, because the results jump where a sample leaves the map.


def _unpack(input: Tensor, rois: Tensor) -> tuple[Any, np.ndarray, list[tuple[int, np.ndarray]]]:
    """The coordinates' dtype, the map, and of each region its image and x1, y1, x2, y2."""
    real = np.float64 if input.dtype == torch.float64 else np.float32
    rows = rois.detach().double().numpy()
    return real, input.detach().double().numpy(), [(int(row[0]), row[1:].astype(real)) for row in rows]


def _points(real: Any, begin: Any, size: Any, bins: int, ratio: int, length: int) -> tuple[list[list[Any]], Any]:
    """Where each bin is sampled, along one axis, and how many samples it should have."""
    bin_size = size / real(bins)
    count = real(ratio) if ratio > 0 else np.ceil(bin_size)
    points = []
    for p in range(bins):
        first = begin + real(p) * bin_size
        points.append(
            [first + (real(i) + real(0.5)) * bin_size / count for i in _which(first, bin_size, count, length)]
        )
    return points, count


def _which(first: Any, bin_size: Any, count: Any, length: int) -> range:
    """The samples that are worth a look: all, or those near the map if there are very many."""
    if not count > 0 or count > 2**40:  # nobody sees what is divided by more than that
        return range(0)
    if count < 1000:
        return range(int(count))
    begin, spacing = fractions.Fraction(float(first)), fractions.Fraction(float(bin_size)) / int(count)
    return range(
        max(0, math.floor((-2 - begin) / spacing)), max(0, min(int(count), math.ceil((length + 1 - begin) / spacing)))
    )


def _neighbours(real: Any, point: Any, length: int) -> list[tuple[int, Any]]:
    """The pixels that a point takes its value from, along one axis, and their weights."""
    if not -1 <= point <= length:
        return []
    point = max(point, real(0))
    low = int(point)
    if low >= length - 1:
        return [(length - 1, real(1)), (length - 1, real(0))]  # zero times infinity is NaN, in torchvision too
    fraction = point - real(low)
    return [(low, real(1) - fraction), (low + 1, fraction)]


def _sampled_bins(
    input: Tensor, rois: Tensor, bins: Sequence[int], spatial_scale: float, ratio: int, shift: float, at_least: float
) -> Iterator[tuple[int, int, int, int, list[tuple[int, int, float]], float]]:
    """For each bin: region, image, its row and column; rows, columns and weights of pixels; number of samples."""
    real, x, regions = _unpack(input, rois)
    height, width = x.shape[2:]
    for k, (image, corners) in enumerate(regions):
        x1, y1, x2, y2 = corners * real(spatial_scale) - real(shift)
        sizes = [real(at_least) if size < at_least else size for size in (y2 - y1, x2 - x1)]
        ys, count_y = _points(real, y1, sizes[0], bins[0], ratio, height)
        xs, count_x = _points(real, x1, sizes[1], bins[1], ratio, width)
        for p, q in np.ndindex(*bins):
            pixels = [
                (r, c, float(weight_y) * float(weight_x))
                for y in ys[p]
                for x in xs[q]
                for r, weight_y in _neighbours(real, y, height)
                for c, weight_x in _neighbours(real, x, width)
            ]
            yield k, image, p, q, pixels, np.float64(count_y) * np.float64(count_x)


def _round(coordinate: Any) -> int:
    """As C's round does: halves away from zero; what is very far away is brought to 2**30, where no map is."""
    whole = int(decimal.Decimal(float(coordinate)).to_integral_value(decimal.ROUND_HALF_UP))
    return max(-(2**30), min(2**30, whole))


def _pixels(real: Any, begin: Any, end: Any, bins: int, inclusive: bool, limit: int) -> list[range]:
    """The pixels that each bin covers, along one axis."""
    start, length = _round(begin), _round(end) - _round(begin) + inclusive
    bin_size = real(max(length, 1)) / real(bins)
    edges = []
    for p in range(bins):
        first, last = math.floor(real(p) * bin_size) + start, math.ceil(real(p + 1) * bin_size) + start
        edges.append(range(min(max(first, 0), limit), min(max(last, 0), limit)))
    return edges


def _pooled_bins(
    input: Tensor, rois: Tensor, bins: Sequence[int], spatial_scale: float, inclusive: bool, limits: Sequence[int]
) -> Iterator[tuple[int, int, int, int, list[tuple[int, int]]]]:
    """For each bin: region, image, its row and column; rows and columns of its pixels."""
    real, _, regions = _unpack(input, rois)
    for k, (image, corners) in enumerate(regions):
        x1, y1, x2, y2 = corners * real(spatial_scale)
        finite = np.isfinite([x1, y1, x2, y2])
        nothing = [range(0)] * max(bins)
        ys = _pixels(real, y1, y2, bins[0], inclusive, limits[0]) if finite[[1, 3]].all() else nothing
        xs = _pixels(real, x1, x2, bins[1], inclusive, limits[1]) if finite[[0, 2]].all() else nothing
        for p, q in np.ndindex(*bins):
            yield k, image, p, q, [(r, c) for r in ys[p] for c in xs[q]]


def _channels_of(bins: Sequence[int], p: int, q: int, channels: int) -> slice:
    """The input's channels that a position-sensitive operator reads for a bin."""
    return slice(p * bins[1] + q, channels, bins[0] * bins[1])


@np.errstate(all="ignore")
def roi_align_oracle(
    input: Tensor, rois: Tensor, bins: Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    x = input.detach().double().numpy()
    out = np.zeros((len(rois), x.shape[1], *bins))
    shift, at_least = (0.5, -math.inf) if aligned else (0, 1)
    for k, image, p, q, pixels, count in _sampled_bins(
        input, rois, bins, spatial_scale, sampling_ratio, shift, at_least
    ):
        for r, c, weight in pixels:
            out[k, :, p, q] += weight * x[image, :, r, c]
        if count > 1:
            out[k, :, p, q] /= count
    return torch.from_numpy(out)


@np.errstate(all="ignore")
def roi_align_gradient_oracle(
    gradient: Tensor,
    input: Tensor,
    rois: Tensor,
    bins: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    g = gradient.detach().double().numpy()
    out = np.zeros(input.shape)
    shift, at_least = (0.5, -math.inf) if aligned else (0, 1)
    for k, image, p, q, pixels, count in _sampled_bins(
        input, rois, bins, spatial_scale, sampling_ratio, shift, at_least
    ):
        for r, c, weight in pixels:
            out[image, :, r, c] += g[k, :, p, q] * weight / count
    return torch.from_numpy(out)


@np.errstate(all="ignore")
def ps_roi_align_oracle(
    input: Tensor, rois: Tensor, bins: Sequence[int], spatial_scale: float, sampling_ratio: int
) -> Tensor:
    x = input.detach().double().numpy()
    out = np.zeros((len(rois), x.shape[1] // math.prod(bins), *bins))
    for k, image, p, q, pixels, count in _sampled_bins(
        input, rois, bins, spatial_scale, sampling_ratio, 0.5, -math.inf
    ):
        for r, c, weight in pixels:
            out[k, :, p, q] += weight * x[image, _channels_of(bins, p, q, x.shape[1]), r, c]
        out[k, :, p, q] /= count
    return torch.from_numpy(out)


@np.errstate(all="ignore")
def ps_roi_align_gradient_oracle(
    gradient: Tensor, input: Tensor, rois: Tensor, bins: Sequence[int], spatial_scale: float, sampling_ratio: int
) -> Tensor:
    g = gradient.detach().double().numpy()
    out = np.zeros(input.shape)
    for k, image, p, q, pixels, count in _sampled_bins(
        input, rois, bins, spatial_scale, sampling_ratio, 0.5, -math.inf
    ):
        for r, c, weight in pixels:
            out[image, _channels_of(bins, p, q, out.shape[1]), r, c] += g[k, :, p, q] * weight / count
    return torch.from_numpy(out)


def roi_pool_oracle(input: Tensor, rois: Tensor, bins: Sequence[int], spatial_scale: float) -> tuple[Tensor, Tensor]:
    """The maxima, and the place of each in its plane of the input: int32, -1 where there is none."""
    x = input.detach().double().numpy()
    height, width = x.shape[2:]
    shape = (len(rois), x.shape[1], *bins)
    out, argmax = np.zeros(shape), np.full(shape, -1, np.int32)
    for k, image, p, q, pixels in _pooled_bins(input, rois, bins, spatial_scale, True, (height, width)):
        for channel in range(x.shape[1]):
            best = float(np.finfo(np.float32).min) if pixels else 0.0
            for r, c in pixels:
                if x[image, channel, r, c] > best:
                    best = x[image, channel, r, c]
                    argmax[k, channel, p, q] = r * width + c
            out[k, channel, p, q] = best
    return torch.from_numpy(out), torch.from_numpy(argmax)


def roi_pool_gradient_oracle(
    gradient: Tensor, input: Tensor, rois: Tensor, bins: Sequence[int], spatial_scale: float
) -> Tensor:
    _, argmax = roi_pool_oracle(input, rois, bins, spatial_scale)
    out = np.zeros(input.shape)
    for k, channel, p, q in np.ndindex(*argmax.shape):
        if argmax[k, channel, p, q] >= 0:
            r, c = divmod(int(argmax[k, channel, p, q]), input.shape[3])
            out[int(rois[k, 0]), channel, r, c] += gradient[k, channel, p, q].item()
    return torch.from_numpy(out)


@np.errstate(all="ignore")
def ps_roi_pool_oracle(input: Tensor, rois: Tensor, bins: Sequence[int], spatial_scale: float) -> Tensor:
    """The last row and column are never read."""
    x = input.detach().double().numpy()
    height, width = x.shape[2:]
    out = np.zeros((len(rois), x.shape[1] // math.prod(bins), *bins))
    for k, image, p, q, pixels in _pooled_bins(input, rois, bins, spatial_scale, False, (height - 1, width - 1)):
        for r, c in pixels:
            out[k, :, p, q] += x[image, _channels_of(bins, p, q, x.shape[1]), r, c] / len(pixels)
    return torch.from_numpy(out)


def ps_roi_pool_gradient_oracle(
    gradient: Tensor, input: Tensor, rois: Tensor, bins: Sequence[int], spatial_scale: float
) -> Tensor:
    """The last row and column have gradients. (torchvision's, in float64, rounds coordinates to float32 first.)"""
    g = gradient.detach().double().numpy()
    out = np.zeros(input.shape)
    for k, image, p, q, pixels in _pooled_bins(input, rois, bins, spatial_scale, False, input.shape[2:]):
        for r, c in pixels:
            out[image, _channels_of(bins, p, q, out.shape[1]), r, c] += g[k, :, p, q] / len(pixels)
    return torch.from_numpy(out)


@dataclasses.dataclass(frozen=True)
class Operator:
    """What the tests must know of an operator on regions.

    Attributes:
        oracle: of the same arguments; of roi_pool the maxima and where they are.
        gradient_oracle: the gradient of the input, from that of the result and the arguments.
        options: attributes of a :class:`Case` that are its last arguments, after the spatial scale.
        position_sensitive: whether each bin has channels of its own.
    """

    oracle: Callable[..., Any]
    gradient_oracle: Callable[..., Tensor]
    options: tuple[str, ...]
    position_sensitive: bool


OPERATORS = {
    "roi_align": Operator(
        roi_align_oracle,
        roi_align_gradient_oracle,
        options=("sampling_ratio", "aligned"),
        position_sensitive=False,
    ),
    "roi_pool": Operator(
        roi_pool_oracle,
        roi_pool_gradient_oracle,
        options=(),
        position_sensitive=False,
    ),
    "ps_roi_align": Operator(
        ps_roi_align_oracle,
        ps_roi_align_gradient_oracle,
        options=("sampling_ratio",),
        position_sensitive=True,
    ),
    "ps_roi_pool": Operator(
        ps_roi_pool_oracle,
        ps_roi_pool_gradient_oracle,
        options=(),
        position_sensitive=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """What a call of multiscale_roi_align looks like.

    Attributes:
        image: height and width of the images that the maps are of.
        levels: of the maps; one of level l has ``2**-l`` of an image's pixels along each axis.
        boxes: ``"mixed"`` or ``"hostile"``.
        layout: memory layout of the feature maps, one of ``LAYOUTS``.
    """

    batch: int = 2
    channels: int = 5
    image: tuple[int, int] = (50, 70)
    levels: tuple[int, ...] = (2, 3, 4)
    bins: tuple[int, int] = (2, 3)
    regions: int = 20
    sampling_ratio: int = 2
    canonical_scale: int = 32
    canonical_level: int = 3
    aligned: bool = False
    boxes: str = "mixed"
    layout: str = "contiguous"


@dataclasses.dataclass(frozen=True)
class PyramidSample:
    """One call: ``multiscale_roi_align(features, boxes, *..., **kwargs)``.

    Attributes:
        boxes: ``[L, 4]`` of each image.
        gradient: a gradient of the result.
    """

    name: str
    case: Pyramid
    features: list[Tensor]
    boxes: list[Tensor]
    gradient: Tensor

    @property
    def scales(self) -> list[float]:
        return [2.0**-level for level in self.case.levels]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.features, self.boxes, self.case.bins, self.scales, self.case.sampling_ratio)

    @property
    def kwargs(self) -> dict[str, Any]:
        return {name: getattr(self.case, name) for name in ("canonical_scale", "canonical_level", "aligned")}

    @property
    def rois(self) -> Tensor:
        return torch.cat([torch.nn.functional.pad(boxes, (1, 0), value=i) for i, boxes in enumerate(self.boxes)])

    @property
    def positional(self) -> tuple[Any, ...]:
        """The arguments in the order of the schema of ``inductor_vision::roi_align``."""
        case = self.case
        return (self.features, self.rois, self.levels, self.scales, *case.bins, case.sampling_ratio, case.aligned)

    @property
    def levels(self) -> Tensor:
        """Which of the maps each region is pooled from, int64; -1 if from none."""
        finest, coarsest = self.case.levels[0], self.case.levels[-1]
        if finest == coarsest:
            return torch.zeros(len(self.rois), dtype=torch.int64)
        levels = []
        for _, x1, y1, x2, y2 in self.rois.tolist():
            area = (x2 - x1) * (y2 - y1)
            if area > 0:
                level = self.case.canonical_level + math.log2(math.sqrt(area) / self.case.canonical_scale) + 1e-6
                levels.append(math.floor(min(max(level, finest), coarsest)) - finest)
            else:
                levels.append(0 if area == 0 else -1)
        return torch.tensor(levels, dtype=torch.int64)


def _pyramid_box(case: Pyramid, rng: random.Random) -> list[float]:
    kind = rng.choice(["any", "any", "any", "power of two", "empty", "inverted", "turned", "larger"])
    side = case.canonical_scale * 2 ** rng.uniform(-2.5, 2.5)
    aspect = 2 ** rng.uniform(-1, 1)
    height, width = side * aspect, side / aspect
    y, x = (rng.uniform(-0.2 * length, length) for length in case.image)
    if kind == "power of two":  # exactly where one level ends and the next begins
        height = width = case.canonical_scale * 2.0 ** rng.randint(-2, 2)
        y, x = round(y), round(x)
    elif kind == "empty":
        width = 0
    elif kind == "inverted":
        width = -width
    elif kind == "turned":
        height, width = -height, -width
    elif kind == "larger":
        y, x, height, width = -case.image[0], -case.image[1], 3 * case.image[0], 3 * case.image[1]
    box = [x, y, x + width, y + height]
    if case.boxes == "hostile":
        box = [rng.choice(_HOSTILE) if rng.random() < 0.25 else coordinate for coordinate in box]
    return box


def pyramid(case: str | Pyramid, dtype: torch.dtype = torch.float32) -> PyramidSample:
    """The call that a pyramid, or the one of that name, describes. The values depend on it alone."""
    name = case if isinstance(case, str) else "drawn"
    if isinstance(case, str):
        case = PYRAMIDS[case]
    seed = zlib.crc32(repr(case).encode())
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    features = []
    for level in case.levels:
        shape = (case.batch, case.channels, *(-(-length // 2**level) for length in case.image))
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        features.append(arrange(values, case.layout))
    of_images: list[list[list[float]]] = [[] for _ in range(case.batch)]
    for _ in range(case.regions):
        rng.choice(of_images).append(_pyramid_box(case, rng))
    boxes = [torch.tensor(of_image).reshape(-1, 4).to(rois_dtype(dtype)) for of_image in of_images]
    gradient = torch.randn(case.regions, case.channels, *case.bins, generator=generator, dtype=torch.float64)
    return PyramidSample(name, case, features, boxes, gradient.to(dtype))


PYRAMIDS = {
    "plain": Pyramid(),
    "aligned": Pyramid(aligned=True),
    "adaptive": Pyramid(sampling_ratio=-1, regions=12),
    "four_levels": Pyramid(levels=(1, 2, 3, 4), canonical_level=2, channels=3),
    "two_levels": Pyramid(levels=(3, 4)),
    "one_level": Pyramid(levels=(3,)),
    "no_regions": Pyramid(regions=0),
    "one_region": Pyramid(regions=1),
    "one_image": Pyramid(batch=1),
    "many_images": Pyramid(batch=7),  # not all have boxes
    "channels_17": Pyramid(channels=17),
    "channels_last": Pyramid(channels=16, layout="channels_last"),
    "sliced": Pyramid(layout="sliced"),
    "hostile": Pyramid(boxes="hostile"),
    "hostile_adaptive": Pyramid(boxes="hostile", sampling_ratio=-1, aligned=True),
}


def _by_level(s: PyramidSample) -> Iterator[tuple[int, Tensor, tuple[Any, ...]]]:
    """For each map: its regions, and the arguments of roi_align's oracle for them."""
    for level, (feature, scale) in enumerate(zip(s.features, s.scales)):
        here = s.levels == level
        yield level, here, (feature, s.rois[here], s.case.bins, scale, s.case.sampling_ratio, s.case.aligned)


def pyramid_oracle(s: PyramidSample) -> Tensor:
    out = torch.zeros(s.gradient.shape, dtype=torch.float64)
    for _, here, arguments in _by_level(s):
        out[here] = roi_align_oracle(*arguments)
    return out


def pyramid_gradient_oracle(s: PyramidSample) -> list[Tensor]:
    return [roi_align_gradient_oracle(s.gradient[here], *arguments) for _, here, arguments in _by_level(s)]
