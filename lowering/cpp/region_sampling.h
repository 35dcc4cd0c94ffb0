// Where the bins of regions sample a map, bilinearly on a grid (SampledRegions), and which pixels they cover
// (PixelRanges).  What an axis has, rows or columns, is found once for each region, and used for all channels.
#ifndef INDUCTOR_VISION_REGION_SAMPLING_H
#define INDUCTOR_VISION_REGION_SAMPLING_H

#include <cmath>
#include <limits>
#include <vector>

#include "base.h"
#include "regions.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// Where the bins of a region sample an axis of a map: `count` points in each, evenly spread.
//
// A point counts where -1 <= point <= length.  NaN fails that test, and it is made before the conversion to an integer:
// no box can lead out of bounds.
template <typename acc_t>
struct SampledAxis {
  acc_t begin, bin_size, count;
  int64_t length;
  bool adaptive;

  SampledAxis(acc_t begin, acc_t size, int64_t bins, int64_t sampling_ratio, int64_t length)
      : begin(begin),
        bin_size(size / static_cast<acc_t>(bins)),
        count(sampling_ratio > 0 ? static_cast<acc_t>(sampling_ratio) : std::ceil(bin_size)),
        length(length),
        adaptive(sampling_ratio <= 0) {
  }

  // The pixels that all bins read are among these; the margin is for the rounding of coordinates, which may be huge.
  std::array<int64_t, 2> extent(int64_t bins) const {
    const acc_t end = begin + static_cast<acc_t>(bins) * bin_size, farthest = static_cast<acc_t>(length);
    const acc_t margin = 2 + 16 * std::numeric_limits<acc_t>::epsilon() * (std::abs(begin) + std::abs(end));
    if (!std::isfinite(margin)) {
      return {0, length};
    }
    const acc_t first = std::clamp(std::min(begin, end) - margin, acc_t(0), farthest - 1);
    const acc_t last = std::clamp(std::max(begin, end) + margin, acc_t(0), farthest - 1);
    return {
        std::min(static_cast<int64_t>(first), length - 1),  // acc_t may not hold the length
        std::min(static_cast<int64_t>(last) + 1, length)};
  }

  // How many pixels a bin reads at most.
  int64_t capacity() const {
    return count > 0 ? static_cast<int64_t>(std::min(2 * count, static_cast<acc_t>(length))) : 0;
  }

  // add(pixel, weight) for the two pixels that each point of a bin lies between.
  template <typename Add>
  void sample(int64_t bin, const Add& add) const {
    const acc_t first = begin + static_cast<acc_t>(bin) * bin_size;
    acc_t skipped = 0, steps = count;
    if (adaptive) {  // skip what is before the map and behind it: the region may be of any size
      const acc_t spacing = bin_size / count;
      skipped = std::max(std::floor((-1 - first) / spacing - 1), acc_t(0));
      steps = std::min(std::ceil((static_cast<acc_t>(length) - first) / spacing + 1), count) - skipped;
      if (!(steps > 0)) {
        return;
      }
      steps = std::min(steps, static_cast<acc_t>(4 * length + 16));  // a point is at most 1 from the next
    }
    for (int64_t step = 0; static_cast<acc_t>(step) < steps; ++step) {
      const acc_t i = skipped + static_cast<acc_t>(step);
      const acc_t point = first + (i + acc_t(0.5)) * bin_size / count;
      if (!(point >= -1 && point <= static_cast<acc_t>(length))) {
        continue;
      }
      const acc_t clamped = std::max(point, acc_t(0));
      const int64_t low = static_cast<int64_t>(clamped);
      if (low >= length - 1) {
        add(length - 1, acc_t(1));
        continue;
      }
      const acc_t fraction = clamped - static_cast<acc_t>(low);
      add(low, 1 - fraction);
      add(low + 1, fraction);
    }
  }
};

// A row or a column that a bin reads, and the sum of its weights in all samples.
template <typename acc_t>
struct Tap {
  int64_t offset;
  acc_t weight;
};

template <typename acc_t>
struct Taps {
  const Tap<acc_t>*first, *last;

  const Tap<acc_t>* begin() const {
    return first;
  }
  const Tap<acc_t>* end() const {
    return last;
  }
};

// The taps of all regions.  Bilinear samples on a grid are a product of rows and columns, and so is their sum: bin (p,
// q) is the sum over rows(p) and columns(q) of the pixel times both weights, times `scale`.
template <typename acc_t>
class TapTable {
 public:
  explicit TapTable(Bins bins, int64_t regions)
      : bins_(bins),
        regions_(regions),
        counts_(regions * (bins.height + bins.width)),
        taps_(0) {
  }

  // To be called for each region, before any is placed.
  void reserve(int64_t k, const SampledAxis<acc_t>& y, const SampledAxis<acc_t>& x) {
    regions_[k] = {size_, y.capacity(), x.capacity(), 0};
    size_ += bins_.height * y.capacity() + bins_.width * x.capacity();
  }
  void allocate() {
    taps_ = Scratch<Tap<acc_t>>(size_);
  }
  // For different regions, this may run at the same time.
  void place(
      int64_t k, const SampledAxis<acc_t>& y, const SampledAxis<acc_t>& x, acc_t scale, int64_t row_distance,
      int64_t column_distance) const {
    Region& region = regions_[k];
    region.scale = scale;
    for (int64_t p = 0; p < bins_.height; ++p) {
      place_bin(y, p, row_distance, row(k, p), counts(k)[p]);
    }
    for (int64_t q = 0; q < bins_.width; ++q) {
      place_bin(x, q, column_distance, column(k, q), counts(k)[bins_.height + q]);
    }
  }

  Taps<acc_t> rows(int64_t k, int64_t p) const {
    return {row(k, p), row(k, p) + counts(k)[p]};
  }
  Taps<acc_t> columns(int64_t k, int64_t q) const {
    return {column(k, q), column(k, q) + counts(k)[bins_.height + q]};
  }
  acc_t scale(int64_t k) const {
    return regions_[k].scale;
  }

 private:
  struct Region {
    int64_t first;                          // in taps_: those of the rows, bin by bin, and those of the columns
    int64_t row_capacity, column_capacity;  // of a bin
    acc_t scale;
  };

  Tap<acc_t>* row(int64_t k, int64_t p) const {
    return taps_.get() + regions_[k].first + p * regions_[k].row_capacity;
  }
  Tap<acc_t>* column(int64_t k, int64_t q) const {
    return row(k, bins_.height) + q * regions_[k].column_capacity;
  }
  int64_t* counts(int64_t k) const {
    return counts_.get() + k * (bins_.height + bins_.width);
  }

  static void place_bin(
      const SampledAxis<acc_t>& axis, int64_t bin, int64_t distance, Tap<acc_t>* taps, int64_t& count) {
    count = 0;
    axis.sample(bin, [&](int64_t pixel, acc_t weight) {
      const int64_t offset = pixel * distance;
      // Points follow each other, up or down, so a pixel that was met before is among the last three.
      for (int64_t i = count - 1; i >= std::max<int64_t>(count - 3, 0); --i) {
        if (taps[i].offset == offset) {
          taps[i].weight += weight;
          return;
        }
      }
      taps[count++] = {offset, weight};
    });
  }

  Bins bins_;
  int64_t size_ = 0;
  Scratch<Region> regions_;
  Scratch<int64_t> counts_;
  Scratch<Tap<acc_t>> taps_;
};

// How roi_align and ps_roi_align sample: `sampling_ratio` points in each direction of a bin, or as many as it has
// pixels.
struct GridSampling {
  int64_t sampling_ratio;
  bool aligned;             // coordinates count from the corner of the first pixel
  bool position_sensitive;  // an empty grid gives NaN, not 0

  template <typename acc_t>
  SampledAxis<acc_t> axis(acc_t begin, acc_t end, int64_t bins, int64_t length) const {
    const acc_t shift = aligned ? acc_t(0.5) : acc_t(0);
    acc_t size = (end - shift) - (begin - shift);
    if (!aligned) {
      size = std::max(size, acc_t(1));
    }
    return {begin - shift, size, bins, sampling_ratio, length};
  }
  template <typename acc_t>
  acc_t scale(const SampledAxis<acc_t>& y, const SampledAxis<acc_t>& x) const {
    const acc_t count = y.count * x.count;
    return 1 / (position_sensitive || count > 1 ? count : acc_t(1));
  }
};

// The taps of all regions on maps whose sizes `maps` knows.
template <typename acc_t, typename box_t>
class SampledRegions {
 public:
  template <typename Maps>
  SampledRegions(
      const Maps& maps, const Boxes<box_t>& boxes, const RegionsByMap& regions, Bins bins, const GridSampling& sampling)
      : boxes_(boxes),
        bins_(bins),
        sampling_(sampling),
        taps_(bins, boxes.count) {
    for (int64_t map = 0; map < regions.maps(); ++map) {
      sizes_.push_back(maps.size_of(map));
      for (int64_t place = regions.begin(map); place < regions.begin(map + 1); ++place) {
        taps_.reserve(regions[place], y(map, regions[place]), x(map, regions[place]));
      }
    }
    taps_.allocate();
  }

  // Region k, where the pixels of its map have these distances.
  void place(int64_t map, int64_t k, int64_t row_distance, int64_t column_distance) const {
    const auto rows = y(map, k), columns = x(map, k);
    taps_.place(k, rows, columns, sampling_.scale(rows, columns), row_distance, column_distance);
  }
  Extent extent(int64_t map, int64_t k) const {
    return {y(map, k).extent(bins_.height), x(map, k).extent(bins_.width)};
  }
  const TapTable<acc_t>& taps() const {
    return taps_;
  }

 private:
  SampledAxis<acc_t> y(int64_t map, int64_t k) const {
    const ScaledBox<acc_t> box(boxes_, k, sizes_[map].spatial_scale);
    return sampling_.axis(box.y1, box.y2, bins_.height, sizes_[map].height);
  }
  SampledAxis<acc_t> x(int64_t map, int64_t k) const {
    const ScaledBox<acc_t> box(boxes_, k, sizes_[map].spatial_scale);
    return sampling_.axis(box.x1, box.x2, bins_.width, sizes_[map].width);
  }

  const Boxes<box_t>& boxes_;
  Bins bins_;
  GridSampling sampling_;
  std::vector<MapSize> sizes_;
  TapTable<acc_t> taps_;
};

// Which pixels of an axis the bins of a region cover.
template <typename acc_t>
struct PooledAxis {
  bool finite;
  int64_t begin;
  acc_t bin_size;

  // `inclusive`: the pixel at `last` belongs to the region.
  PooledAxis(acc_t first, acc_t last, int64_t bins, bool inclusive)
      : finite(std::isfinite(first) && std::isfinite(last)) {
    begin = round(first);
    const int64_t size = std::max<int64_t>(round(last) - begin + (inclusive ? 1 : 0), 1);
    bin_size = static_cast<acc_t>(size) / static_cast<acc_t>(bins);
  }

  // [begin, end) of a bin, cut off at `limit`.
  std::array<int64_t, 2> range(int64_t bin, int64_t limit) const {
    if (!finite) {
      return {0, 0};
    }
    const int64_t from = begin + static_cast<int64_t>(std::floor(static_cast<acc_t>(bin) * bin_size));
    const int64_t to = begin + static_cast<int64_t>(std::ceil(static_cast<acc_t>(bin + 1) * bin_size));
    const int64_t first = std::clamp<int64_t>(from, 0, limit);
    return {first, std::max(first, std::clamp<int64_t>(to, 0, limit))};
  }

 private:
  static int64_t round(acc_t coordinate) {
    constexpr acc_t kFarthest = 1 << 30;
    return std::isfinite(coordinate) ? static_cast<int64_t>(std::round(std::clamp(coordinate, -kFarthest, kFarthest)))
                                     : 0;
  }
};

// The pixels that the bins of all regions cover.
class PixelRanges {
 public:
  PixelRanges(Bins bins, int64_t regions) : bins_(bins), ranges_(regions * (bins.height + bins.width)) {
  }

  // Bins are cut off at the limits.
  template <typename acc_t>
  void place(
      int64_t k, const PooledAxis<acc_t>& y, const PooledAxis<acc_t>& x, int64_t row_limit, int64_t column_limit) {
    for (int64_t p = 0; p < bins_.height; ++p) {
      at(k)[p] = y.range(p, row_limit);
    }
    for (int64_t q = 0; q < bins_.width; ++q) {
      at(k)[bins_.height + q] = x.range(q, column_limit);
    }
  }

  std::array<int64_t, 2> rows(int64_t k, int64_t p) const {
    return at(k)[p];
  }
  std::array<int64_t, 2> columns(int64_t k, int64_t q) const {
    return at(k)[bins_.height + q];
  }
  Extent extent(int64_t k) const {
    return {{rows(k, 0)[0], rows(k, bins_.height - 1)[1]}, {columns(k, 0)[0], columns(k, bins_.width - 1)[1]}};
  }

 private:
  std::array<int64_t, 2>* at(int64_t k) const {
    return ranges_.get() + k * (bins_.height + bins_.width);
  }

  Bins bins_;
  Scratch<std::array<int64_t, 2>> ranges_;
};

// The bins of all regions, cut off at a height and a width.  `inclusive`: as of PooledAxis.
template <typename acc_t, typename box_t>
inline PixelRanges pooled_ranges(
    const Boxes<box_t>& boxes, Bins bins, double spatial_scale, bool inclusive, int64_t height, int64_t width) {
  PixelRanges ranges(bins, boxes.count);
  for (int64_t k = 0; k < boxes.count; ++k) {
    const ScaledBox<acc_t> box(boxes, k, spatial_scale);
    ranges.place(
        k, PooledAxis<acc_t>(box.y1, box.y2, bins.height, inclusive),
        PooledAxis<acc_t>(box.x1, box.x2, bins.width, inclusive), height, width);
  }
  return ranges;
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_REGION_SAMPLING_H
