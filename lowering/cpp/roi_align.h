// RoIAlign on one or several levels, forward and backward.
//
//   out[k, c, p, q] = 1 / max(ny * nx, 1) * sum over i < ny, j < nx of bilinear(map[c], y(p, i), x(q, j))
//
// The ny x nx samples of a bin are a grid, so the weights of the pixels around them are a product of weights of rows
// and of columns (TapTable): a pixel that several samples share is read once.  Channels are the vector.
#ifndef INDUCTOR_VISION_ROI_ALIGN_H
#define INDUCTOR_VISION_ROI_ALIGN_H

#include "base.h"
#include "region_gradients.h"
#include "region_maps.h"
#include "region_sampling.h"
#include "regions.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// Bins [p][q] of `count` channels into out[(p * PW + q) * kChunk], for U vectors of channels.
template <int U, typename scalar_t, typename acc_t>
inline void align_bins(
    const TapTable<acc_t>& taps, int64_t k, Bins bins, const Pixels<scalar_t>& pixels, int64_t count, acc_t* out) {
  using Vec = Vectorized<acc_t>;
  constexpr int64_t kLanes = Vec::size();
  const Vec scale(taps.scale(k));
  for (int64_t p = 0; p < bins.height; ++p) {
    for (int64_t q = 0; q < bins.width; ++q, out += kChunk<acc_t>) {
      auto sum = generate<U>([](int) { return Vec(0); });
      for (const Tap<acc_t>& row : taps.rows(k, p)) {
        const scalar_t* from = pixels.data + row.offset;
        auto part = generate<U>([](int) { return Vec(0); });
        for (const Tap<acc_t>& column : taps.columns(k, q)) {
          const Vec weight(column.weight);
          ForcedUnroll<U>{}([&](auto u) {
            const scalar_t* channels = from + column.offset + u * kLanes;
            const Vec value = U == 1 ? load_vector(channels, count) : load_vector(channels);
            part[u] = ::at::vec::fmadd(weight, value, part[u]);
          });
        }
        const Vec weight(row.weight);
        ForcedUnroll<U>{}([&](auto u) { sum[u] = ::at::vec::fmadd(weight, part[u], sum[u]); });
      }
      ForcedUnroll<U>{}([&](auto u) { (sum[u] * scale).store(out + u * kLanes); });
    }
  }
}

// kChannelsLast: of the output that `store` is for, see OutputBlock.
template <bool kChannelsLast, typename scalar_t, typename box_t, typename Store>
inline void roi_align(
    const Pyramid<scalar_t>& pyramid, const Boxes<box_t>& boxes, Bins bins, const GridSampling& sampling,
    const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  const RegionsByMap regions("roi_align", boxes, pyramid.count, pyramid.batch);
  const SampledRegions<acc_t, box_t> sampled(pyramid, boxes, regions, bins, sampling);
  const int64_t tile = bins.count() * kChunk<acc_t>;
  const Scratch<acc_t> tiles(2 * omp_get_max_threads() * tile);

  const ChannelsLastMaps<scalar_t> maps(
      pyramid, regions, [&](int64_t map, int64_t k) { return sampled.extent(map, k); }, false);
  const auto prepare = [&](int64_t map, int64_t k) {
    const Pixels<scalar_t> distances = maps.pixels(map);
    sampled.place(map, k, distances.row, distances.column);
  };
  for_each_region(maps, regions, prepare, [&](int64_t map, int64_t k, int64_t begin, int64_t end) {
    acc_t* values = tiles.get() + 2 * omp_get_thread_num() * tile;
    const Pixels<scalar_t> pixels = maps.pixels(map);
    for (int64_t c = begin; c < end; c += kChunk<acc_t>) {
      const int64_t n = std::min(kChunk<acc_t>, end - c);
      for_vectors<acc_t>(n, [&](auto vectors, int64_t first, int64_t count) {
        const Pixels<scalar_t> from{pixels.data + (c - begin) + first, pixels.row, pixels.column};
        align_bins<decltype(vectors)::value>(sampled.taps(), k, bins, from, count, values + first);
      });
      store_region<kChannelsLast>(k, bins, c, n, values, kChunk<acc_t>, values + tile, store);
    }
  });
  std::fill_n(tiles.get(), tile, acc_t(0));
  for (const int64_t k : regions.without_map()) {
    for (int64_t c = 0; c < pyramid.channels; c += kChunk<acc_t>) {
      const int64_t n = std::min(kChunk<acc_t>, pyramid.channels - c);
      store_region<kChannelsLast>(k, bins, c, n, tiles.get(), kChunk<acc_t>, tiles.get() + tile, store);
    }
  }
}

// Adds what region k contributes to `count` channels of a tile, from its `first` channel on, for U vectors of them. The
// gradients of a bin are `bin_distance` from those of the next.
template <int U, typename acc_t>
inline void align_bins_backward(
    const TapTable<acc_t>& taps, int64_t k, Bins bins, const GradTile<acc_t>& tile, const acc_t* grad,
    int64_t bin_distance, int64_t first, int64_t count) {
  using Vec = Vectorized<acc_t>;
  constexpr int64_t kLanes = Vec::size();
  const Vec scale(taps.scale(k));
  const int64_t row_distance = tile.width * tile.pixel_distance;
  const int64_t top = tile.top * row_distance, bottom = tile.bottom * row_distance;
  for (int64_t p = 0; p < bins.height; ++p) {
    for (int64_t q = 0; q < bins.width; ++q) {
      const acc_t* from = grad + (p * bins.width + q) * bin_distance + first;
      const auto value = generate<U>(
          [&](int u) { return (U == 1 ? Vec::loadu(from, count) : Vec::loadu(from + u * kLanes)) * scale; });
      for (const Tap<acc_t>& row : taps.rows(k, p)) {
        if (row.offset < top || row.offset >= bottom) {
          continue;
        }
        acc_t* to = tile.sums + (row.offset - top) + first;
        const Vec row_weight(row.weight);
        const auto share = generate<U>([&](int u) { return value[u] * row_weight; });
        for (const Tap<acc_t>& column : taps.columns(k, q)) {
          const Vec weight(column.weight);
          ForcedUnroll<U>{}([&](auto u) {
            acc_t* sum = to + column.offset + u * kLanes;
            ::at::vec::fmadd(weight, share[u], Vec::loadu(sum)).store(sum);
          });
        }
      }
    }
  }
}

// The gradient of one level, by the regions that are on it.  kChannelsLast: of the output that `store` is for.
template <bool kChannelsLast, typename scalar_t, typename box_t, typename Store>
inline void roi_align_backward(
    const View4d<scalar_t>& grad, const Boxes<box_t>& boxes, Bins bins, const GridSampling& sampling,
    const GradMaps& maps, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  const RegionsByMap regions = RegionsByMap::in_order("roi_align", boxes, maps.level, maps.batch);
  const SampledRegions<acc_t, box_t> sampled(maps, boxes, regions, bins, sampling);
  const GradTiling<acc_t> tiling(maps, true, kChannelsLast);
  const Scratch<acc_t> grads(omp_get_max_threads() * bins.count() * tiling.channels());
  const auto prepare = [&](int64_t map, int64_t k) {
    sampled.place(map, k, maps.width * tiling.channels(), tiling.channels());
  };
  for_each_tile<kChannelsLast>(tiling, regions, prepare, store, [&](const GradTile<acc_t>& tile, int64_t k) {
    const auto [top, bottom] = sampled.extent(tile.image, k).rows;
    if (bottom <= tile.top || top >= tile.bottom) {
      return;
    }
    acc_t* mine = grads.get() + omp_get_thread_num() * bins.count() * tiling.channels();
    const int64_t channels = tile.end - tile.begin;
    load_bins(grad, k, bins, tile.begin, channels, mine, tile.pixel_distance);
    for (int64_t c = 0; c < channels; c += kChunk<acc_t>) {
      for_vectors<acc_t>(std::min(kChunk<acc_t>, channels - c), [&](auto vectors, int64_t first, int64_t count) {
        align_bins_backward<decltype(vectors)::value>(
            sampled.taps(), k, bins, tile, mine, tile.pixel_distance, c + first, count);
      });
    }
  });
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_ROI_ALIGN_H
