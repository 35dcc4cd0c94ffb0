// What the kernels of all operators on regions of interest share: which regions there are, where their bins sample a
// feature map, and how the work is cut.
//
//   region      a box (image, x1, y1, x2, y2), K of them; its P = PH x PW bins
//   map         an image [C, H, W] of one of the levels of a pyramid, [B, C, H, W] each
//   block       some channels of a map: as many as fit in cache
//
// Forward, a block of a map is read by all its regions while it is in cache; each region's results are its own.
// Backward, a block of a map, or a band of its rows, is a tile that one thread sums up in cache, region by region, in
// their order: no two threads write to the same place, and no sum depends on how many there are.
#ifndef INDUCTOR_VISION_REGIONS_H
#define INDUCTOR_VISION_REGIONS_H

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "base.h"

namespace inductor_vision {

// One level of a pyramid.
template <typename scalar_t>
struct FeatureMaps {
  View4d<scalar_t> view;
  int64_t height, width;
  double spatial_scale;
};

// [K, 5], and the level that each region is on; null: all on the first.
template <typename box_t>
struct Boxes {
  const box_t* data;
  int64_t row, column;
  int64_t count;
  const int64_t* levels;

  template <typename acc_t>
  acc_t at(int64_t k, int64_t i) const {
    return static_cast<acc_t>(data[k * row + i * column]);
  }
};

struct Bins {
  int64_t height, width;

  int64_t count() const {
    return height * width;
  }
};

// A box on its map, in pixels, not rounded.
template <typename acc_t>
struct ScaledBox {
  acc_t x1, y1, x2, y2;

  template <typename box_t>
  ScaledBox(const Boxes<box_t>& boxes, int64_t k, double spatial_scale) {
    const acc_t scale = static_cast<acc_t>(spatial_scale);
    x1 = boxes.template at<acc_t>(k, 1) * scale;
    y1 = boxes.template at<acc_t>(k, 2) * scale;
    x2 = boxes.template at<acc_t>(k, 3) * scale;
    y2 = boxes.template at<acc_t>(k, 4) * scale;
  }
};

// The regions by the map they are on.
class RegionsByMap {
 public:
  // All levels.  Neighbours on a map follow each other, so that what they read is still in cache.
  template <typename box_t>
  RegionsByMap(const char* op, const Boxes<box_t>& boxes, int64_t levels, int64_t batch)
      : RegionsByMap(op, boxes, 0, levels, batch, [&](int64_t k) {
          const float y = boxes.template at<float>(k, 2) + boxes.template at<float>(k, 4);
          return std::isfinite(y) ? y : 0;
        }) {
  }

  // One level, in the order of the boxes.
  template <typename box_t>
  static RegionsByMap in_order(const char* op, const Boxes<box_t>& boxes, int64_t level, int64_t batch) {
    return RegionsByMap(op, boxes, level, 1, batch, [](int64_t) { return 0.0f; });
  }

  int64_t maps() const {
    return static_cast<int64_t>(first_.size()) - 1;
  }
  // The places of a map's regions are [begin(map), begin(map + 1)).
  int64_t begin(int64_t map) const {
    return first_[map];
  }
  int64_t operator[](int64_t place) const {
    return regions_[place];
  }
  // Regions on none of the levels.
  const std::vector<int64_t>& without_map() const {
    return without_map_;
  }

 private:
  template <typename box_t, typename Place>
  RegionsByMap(
      const char* op, const Boxes<box_t>& boxes, int64_t first_level, int64_t levels, int64_t batch, const Place& place)
      : first_(levels * batch + 1, 0) {
    struct Entry {
      int64_t map;
      float place;
      int64_t region;
    };
    std::vector<Entry> entries;
    entries.reserve(boxes.count);
    for (int64_t k = 0; k < boxes.count; ++k) {
      const double image = boxes.template at<double>(k, 0);
      if (!(image > -1 && std::trunc(image) < static_cast<double>(batch))) {  // NaN too
        throw std::runtime_error(
            std::string(op) + ": boxes[" + std::to_string(k) + "] names image " + std::to_string(image) +
            ", which does not exist: there are " + std::to_string(batch));
      }
      const int64_t level = boxes.levels == nullptr ? first_level : boxes.levels[k];
      if (level < first_level || level >= first_level + levels) {
        without_map_.push_back(k);
        continue;
      }
      entries.push_back({(level - first_level) * batch + static_cast<int64_t>(image), place(k), k});
      ++first_[entries.back().map + 1];
    }
    std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
      return a.map != b.map ? a.map < b.map : a.place < b.place;
    });
    regions_.reserve(entries.size());
    for (const Entry& entry : entries) {
      regions_.push_back(entry.region);
    }
    for (size_t map = 1; map < first_.size(); ++map) {
      first_[map] += first_[map - 1];
    }
  }

  std::vector<int64_t> first_, regions_, without_map_;
};

// The rows and columns of a map that a region reads, and perhaps some more: [begin, end).
struct Extent {
  std::array<int64_t, 2> rows, columns;

  int64_t area() const {
    return (rows[1] - rows[0]) * (columns[1] - columns[0]);
  }
};

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

struct MapSize {
  int64_t height, width;
  double spatial_scale;
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

// How the channels of a map are cut: in equal blocks of `granule` channels or a multiple, each with no more of the map
// than `bytes`, if that is possible.
struct ChannelBlocks {
  int64_t channels, size;

  ChannelBlocks(int64_t channels, int64_t granule, int64_t channel_bytes, int64_t bytes) : channels(channels) {
    const int64_t fit = std::max(round_down(bytes / channel_bytes, granule), granule);
    size = std::max(round_up(divide_up(channels, std::max<int64_t>(divide_up(channels, fit), 1)), granule), granule);
  }
  int64_t count() const {
    return divide_up(channels, size);
  }
  int64_t begin(int64_t block) const {
    return std::min(block * size, channels);
  }
};

// Some channels of a map, which are neighbours.
template <typename scalar_t>
struct Pixels {
  const scalar_t* data;
  int64_t row, column;
};

// How many neighbouring channels are done at once: their sums stay in registers, their results in the first-level
// cache.
template <typename acc_t>
constexpr int64_t kChunk = 4 * Vectorized<acc_t>::size();

// use(U, first, count) for the channels [first, first + count) of 0 <= n <= kChunk: U whole vectors of them, or one
// that may be a part.
template <typename acc_t, typename Use>
inline void for_vectors(int64_t n, const Use& use) {
  constexpr int64_t kLanes = Vectorized<acc_t>::size();
  int64_t first = 0;
  if (first + 4 * kLanes <= n) {
    use(std::integral_constant<int, 4>(), first, 4 * kLanes);
    first += 4 * kLanes;
  }
  if (first + 2 * kLanes <= n) {
    use(std::integral_constant<int, 2>(), first, 2 * kLanes);
    first += 2 * kLanes;
  }
  for (; first < n; first += kLanes) {
    use(std::integral_constant<int, 1>(), first, std::min(kLanes, n - first));
  }
}

// Hands the results of one region for some channels over to `store`, values[bin * distance + channel] being those.
template <bool kChannelsLast, typename acc_t, typename Store>
inline void store_region(
    int64_t k, Bins bins, int64_t channel, int64_t channels, const acc_t* values, int64_t distance, acc_t* transposed,
    const Store& store) {
  const OutputBlock block{k, channel, channels, 0, bins.height, 0, bins.width};
  if constexpr (kChannelsLast) {
    store(block, values, distance);
  } else {
    transpose(values, distance, transposed, bins.count(), bins.count(), channels);
    store(block, transposed, bins.count());
  }
}

// The levels of a pyramid, for operators whose bins read all channels.
template <typename scalar_t>
struct Pyramid {
  const FeatureMaps<scalar_t>* levels;
  int64_t count, batch, channels;
  int64_t bytes;  // of a map that are transposed at a time

  // Pixels of a row that are transposed together: few, so that around a box not much is.
  static constexpr int64_t kStrip = 64;

  int64_t maps() const {
    return count * batch;
  }
  const FeatureMaps<scalar_t>& level(int64_t map) const {
    return levels[map / batch];
  }
  MapSize size_of(int64_t map) const {
    return {level(map).height, level(map).width, level(map).spatial_scale};
  }
  // Whether a map is not channels_last: it is transposed, a block at a time.
  bool transposed(int64_t map) const {
    return channels > 1 && level(map).view.channel != 1;
  }
  // Transposed blocks have pixels of whole pairs of cache lines, which the hardware fetches together.  Others are not
  // cut: parts of pixels, some power of two apart, would share few sets of the cache.
  ChannelBlocks blocks(int64_t map) const {
    const int64_t itemsize = sizeof(scalar_t);
    if (!transposed(map)) {
      return {channels, std::max<int64_t>(channels, 1), 1, 1};
    }
    return {channels, 2 * kCacheLine / itemsize, level(map).height * level(map).width * itemsize, bytes};
  }
  // A block that begins at a channel, where a transposed one is in `copy`.
  Pixels<scalar_t> pixels(int64_t map, int64_t channel, const scalar_t* copy) const {
    const View4d<scalar_t>& view = level(map).view;
    if (transposed(map)) {
      const int64_t distance = blocks(map).size;
      return {copy, level(map).width * distance, distance};
    }
    return {view.at(map % batch, 0, 0) + channel * view.channel, view.row, view.column};
  }
  ImageTransposition<scalar_t> transposition(int64_t map, int64_t channel, int64_t channels, scalar_t* copy) const {
    const View4d<scalar_t>& view = level(map).view;
    const scalar_t* data = view.at(map % batch, 0, 0) + channel * view.channel;
    const Pixels<scalar_t> to = pixels(map, channel, copy);
    return {
        {{data, view.image, view.channel, view.row, view.column}, 1, channels, level(map).height, level(map).width},
        {copy, 0, 1, to.row, to.column},
        kStrip};
  }
};

// The maps of a pyramid as all operators whose bins read all channels read them: with neighbouring channels.  What is
// not channels_last is copied so, a block at a time, but not where no region is.
template <typename scalar_t>
class ChannelsLastMaps {
 public:
  // extent_of(map, k): what region k reads of its map.
  template <typename ExtentOf>
  ChannelsLastMaps(const Pyramid<scalar_t>& pyramid, const RegionsByMap& regions, const ExtentOf& extent_of)
      : pyramid_(pyramid),
        strips_(pyramid.maps()),
        copy_(0) {
    int64_t largest = 0;
    for (int64_t map = 0; map < pyramid.maps(); ++map) {
      if (pyramid.transposed(map) && regions.begin(map) < regions.begin(map + 1)) {
        list_strips(regions, map, extent_of);
        const FeatureMaps<scalar_t>& level = pyramid.level(map);
        largest = std::max(largest, pyramid.blocks(map).size * level.height * level.width);
      }
    }
    copy_ = Scratch<scalar_t>(largest);
  }

  ChannelBlocks blocks(int64_t map) const {
    return pyramid_.blocks(map);
  }
  // What is to be done before the channels [begin, end) are read: load(map, begin, end, i) for all i < loads(map).
  int64_t loads(int64_t map) const {
    return static_cast<int64_t>(strips_[map].size());
  }
  void load(int64_t map, int64_t begin, int64_t end, int64_t i) const {
    pyramid_.transposition(map, begin, end - begin, copy_.get()).transpose_strip(strips_[map][i]);
  }
  Pixels<scalar_t> pixels(int64_t map, int64_t begin) const {
    return pyramid_.pixels(map, begin, copy_.get());
  }

 private:
  template <typename ExtentOf>
  void list_strips(const RegionsByMap& regions, int64_t map, const ExtentOf& extent_of) {
    const int64_t pixels = pyramid_.level(map).height * pyramid_.level(map).width;
    const auto transposition = pyramid_.transposition(map, 0, 0, nullptr);
    std::vector<bool> read(transposition.strips(), false);
    int64_t area = 0;  // where regions overlap much, all is read
    for (int64_t place = regions.begin(map); place < regions.begin(map + 1) && area < pixels; ++place) {
      const Extent extent = extent_of(map, regions[place]);
      area += extent.area();
      for (int64_t row = extent.rows[0]; row < extent.rows[1] && extent.columns[0] < extent.columns[1]; ++row) {
        const int64_t first = transposition.strip_of(row, extent.columns[0]);
        const int64_t last = transposition.strip_of(row, extent.columns[1] - 1);
        std::fill(read.begin() + first, read.begin() + last + 1, true);
      }
    }
    for (int64_t strip = 0; strip < transposition.strips(); ++strip) {
      if (read[strip] || area >= pixels) {
        strips_[map].push_back(strip);
      }
    }
  }

  const Pyramid<scalar_t>& pyramid_;
  std::vector<std::vector<int64_t>> strips_;
  Scratch<scalar_t> copy_;
};

// run(map, k, begin, end): region k on the channels [begin, end) of its map, for all regions and all blocks of
// channels, after prepare(map, k), once for each region.  Both run on many threads.  `maps` is a ChannelsLastMaps or
// like it.
template <typename Maps, typename Prepare, typename Run>
inline void for_each_region(const Maps& maps, const RegionsByMap& regions, const Prepare& prepare, const Run& run) {
  constexpr int64_t kGrain = 4;  // regions that a thread takes at a time
#pragma omp parallel
  {
    for (int64_t map = 0; map < regions.maps(); ++map) {
#pragma omp for schedule(static) nowait
      for (int64_t place = regions.begin(map); place < regions.begin(map + 1); ++place) {
        prepare(map, regions[place]);
      }
    }
#pragma omp barrier
    for (int64_t map = 0; map < regions.maps(); ++map) {
      const int64_t first = regions.begin(map), last = regions.begin(map + 1);
      const ChannelBlocks blocks = maps.blocks(map);
      for (int64_t block = 0; first < last && block < blocks.count(); ++block) {
        const int64_t begin = blocks.begin(block), end = blocks.begin(block + 1);
        if (maps.loads(map) > 0) {
#pragma omp barrier  // the block before may still be in use
#pragma omp for schedule(static)
          for (int64_t i = 0; i < maps.loads(map); ++i) {
            maps.load(map, begin, end, i);
          }
        }
#pragma omp for schedule(dynamic, kGrain) nowait
        for (int64_t place = first; place < last; ++place) {
          run(map, regions[place], begin, end);
        }
      }
    }
  }
}

// Images whose bins have channels of their own, read as they are: input channel (c * PH + p) * PW + q is for bin (p, q)
// of output channel c.  A block is what one row of bins reads.
template <typename scalar_t>
struct PositionSensitiveMaps {
  FeatureMaps<scalar_t> maps;
  int64_t batch, channels;  // of the output
  Bins bins;

  ChannelBlocks blocks(int64_t) const {
    return {bins.height, 1, 1, 1};
  }
  MapSize size_of(int64_t) const {
    return {maps.height, maps.width, maps.spatial_scale};
  }
  int64_t loads(int64_t) const {
    return 0;
  }
  void load(int64_t, int64_t, int64_t, int64_t) const {
  }
  // The plane that a bin of output channel 0 reads, and how far that of the next channel is.
  const scalar_t* plane(int64_t image, int64_t p, int64_t q) const {
    return maps.view.at(image, 0, 0) + (p * bins.width + q) * maps.view.channel;
  }
  int64_t plane_distance() const {
    return bins.count() * maps.view.channel;
  }
};

// Stores the results of a position-sensitive operator: sum(U, plane, k, p, q) is an array with those of bin (p, q) of
// region k for U output channels, of which `plane` is the first one's.
//
// All output channels of a bin are done in turn: what is known of the bin is used for each, and branches go the same
// way.
template <bool kChannelsLast, typename scalar_t, typename acc_t, typename Prepare, typename Sum, typename Store>
inline void for_each_row_of_bins(
    const PositionSensitiveMaps<scalar_t>& maps, const RegionsByMap& regions, const Prepare& prepare, const Sum& sum,
    const Store& store) {
  const int64_t columns = maps.bins.width, channels = maps.channels, size = columns * channels;
  const Scratch<acc_t> results(omp_get_max_threads() * size);
  for_each_region(maps, regions, prepare, [&](int64_t image, int64_t k, int64_t begin, int64_t end) {
    acc_t* values = results.get() + omp_get_thread_num() * size;
    const int64_t channel_distance = kChannelsLast ? 1 : columns, column_distance = kChannelsLast ? channels : 1;
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t q = 0; q < columns; ++q) {
        const scalar_t* plane = maps.plane(image, p, q);
        acc_t* to = values + q * column_distance;
        int64_t c = 0;
        for (; c + 4 <= channels; c += 4) {
          const auto sums = sum(std::integral_constant<int, 4>(), plane + c * maps.plane_distance(), k, p, q);
          for (int u = 0; u < 4; ++u) {
            to[(c + u) * channel_distance] = sums[u];
          }
        }
        for (; c < channels; ++c) {
          const auto sums = sum(std::integral_constant<int, 1>(), plane + c * maps.plane_distance(), k, p, q);
          to[c * channel_distance] = sums[0];
        }
      }
      store(OutputBlock{k, 0, channels, p, 1, 0, columns}, values, kChannelsLast ? channels : columns);
    }
  });
}

// The maps that gradients are of: one level.
struct GradMaps {
  int64_t batch, channels, height, width;
  double spatial_scale;
  int64_t level;  // of the boxes that count; others are on another
  int64_t bytes;  // of a tile, at most, unless a row of pixels needs more

  MapSize size_of(int64_t) const {
    return {height, width, spatial_scale};
  }
};

// Sums of a part of a gradient: of the channels [begin, end) in the rows [top, bottom) of an image.
template <typename acc_t>
struct GradTile {
  int64_t image;
  int64_t begin, end;
  int64_t top, bottom, width;
  int64_t channel_distance, pixel_distance;
  acc_t* sums;

  int64_t pixels() const {
    return (bottom - top) * width;
  }
};

// How gradients are cut into tiles.  What is summed up in a tile does not depend on the cut.
template <typename acc_t>
class GradTiling {
 public:
  // `by_pixel`: the channels of a pixel are neighbours in a tile, otherwise the pixels of a channel.  `channels_last`:
  // so are they in the output.  In either case a tile has whole cache lines of their sums.
  GradTiling(const GradMaps& maps, bool by_pixel, bool channels_last)
      : maps_(maps),
        by_pixel_(by_pixel),
        blocks_(
            maps.channels, by_pixel || channels_last ? kCacheLine / static_cast<int64_t>(sizeof(acc_t)) : 1,
            maps.height * maps.width * static_cast<int64_t>(sizeof(acc_t)), maps.bytes) {
    const int64_t row = blocks_.size * maps.width * static_cast<int64_t>(sizeof(acc_t));
    const int64_t rows = std::clamp<int64_t>(maps.bytes / row, 1, maps.height);
    const int64_t enough = divide_up(4 * omp_get_max_threads(), std::max<int64_t>(maps.batch * blocks_.count(), 1));
    bands_ = std::min(std::max(divide_up(maps.height, rows), enough), maps.height);
    rows_ = divide_up(maps.height, bands_);
  }

  const GradMaps& maps() const {
    return maps_;
  }
  bool by_pixel() const {
    return by_pixel_;
  }
  // Of a tile, at most.
  int64_t channels() const {
    return blocks_.size;
  }
  int64_t size() const {
    return blocks_.size * rows_ * maps_.width;
  }
  int64_t count() const {
    return maps_.batch * blocks_.count() * bands_;
  }
  GradTile<acc_t> tile(int64_t i, acc_t* sums) const {
    const int64_t image = i / (blocks_.count() * bands_), block = i / bands_ % blocks_.count(), band = i % bands_;
    const int64_t top = maps_.height * band / bands_, bottom = maps_.height * (band + 1) / bands_;
    const int64_t pixels = (bottom - top) * maps_.width;
    return {image,       blocks_.begin(block),   blocks_.begin(block + 1),     top, bottom,
            maps_.width, by_pixel_ ? 1 : pixels, by_pixel_ ? blocks_.size : 1, sums};
  }

 private:
  const GradMaps& maps_;
  bool by_pixel_;
  ChannelBlocks blocks_;
  int64_t bands_, rows_;
};

// values[bin * distance + c - channel] = a region's gradients.
template <typename scalar_t, typename acc_t>
inline void load_bins(
    const View4d<scalar_t>& grad, int64_t k, Bins bins, int64_t channel, int64_t channels, acc_t* values,
    int64_t distance) {
  const bool flat = grad.row == bins.width * grad.column;  // rows follow each other
  const int64_t rows = flat ? 1 : bins.height, columns = flat ? bins.count() : bins.width;
  for (int64_t p = 0; p < rows; ++p, values += columns * distance) {
    const scalar_t* from = grad.at(k, p, 0) + channel * grad.channel;
    load_block(from, grad.column, grad.channel, values, distance, columns, channels);
  }
}

// Sums up each tile and stores it.  add(tile, k) adds what region k, which is on the tile's image, contributes; the
// regions are in the order of the boxes.  prepare(image, k) runs before, once for each region.
template <bool kChannelsLast, typename acc_t, typename Prepare, typename Store, typename Add>
inline void for_each_tile(
    const GradTiling<acc_t>& tiling, const RegionsByMap& regions, const Prepare& prepare, const Store& store,
    const Add& add) {
  const int threads = omp_get_max_threads();
  const int64_t row = tiling.channels() * tiling.maps().width;
  const Scratch<acc_t> tiles(threads * tiling.size()), rows(threads * row);
#pragma omp parallel num_threads(threads)
  {
    for (int64_t image = 0; image < regions.maps(); ++image) {
#pragma omp for schedule(static) nowait
      for (int64_t place = regions.begin(image); place < regions.begin(image + 1); ++place) {
        prepare(image, regions[place]);
      }
    }
#pragma omp barrier
    acc_t* transposed = rows.get() + omp_get_thread_num() * row;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tiling.count(); ++i) {
      const GradTile<acc_t> tile = tiling.tile(i, tiles.get() + omp_get_thread_num() * tiling.size());
      const int64_t channels = tile.end - tile.begin;
      std::fill_n(tile.sums, tiling.by_pixel() ? tiling.size() : channels * tile.pixels(), acc_t(0));
      for (int64_t place = regions.begin(tile.image); place < regions.begin(tile.image + 1); ++place) {
        add(tile, regions[place]);
      }
      const int64_t distance = tiling.by_pixel() ? tile.pixel_distance : tile.channel_distance;
      if (kChannelsLast == tiling.by_pixel()) {
        store(
            OutputBlock{tile.image, tile.begin, channels, tile.top, tile.bottom - tile.top, 0, tile.width}, tile.sums,
            distance);
        continue;
      }
      for (int64_t y = tile.top; y < tile.bottom; ++y) {
        const acc_t* from = tile.sums + (y - tile.top) * tile.width * tile.pixel_distance;
        const int64_t rows = tiling.by_pixel() ? tile.width : channels, columns = channels * tile.width / rows;
        transpose(from, distance, transposed, rows, rows, columns);
        store(OutputBlock{tile.image, tile.begin, channels, y, 1, 0, tile.width}, transposed, rows);
      }
    }
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_REGIONS_H
