// Which pixels along an axis a pixel of a resized image is made of, its taps, and what each counts.
//
// Places are rounded as aten's kernels do it: far from the origin it shows in the result.  Taps beyond the border are
// the pixel there.
#ifndef INDUCTOR_VISION_RESAMPLING_H
#define INDUCTOR_VISION_RESAMPLING_H

#include <cmath>

#include "base.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// How an axis of `source` pixels is resized to `size`.
struct Resampling {
  int64_t source, size;
  bool align_corners;  // the centres of the first and of the last pixels coincide, otherwise the outer borders
  double scale;        // if positive, it counts, and not the sizes

  // Where pixel `at` of the result is among those of the input.
  template <typename acc_t>
  acc_t place(int64_t at) const {
    if (align_corners) {
      const acc_t step = size > 1 ? static_cast<acc_t>(source - 1) / static_cast<acc_t>(size - 1) : acc_t(0);
      return step * static_cast<acc_t>(at);
    }
    const acc_t step =
        scale > 0 ? static_cast<acc_t>(1.0 / scale) : static_cast<acc_t>(source) / static_cast<acc_t>(size);
    return std::fma(step, static_cast<acc_t>(at) + acc_t(0.5), acc_t(-0.5));
  }
};

// The two pixels that a place is between.
template <typename acc_t>
struct LinearTaps {
  static constexpr int kCount = 2;
  std::array<int64_t, kCount> index;
  std::array<acc_t, kCount> weight;

  LinearTaps(const Resampling& axis, int64_t at) {
    acc_t place = axis.place<acc_t>(at);
    place = place > 0 ? std::min(place, static_cast<acc_t>(axis.source - 1)) : acc_t(0);
    const int64_t first = std::min(static_cast<int64_t>(place), axis.source - 1);
    const acc_t fraction = std::min(std::max(place - static_cast<acc_t>(first), acc_t(0)), acc_t(1));
    index = {first, std::min(first + 1, axis.source - 1)};
    weight = {1 - fraction, fraction};
  }
};

// Keys, "Cubic convolution interpolation for digital image processing", with a = -0.75 as in PyTorch.
template <typename acc_t>
struct CubicTaps {
  static constexpr int kCount = 4;
  std::array<int64_t, kCount> index;
  std::array<acc_t, kCount> weight;

  CubicTaps(const Resampling& axis, int64_t at) : CubicTaps(axis.place<acc_t>(at), axis.source) {
  }
  // Of a place among `source` pixels.
  CubicTaps(acc_t place, int64_t source) {
    constexpr acc_t kFar = acc_t(int64_t{1} << 50);  // places are whole numbers there, if they are numbers
    place = place > -kFar ? std::min(place, kFar) : -kFar;
    const int64_t floor = std::min(static_cast<int64_t>(std::floor(place)), source - 1);
    const acc_t t = std::min(std::max(place - static_cast<acc_t>(floor), acc_t(0)), acc_t(1));
    for (int64_t i = 0; i < kCount; ++i) {
      index[i] = std::min(std::max<int64_t>(floor - 1 + i, 0), source - 1);
    }
    weight = {far(t + 1), near(t), near(1 - t), far(2 - t)};
  }

 private:
  static constexpr acc_t a = acc_t(-0.75);

  static acc_t near(acc_t x) {
    return ((a + 2) * x - (a + 3)) * x * x + 1;
  }
  static acc_t far(acc_t x) {
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
  }
};

// The sum of load(i) * weights[i].
template <typename Vec, size_t kCount, typename Load>
inline Vec weighted(const std::array<Vec, kCount>& weights, const Load& load) {
  Vec sum = load(0) * weights[0];
  for (int i = 1; i < static_cast<int>(kCount); ++i) {
    sum = at::vec::fmadd(load(i), weights[i], sum);
  }
  return sum;
}

// The weights of taps, each in all lanes.
template <template <typename> class Taps, typename acc_t>
inline auto broadcast_weights(const Taps<acc_t>& taps) {
  return generate<Taps<acc_t>::kCount>([&](int i) { return Vectorized<acc_t>(taps.weight[i]); });
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_RESAMPLING_H
