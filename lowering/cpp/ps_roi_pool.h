// Position-sensitive RoIPool, forward and backward: bin (p, q) of output channel c averages input channel
// (c * PH + p) * PW + q.
//
//   out[k, c, p, q] = mean of map[(c * PH + p) * PW + q] over the pixels of bin (p, q)
//
// As in torchvision bins are cut off before the last row and column of the map, but backward behind them.
#ifndef INDUCTOR_VISION_PS_ROI_POOL_H
#define INDUCTOR_VISION_PS_ROI_POOL_H

#include "base.h"
#include "region_gradients.h"
#include "region_maps.h"
#include "region_sampling.h"
#include "regions.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// kChannelsLast: of the output that `store` is for, see OutputBlock.
template <bool kChannelsLast, typename scalar_t, typename box_t, typename Store>
inline void ps_roi_pool(const PositionSensitiveMaps<scalar_t>& maps, const Boxes<box_t>& boxes, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  const RegionsByMap regions("ps_roi_pool", boxes, 1, maps.batch);
  const PixelRanges ranges =
      pooled_ranges<acc_t>(boxes, maps.bins, maps.maps.spatial_scale, false, maps.maps.height - 1, maps.maps.width - 1);
  const int64_t row_distance = maps.maps.view.row, column_distance = maps.maps.view.column;
  const auto nothing = [](int64_t, int64_t) {};
  const auto mean = [&](auto planes, const scalar_t* plane, int64_t k, int64_t p, int64_t q) {
    constexpr int U = decltype(planes)::value;
    const auto [top, bottom] = ranges.rows(k, p);
    const auto [left, right] = ranges.columns(k, q);
    std::array<acc_t, U> sums{};
    for (int64_t y = top; y < bottom; ++y) {
      const scalar_t* pixel = plane + y * row_distance + left * column_distance;
      for (int64_t x = left; x < right; ++x, pixel += column_distance) {
        ForcedUnroll<U>{}([&](auto u) { sums[u] += static_cast<acc_t>(pixel[u * maps.plane_distance()]); });
      }
    }
    const acc_t area = static_cast<acc_t>(std::max<int64_t>((bottom - top) * (right - left), 1));
    ForcedUnroll<U>{}([&](auto u) { sums[u] /= area; });
    return sums;
  };
  for_each_row_of_bins<kChannelsLast, scalar_t, acc_t>(maps, regions, nothing, mean, store);
}

// The gradient of the maps.  kChannelsLast: of the output that `store` is for.
template <bool kChannelsLast, typename scalar_t, typename box_t, typename Store>
inline void ps_roi_pool_backward(
    const View4d<scalar_t>& grad, const Boxes<box_t>& boxes, Bins bins, const GradMaps& maps, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  const RegionsByMap regions = RegionsByMap::in_order("ps_roi_pool", boxes, maps.level, maps.batch);
  const PixelRanges ranges = pooled_ranges<acc_t>(boxes, bins, maps.spatial_scale, false, maps.height, maps.width);
  const GradTiling<acc_t> tiling(maps, false, kChannelsLast);
  const auto nothing = [](int64_t, int64_t) {};
  for_each_tile<kChannelsLast>(tiling, regions, nothing, store, [&](const GradTile<acc_t>& tile, int64_t k) {
    for (int64_t channel = tile.begin; channel < tile.end; ++channel) {
      const int64_t c = channel / bins.count(), p = channel / bins.width % bins.height, q = channel % bins.width;
      const auto [top, bottom] = ranges.rows(k, p);
      const auto [left, right] = ranges.columns(k, q);
      const acc_t area = static_cast<acc_t>(std::max<int64_t>((bottom - top) * (right - left), 1));
      const acc_t share = static_cast<acc_t>(grad.at(k, p, q)[c * grad.channel]) / area;
      acc_t* sums = tile.sums + (channel - tile.begin) * tile.channel_distance;
      for (int64_t y = std::max(top, tile.top); y < std::min(bottom, tile.bottom); ++y) {
        for (int64_t x = left; x < right; ++x) {
          sums[(y - tile.top) * tile.width + x] += share;
        }
      }
    }
  });
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_PS_ROI_POOL_H
