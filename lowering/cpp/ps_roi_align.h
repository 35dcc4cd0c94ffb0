// Position-sensitive RoIAlign, forward and backward: bin (p, q) of output channel c samples input channel
// (c * PH + p) * PW + q.
//
//   out[k, c, p, q] = 1 / (ny * nx) * sum over i < ny, j < nx of bilinear(map[(c * PH + p) * PW + q], y(p, i), x(q, j))
//
// No two bins read the same channel, so there is no vector of channels: maps are read as they are.
#ifndef INDUCTOR_VISION_PS_ROI_ALIGN_H
#define INDUCTOR_VISION_PS_ROI_ALIGN_H

#include "base.h"
#include "regions.h"

namespace inductor_vision {

// kChannelsLast: of the output that `store` is for, see OutputBlock.
template <bool kChannelsLast, typename scalar_t, typename box_t, typename Store>
inline void ps_roi_align(
    const PositionSensitiveMaps<scalar_t>& maps, const Boxes<box_t>& boxes, const GridSampling& sampling,
    const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  const Bins bins = maps.bins;
  const RegionsByMap regions("ps_roi_align", boxes, 1, maps.batch);
  const SampledRegions<acc_t, box_t> sampled(maps, boxes, regions, bins, sampling);
  const TapTable<acc_t>& taps = sampled.taps();
  const int64_t results = bins.count() * maps.blocks(0).size;
  const Scratch<acc_t> all_results(omp_get_max_threads() * results);
  const auto prepare = [&](int64_t image, int64_t k) {
    sampled.place(image, k, maps.maps.view.row, maps.maps.view.column);
  };
  for_each_region(maps, regions, prepare, [&](int64_t image, int64_t k, int64_t begin, int64_t end) {
    acc_t* values = all_results.get() + omp_get_thread_num() * results;
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t p = 0; p < bins.height; ++p) {
        for (int64_t q = 0; q < bins.width; ++q) {
          const scalar_t* plane = maps.plane(image, c, p, q);
          acc_t sum = 0;
          for (const Tap<acc_t>& row : taps.rows(k, p)) {
            acc_t part = 0;
            for (const Tap<acc_t>& column : taps.columns(k, q)) {
              part += column.weight * static_cast<acc_t>(plane[row.offset + column.offset]);
            }
            sum += row.weight * part;
          }
          values[result_at<kChannelsLast>(bins, end - begin, c - begin, p * bins.width + q)] = sum * taps.scale(k);
        }
      }
    }
    store(
        OutputBlock{k, begin, end - begin, 0, bins.height, 0, bins.width}, values,
        kChannelsLast ? end - begin : bins.count());
  });
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
  const GradTiling<acc_t> tiling(maps, false);
  const auto prepare = [&](int64_t image, int64_t k) { sampled.place(image, k, maps.width, 1); };
  for_each_tile<kChannelsLast>(tiling, regions, prepare, store, [&](const GradTile<acc_t>& tile, int64_t k) {
    const int64_t top = tile.top * tile.width, bottom = tile.bottom * tile.width;
    for (int64_t channel = tile.begin; channel < tile.end; ++channel) {
      const int64_t c = channel / bins.count(), p = channel / bins.width % bins.height, q = channel % bins.width;
      const acc_t value = static_cast<acc_t>(grad.at(k, p, q)[c * grad.channel]) * taps.scale(k);
      acc_t* sums = tile.sums + (channel - tile.begin) * tile.distance;
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
