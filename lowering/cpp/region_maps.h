// The maps that regions are read from: pyramids whose bins read all channels, and maps whose bins have channels of
// their own.
//
// A block of a map is read by all its regions while it is in cache; each region's results are its own.
#ifndef INDUCTOR_VISION_REGION_MAPS_H
#define INDUCTOR_VISION_REGION_MAPS_H

#include <vector>

#include "base.h"
#include "regions.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// One level of a pyramid.
template <typename scalar_t>
struct FeatureMaps {
  View4d<scalar_t> view;
  int64_t height, width;
  double spatial_scale;
};

// Some channels of a map, which are neighbours.
template <typename scalar_t>
struct Pixels {
  const scalar_t* data;
  int64_t row, column;
};

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
  int64_t bytes;  // of a map that are read at a time, if it is cut

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
  int64_t pixels(int64_t map) const {
    return level(map).height * level(map).width;
  }
  // Blocks have pixels of whole pairs of cache lines, which the hardware fetches together.
  ChannelBlocks blocks(int64_t map) const {
    const int64_t itemsize = sizeof(scalar_t);
    return {channels, 2 * kCacheLine / itemsize, pixels(map) * itemsize, bytes};
  }
  // Whether a map is copied, a block of channels at a time: one that is not channels_last, and one that is far too
  // large for the cache if its pixels are read so often that a copy of them is little beside that.  Such blocks are not
  // read where they are: parts of pixels, some power of two apart, share few sets of the cache.
  bool copied(int64_t map, int64_t reads) const {
    const int64_t size = pixels(map) * channels * static_cast<int64_t>(sizeof(scalar_t));
    const bool channels_last = channels <= 1 || level(map).view.channel == 1;
    return !channels_last || (size > 4 * bytes && reads > 16 * pixels(map));
  }
  // The map itself, and the copy of a block of it.
  Pixels<scalar_t> pixels_in_place(int64_t map) const {
    const View4d<scalar_t>& view = level(map).view;
    return {view.at(map % batch, 0, 0), view.row, view.column};
  }
  Pixels<scalar_t> pixels_of_copy(int64_t map, const scalar_t* copy) const {
    const int64_t distance = blocks(map).size;
    return {copy, level(map).width * distance, distance};
  }
  ImageTransposition<scalar_t> transposition(int64_t map, int64_t channel, int64_t channels, scalar_t* copy) const {
    const View4d<scalar_t>& view = level(map).view;
    const scalar_t* data = view.at(map % batch, 0, 0) + channel * view.channel;
    const Pixels<scalar_t> to = pixels_of_copy(map, copy);
    return {
        {{data, view.image, view.channel, view.row, view.column}, 1, channels, level(map).height, level(map).width},
        {copy, 0, 1, to.row, to.column},
        kStrip};
  }
};

// The maps of a pyramid as all operators whose bins read all channels read them: with neighbouring channels.  What is
// not channels_last, or is read in blocks, is copied so, a block at a time, but not where no region is.
template <typename scalar_t>
class ChannelsLastMaps {
 public:
  // extent_of(map, k): where region k reads its map: every pixel there, or some.
  template <typename ExtentOf>
  ChannelsLastMaps(
      const Pyramid<scalar_t>& pyramid, const RegionsByMap& regions, const ExtentOf& extent_of, bool every_pixel)
      : pyramid_(pyramid),
        copied_(pyramid.maps()),
        strips_(pyramid.maps()),
        copy_(0) {
    int64_t largest = 0;
    for (int64_t map = 0; map < pyramid.maps(); ++map) {
      int64_t reads = 0;
      for (int64_t place = regions.begin(map); every_pixel && place < regions.begin(map + 1); ++place) {
        reads += extent_of(map, regions[place]).area();
      }
      copied_[map] = pyramid.copied(map, reads);
      if (copied_[map] && regions.begin(map) < regions.begin(map + 1)) {
        list_strips(regions, map, extent_of);
        largest = std::max(largest, pyramid.blocks(map).size * pyramid.pixels(map));
      }
    }
    copy_ = Scratch<scalar_t>(largest);
  }

  ChannelBlocks blocks(int64_t map) const {
    return copied_[map] ? pyramid_.blocks(map) : ChannelBlocks::whole(pyramid_.channels);
  }
  // What is to be done before the channels [begin, end) are read: load(map, begin, end, i) for all i < loads(map).
  int64_t loads(int64_t map) const {
    return static_cast<int64_t>(strips_[map].size());
  }
  void load(int64_t map, int64_t begin, int64_t end, int64_t i) const {
    pyramid_.transposition(map, begin, end - begin, copy_.get()).transpose_strip(strips_[map][i]);
  }
  Pixels<scalar_t> pixels(int64_t map) const {
    return copied_[map] ? pyramid_.pixels_of_copy(map, copy_.get()) : pyramid_.pixels_in_place(map);
  }

 private:
  template <typename ExtentOf>
  void list_strips(const RegionsByMap& regions, int64_t map, const ExtentOf& extent_of) {
    const int64_t pixels = pyramid_.pixels(map);
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
  std::vector<bool> copied_;
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

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_REGION_MAPS_H
