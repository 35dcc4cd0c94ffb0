// Position-sensitive RoIAlign, forward and backward: bin (p, q) of output channel c samples input channel
// (c * PH + p) * PW + q.
//
//   out[k, c, p, q] = 1 / (ny * nx) * sum over i < ny, j < nx of bilinear(map[(c * PH + p) * PW + q], y(p, i), x(q, j))
//
// No two bins read the same channel, so there is no vector of channels: maps are read as they are.
#ifndef INDUCTOR_VISION_PS_ROI_ALIGN_H
#define INDUCTOR_VISION_PS_ROI_ALIGN_H

#include "base.h"
#include "region_gradients.h"
#include "region_maps.h"
#include "region_sampling.h"
#include "regions.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// kChannelsLast: of the output that `store` is for, see OutputBlock.
template <bool kChannelsLast, typename scalar_t, typename box_t, typename Store>
inline void ps_roi_align(
    const PositionSensitiveMaps<scalar_t>& maps, const Boxes<box_t>& boxes, const GridSampling& sampling,
    const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  const RegionsByMap regions("ps_roi_align", boxes, 1, maps.batch);
  const SampledRegions<acc_t, box_t> sampled(maps, boxes, regions, maps.bins, sampling);
  const TapTable<acc_t>& taps = sampled.taps();
  const auto prepare = [&](int64_t image, int64_t k) {
    sampled.place(image, k, maps.maps.view.row, maps.maps.view.column);
  };
  const auto sum = [&](auto planes, const scalar_t* plane, int64_t k, int64_t p, int64_t q) {
    constexpr int U = decltype(planes)::value;
    std::array<acc_t, U> sums{};
    for (const Tap<acc_t>& row : taps.rows(k, p)) {
      std::array<acc_t, U> parts{};
      for (const Tap<acc_t>& column : taps.columns(k, q)) {
        const scalar_t* pixel = plane + row.offset + column.offset;
        ForcedUnroll<U>{}(
            [&](auto u) { parts[u] += column.weight * static_cast<acc_t>(pixel[u * maps.plane_distance()]); });
      }
      ForcedUnroll<U>{}([&](auto u) { sums[u] += row.weight * parts[u]; });
    }
    ForcedUnroll<U>{}([&](auto u) { sums[u] *= taps.scale(k); });
    return sums;
  };
  for_each_row_of_bins<kChannelsLast, scalar_t, acc_t>(maps, regions, prepare, sum, store);
}

// The gradient of the maps.  kChannelsLast: of the output that `store` is for.
template <bool kChannelsLast, typename scalar_t, typename box_t, typename Store>
inline void ps_roi_align_backward(
    const View4d<scalar_t>& grad, const Boxes<box_t>& boxes, Bins bins, const GridSampling& sampling,
    const GradMaps& maps, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  const RegionsByMap regions = RegionsByMap::in_order("ps_roi_align", boxes, maps.level, maps.batch);
  const SampledRegions<acc_t, box_t> sampled(maps, boxes, regions, bins, sampling);
  const TapTable<acc_t>& taps = sampled.taps();
  const GradTiling<acc_t> tiling(maps, false, kChannelsLast);
  const auto prepare = [&](int64_t image, int64_t k) { sampled.place(image, k, maps.width, 1); };
  for_each_tile<kChannelsLast>(tiling, regions, prepare, store, [&](const GradTile<acc_t>& tile, int64_t k) {
    const int64_t top = tile.top * tile.width, bottom = tile.bottom * tile.width;
    for (int64_t channel = tile.begin; channel < tile.end; ++channel) {
      const int64_t c = channel / bins.count(), p = channel / bins.width % bins.height, q = channel % bins.width;
      const acc_t value = static_cast<acc_t>(grad.at(k, p, q)[c * grad.channel]) * taps.scale(k);
      acc_t* sums = tile.sums + (channel - tile.begin) * tile.channel_distance;
      for (const Tap<acc_t>& row : taps.rows(k, p)) {
        if (row.offset < top || row.offset >= bottom) {
          continue;
        }
        const acc_t share = value * row.weight;
        for (const Tap<acc_t>& column : taps.columns(k, q)) {
          sums[row.offset - top + column.offset] += share * column.weight;
        }
      }
    }
  });
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_PS_ROI_ALIGN_H
