// RoIPool: the maximum of each bin, and where it is.
//
//   out[k, c, p, q] = max of map[c, y, x] over the rows and columns of bin (p, q);  argmax = y * W + x of the first
//
// A bin without pixels is 0, and its argmax -1.  Channels are the vector.
#ifndef INDUCTOR_VISION_ROI_POOL_H
#define INDUCTOR_VISION_ROI_POOL_H

#include <cstring>
#include <limits>

#include "base.h"
#include "region_gradients.h"
#include "region_maps.h"
#include "region_sampling.h"
#include "regions.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// An index in the bits of a floating number of the same size: it moves through vectors with the values.
template <typename acc_t>
inline acc_t index_bits(int64_t index) {
  const at::vec::int_same_size_t<acc_t> same_size = static_cast<at::vec::int_same_size_t<acc_t>>(index);
  acc_t bits;
  std::memcpy(&bits, &same_size, sizeof(bits));
  return bits;
}

// The reverse of index_bits, for a block: dst[m * ld_dst + n] = src[m * ld_src + n].
template <typename acc_t>
inline void store_indices(
    const acc_t* src, int64_t ld_src, int32_t* dst, int64_t ld_dst, int64_t rows, int64_t columns) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) {
      at::vec::int_same_size_t<acc_t> index;
      std::memcpy(&index, src + m * ld_src + n, sizeof(index));
      dst[m * ld_dst + n] = static_cast<int32_t>(index);
    }
  }
}

// best = max(best, value), and argmax = index where that changed it.  NaN changes nothing.
template <bool kArgmax, typename acc_t>
inline void update_maximum(
    const Vectorized<acc_t>& value, const Vectorized<acc_t>& index, Vectorized<acc_t>& best,
    Vectorized<acc_t>& argmax) {
#if defined(CPU_CAPABILITY_AVX512)
  // at::vec makes vectors of comparisons and comparisons of vectors again: half of the kernel's time.
  if constexpr (std::is_same_v<acc_t, float>) {
    const __mmask16 greater = _mm512_cmp_ps_mask(value, best, _CMP_GT_OQ);
    best = _mm512_mask_mov_ps(best, greater, value);
    argmax = kArgmax ? Vectorized<acc_t>(_mm512_mask_mov_ps(argmax, greater, index)) : argmax;
    return;
  }
#endif
  const Vectorized<acc_t> greater = value > best;
  best = Vectorized<acc_t>::blendv(best, value, greater);
  if constexpr (kArgmax) {
    argmax = Vectorized<acc_t>::blendv(argmax, index, greater);
  }
}

// Bins (p, q) of `count` channels into best and argmax, [p * PW + q][kChunk], for U vectors of channels.
template <int U, bool kArgmax, typename scalar_t, typename acc_t>
inline void pool_bins(
    const PixelRanges& ranges, int64_t k, Bins bins, const Pixels<scalar_t>& pixels, int64_t width, int64_t count,
    acc_t* best_out, acc_t* argmax_out) {
  using Vec = Vectorized<acc_t>;
  constexpr int64_t kLanes = Vec::size();
  for (int64_t p = 0; p < bins.height; ++p) {
    const auto [top, bottom] = ranges.rows(k, p);
    for (int64_t q = 0; q < bins.width; ++q, best_out += kChunk<acc_t>, argmax_out += kArgmax ? kChunk<acc_t> : 0) {
      const auto [left, right] = ranges.columns(k, q);
      const bool empty = top == bottom || left == right;
      // Not the lowest of double: torchvision's search begins there in every type.
      const Vec lowest(empty ? acc_t(0) : static_cast<acc_t>(std::numeric_limits<float>::lowest()));
      const Vec none(index_bits<acc_t>(-1));
      auto best = generate<U>([&](int) { return lowest; });
      auto argmax = generate<U>([&](int) { return none; });
      for (int64_t y = top; y < bottom; ++y) {
        const scalar_t* row = pixels.data + y * pixels.row;
        for (int64_t x = left; x < right; ++x) {
          const scalar_t* channels = row + x * pixels.column;
          const Vec index(kArgmax ? index_bits<acc_t>(y * width + x) : acc_t(0));
          ForcedUnroll<U>{}([&](auto u) {
            const Vec value = U == 1 ? load_vector(channels, count) : load_vector(channels + u * kLanes);
            update_maximum<kArgmax>(value, index, best[u], argmax[u]);
          });
        }
      }
      ForcedUnroll<U>{}([&](auto u) {
        best[u].store(best_out + u * kLanes);
        if constexpr (kArgmax) {
          argmax[u].store(argmax_out + u * kLanes);
        }
      });
    }
  }
}

// kChannelsLast: of the outputs that `store` and `store_argmax` are for, see OutputBlock; the latter gets index_bits,
// if kArgmax.
template <bool kChannelsLast, bool kArgmax, typename scalar_t, typename box_t, typename Store, typename StoreArgmax>
inline void roi_pool(
    const Pyramid<scalar_t>& pyramid, const Boxes<box_t>& boxes, Bins bins, const Store& store,
    const StoreArgmax& store_argmax) {
  using acc_t = accumulate_t<scalar_t>;
  const FeatureMaps<scalar_t>& level = pyramid.levels[0];
  const RegionsByMap regions("roi_pool", boxes, 1, pyramid.batch);
  const PixelRanges ranges = pooled_ranges<acc_t>(boxes, bins, level.spatial_scale, true, level.height, level.width);
  const int64_t tile = bins.count() * kChunk<acc_t>;
  const Scratch<acc_t> tiles(3 * omp_get_max_threads() * tile);
  const ChannelsLastMaps<scalar_t> maps(pyramid, regions, [&](int64_t, int64_t k) { return ranges.extent(k); }, true);
  const auto nothing = [](int64_t, int64_t) {};
  for_each_region(maps, regions, nothing, [&](int64_t map, int64_t k, int64_t begin, int64_t end) {
    acc_t* best = tiles.get() + 3 * omp_get_thread_num() * tile;
    acc_t *argmax = best + tile, *transposed = best + 2 * tile;
    const Pixels<scalar_t> pixels = maps.pixels(map);
    for (int64_t c = begin; c < end; c += kChunk<acc_t>) {
      const int64_t n = std::min(kChunk<acc_t>, end - c);
      for_vectors<acc_t>(n, [&](auto vectors, int64_t first, int64_t count) {
        const Pixels<scalar_t> from{pixels.data + (c - begin) + first, pixels.row, pixels.column};
        pool_bins<decltype(vectors)::value, kArgmax>(
            ranges, k, bins, from, level.width, count, best + first, argmax + first);
      });
      store_region<kChannelsLast>(k, bins, c, n, best, kChunk<acc_t>, transposed, store);
      if constexpr (kArgmax) {
        store_region<kChannelsLast>(k, bins, c, n, argmax, kChunk<acc_t>, transposed, store_argmax);
      }
    }
  });
}

// Some channels of a region, [C, PH, PW]: values[c * channel + (p * PW + q) * bin].
template <typename T>
struct RegionBins {
  const T* values;
  int64_t channel, bin;

  // Bins whose values are not neighbours are copied first: loads of copies overlap, those between scattered sums
  // do not.
  RegionBins(const View4d<T>& view, int64_t k, Bins bins, int64_t first, int64_t channels, T* copy)
      : values(view.at(k, 0, 0) + first * view.channel),
        channel(view.channel),
        bin(1) {
    if (view.column == 1 && view.row == bins.width) {
      return;
    }
    values = copy;
    channel = 1;
    bin = channels;
    for (int64_t p = 0; p < bins.height; ++p) {
      for (int64_t q = 0; q < bins.width; ++q, copy += channels) {
        const T* from = view.at(k, p, q) + first * view.channel;
        if (view.channel == 1) {
          std::memcpy(copy, from, channels * sizeof(T));
          continue;
        }
        for (int64_t c = 0; c < channels; ++c) {
          copy[c] = from[c * view.channel];
        }
      }
    }
  }
};

// The gradient of the maximum goes to where it was found; an argmax that is not in the plane has none.
template <bool kChannelsLast, typename scalar_t, typename box_t, typename Store>
inline void roi_pool_backward(
    const View4d<scalar_t>& grad, const View4d<int32_t>& argmax, const Boxes<box_t>& boxes, Bins bins,
    const GradMaps& maps, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  const RegionsByMap regions = RegionsByMap::in_order("roi_pool", boxes, maps.level, maps.batch);
  const GradTiling<acc_t> tiling(maps, false, kChannelsLast);
  const int64_t size = bins.count() * tiling.channels();
  const Scratch<scalar_t> grads(omp_get_max_threads() * size);
  const Scratch<int32_t> places(omp_get_max_threads() * size);
  const auto nothing = [](int64_t, int64_t) {};
  for_each_tile<kChannelsLast>(tiling, regions, nothing, store, [&](const GradTile<acc_t>& tile, int64_t k) {
    const int64_t mine = omp_get_thread_num() * size, channels = tile.end - tile.begin;
    const RegionBins<scalar_t> from(grad, k, bins, tile.begin, channels, grads.get() + mine);
    const RegionBins<int32_t> at(argmax, k, bins, tile.begin, channels, places.get() + mine);
    const uint64_t pixels = static_cast<uint64_t>(tile.pixels());
    for (int64_t c = 0; c < channels; ++c) {
      acc_t* sums = tile.sums + c * tile.channel_distance;
      for (int64_t bin = 0; bin < bins.count(); ++bin) {
        const int64_t pixel = at.values[c * at.channel + bin * at.bin] - tile.top * tile.width;
        if (static_cast<uint64_t>(pixel) < pixels) {
          sums[pixel] += static_cast<acc_t>(from.values[c * from.channel + bin * from.bin]);
        }
      }
    }
  });
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_ROI_POOL_H
