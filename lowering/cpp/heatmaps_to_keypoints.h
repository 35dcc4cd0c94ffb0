// Keypoints from heatmaps: where each map, resized to its box, has its maximum.
//
//   K, N, H, W   boxes, keypoints of each, height and width of a map
//
// A map is resized by bicubic interpolation, columns first: H rows of a stretch of the result's columns are kept, and
// each row of the result is a sum of four of them, which is searched as soon as it is made and never stored.
#ifndef INDUCTOR_VISION_HEATMAPS_TO_KEYPOINTS_H
#define INDUCTOR_VISION_HEATMAPS_TO_KEYPOINTS_H

#include <limits>
#include <stdexcept>
#include <string>

#include "resampling.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// The first maximum of rows of numbers; NaN is greater than any number.
template <typename acc_t>
struct Peak {
  acc_t value = 0;
  int64_t row = -1, column = -1;

  // Stretches of the same rows may be given one after another.
  void search(const acc_t* values, int64_t count, acc_t maximum, int64_t row_of_values, int64_t first_column) {
    const bool nan = std::isnan(maximum);
    const bool same = nan ? std::isnan(value) : maximum == value;
    const bool greater = nan ? !std::isnan(value) : maximum > value;
    if (row < 0 || greater || (same && row_of_values < row)) {
      const acc_t* first =
          std::find_if(values, values + count, [&](acc_t x) { return nan ? std::isnan(x) : x == maximum; });
      *this = {maximum, row_of_values, first_column + (first - values)};
    }
  }
};

constexpr int64_t kTooManyPixels = int64_t{1} << 31;  // pixels of a box

// How long a side of a box is, in whole pixels, and how much shorter it is than these.
template <typename acc_t>
struct BoxSide {
  acc_t begin, correction;
  int64_t pixels;  // 0 if it is not finite, or has too many

  BoxSide(acc_t begin, acc_t end) : begin(begin) {
    const acc_t length = std::max(end - begin, acc_t(1)), whole = std::ceil(length);
    const bool fits = std::isfinite(begin) && std::isfinite(end) && whole < static_cast<acc_t>(kTooManyPixels);
    pixels = fits ? static_cast<int64_t>(whole) : 0;
    correction = length / whole;
  }
  float place(int64_t pixel) const {
    return static_cast<float>((static_cast<acc_t>(pixel) + acc_t(0.5)) * correction + begin);
  }
};

template <typename map_t>
class HeatmapSearch {
 public:
  using acc_t = accumulate_t<map_t>;

  HeatmapSearch(int64_t height, int64_t width, int64_t threads)
      : height_(height),
        width_(width),
        rows_(threads * (height + 1) * kColumns) {
  }

  // Of one map resized to rows x columns.
  Peak<acc_t> operator()(const View4d<map_t>& map, int64_t rows, int64_t columns, int64_t thread) const {
    acc_t* resized = rows_.get() + thread * (height_ + 1) * kColumns;
    acc_t* row = resized + height_ * kColumns;
    Peak<acc_t> peak;
    for (int64_t column = 0; column < columns; column += kColumns) {
      const int64_t count = std::min(kColumns, columns - column);
      for (int64_t x = 0; x < count; ++x) {
        const CubicTaps<acc_t> taps = taps_of(column + x, width_, columns);
        for (int64_t y = 0; y < height_; ++y) {
          resized[y * kColumns + x] = sum(taps.weight, [&](int64_t i) {
            return static_cast<acc_t>(map.data[y * map.row + taps.index[i] * map.column]);
          });
        }
      }
      for (int64_t x = count; x < round_up(count, Vec::size()); ++x) {  // the last vector is a whole one
        for (int64_t y = 0; y < height_; ++y) {
          resized[y * kColumns + x] = resized[y * kColumns + count - 1];
        }
      }
      for (int64_t y = 0; y < rows; ++y) {
        peak.search(row, count, interpolate(taps_of(y, height_, rows), resized, row, count), y, column);
      }
    }
    return peak;
  }

 private:
  using Vec = Vectorized<acc_t>;
  static constexpr int64_t kColumns = 256;

  // Each step is rounded.  So the middle of a pixel is met exactly: it decides which pixels NaN spreads from.
  static CubicTaps<acc_t> taps_of(int64_t at, int64_t source, int64_t size) {
    const acc_t scale = static_cast<acc_t>(source) / static_cast<acc_t>(size);
    return {scale * (static_cast<acc_t>(at) + acc_t(0.5)) - acc_t(0.5), source};
  }
  template <typename Weights, typename Load>
  static auto sum(const Weights& weights, const Load& load) {
    return load(0) * weights[0] + load(1) * weights[1] + load(2) * weights[2] + load(3) * weights[3];
  }

  // A row of the result, and its maximum.
  static acc_t interpolate(const CubicTaps<acc_t>& taps, const acc_t* resized, acc_t* row, int64_t count) {
    const auto weights = broadcast_weights(taps);
    Vec maximum(-std::numeric_limits<acc_t>::infinity());
    for (int64_t x = 0; x < count; x += Vec::size()) {
      const Vec value = sum(weights, [&](int64_t i) { return Vec::loadu(resized + taps.index[i] * kColumns + x); });
      value.store(row + x);
      maximum = at::vec::maximum(maximum, value);
    }
    return at::vec::vec_reduce_all<acc_t>([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, maximum);
  }

  int64_t height_, width_;
  Scratch<acc_t> rows_;
};

// K rows (x1, y1, x2, y2).
template <typename box_t>
struct HeatmapBoxes {
  const box_t* data;
  int64_t row, column;  // distances

  template <typename acc_t>
  BoxSide<acc_t> side(int64_t k, int64_t axis) const {
    const box_t* box = data + k * row;
    return BoxSide<acc_t>(static_cast<acc_t>(box[axis * column]), static_cast<acc_t>(box[(axis + 2) * column]));
  }
};

// `out`: [K, N, 3] of x, y and the map's value there.
template <typename map_t, typename box_t>
inline void heatmaps_to_keypoints(const Images<map_t>& maps, const HeatmapBoxes<box_t>& boxes, float* out) {
  using acc_t = accumulate_t<box_t>;
  const auto side = [&](int64_t k, int64_t axis) { return boxes.template side<acc_t>(k, axis); };
  for (int64_t k = 0; k < maps.count; ++k) {
    const int64_t columns = side(k, 0).pixels, rows = side(k, 1).pixels;
    if (columns == 0 || rows == 0 || columns * rows >= kTooManyPixels) {
      throw std::runtime_error(
          "heatmaps_to_keypoints: rois must be finite and of less than 2^31 pixels, rois[" + std::to_string(k) +
          "] is not");
    }
  }
  const int threads = omp_get_max_threads();
  const HeatmapSearch<map_t> search(maps.height, maps.width, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < maps.count * maps.channels; ++i) {
    const int64_t k = i / maps.channels, n = i % maps.channels;
    const BoxSide<acc_t> x = side(k, 0), y = side(k, 1);
    View4d<map_t> map = maps.view;
    map.data += k * map.image + n * map.channel;
    const auto peak = search(map, y.pixels, x.pixels, omp_get_thread_num());
    float* to = out + i * 3;
    to[0] = x.place(peak.column);
    to[1] = y.place(peak.row);
    to[2] = static_cast<float>(peak.value);
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_HEATMAPS_TO_KEYPOINTS_H
