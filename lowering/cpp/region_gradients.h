// The gradients of maps, from those of regions.
//
// A block of a map, or a band of its rows, is a tile that one thread sums up in cache, region by region, in their
// order: no two threads write to the same place, and no sum depends on how many there are.
#ifndef INDUCTOR_VISION_REGION_GRADIENTS_H
#define INDUCTOR_VISION_REGION_GRADIENTS_H

#include "base.h"
#include "regions.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

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

#endif  // INDUCTOR_VISION_REGION_GRADIENTS_H
