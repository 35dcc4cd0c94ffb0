// Which regions of interest there are, and on which maps: what the kernels of all operators on regions share.
//
//   region      a box (image, x1, y1, x2, y2), K of them; its P = PH x PW bins
//   map         an image [C, H, W] of one of the levels of a pyramid, [B, C, H, W] each
//   block       some channels of a map: as many as fit in cache
//
// Where bins sample a map is in region_sampling.h, how maps are read forward in region_maps.h, and how their gradients
// are summed up in region_gradients.h.
#ifndef INDUCTOR_VISION_REGIONS_H
#define INDUCTOR_VISION_REGIONS_H

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "base.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

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

struct MapSize {
  int64_t height, width;
  double spatial_scale;
};

// How the channels of a map are cut: in equal blocks of `granule` channels or a multiple, each with no more of the map
// than `bytes`, if that is possible.
struct ChannelBlocks {
  int64_t channels, size;

  ChannelBlocks(int64_t channels, int64_t granule, int64_t channel_bytes, int64_t bytes) : channels(channels) {
    const int64_t fit = std::max(round_down(bytes / channel_bytes, granule), granule);
    size = std::max(round_up(divide_up(channels, std::max<int64_t>(divide_up(channels, fit), 1)), granule), granule);
  }
  static ChannelBlocks whole(int64_t channels) {
    return {channels, std::max<int64_t>(channels, 1), 1, 1};
  }
  int64_t count() const {
    return divide_up(channels, size);
  }
  int64_t begin(int64_t block) const {
    return std::min(block * size, channels);
  }
};

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_REGIONS_H
