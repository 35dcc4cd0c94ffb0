// Which pixels along an axis a pixel of a resized image is made of, and what each counts.
#ifndef INDUCTOR_VISION_RESAMPLING_H
#define INDUCTOR_VISION_RESAMPLING_H

#include <cmath>

#include "base.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// The two pixels of the input that a place is between, and how far it is from the first to the second.
template <typename acc_t>
struct LinearTaps {
  int64_t first, second;
  acc_t fraction;

  // `size` places of `source` pixels.  Rounded as aten's kernel does it: far from the origin it shows in the result.
  LinearTaps(int64_t at, int64_t source, int64_t size, bool align_corners, double scale) {
    acc_t place;
    if (align_corners) {
      const acc_t step = size > 1 ? static_cast<acc_t>(source - 1) / static_cast<acc_t>(size - 1) : acc_t(0);
      place = step * static_cast<acc_t>(at);
    } else {
      const acc_t step =
          scale > 0 ? static_cast<acc_t>(1.0 / scale) : static_cast<acc_t>(source) / static_cast<acc_t>(size);
      place = std::fma(step, static_cast<acc_t>(at) + acc_t(0.5), acc_t(-0.5));
    }
    place = place > 0 ? std::min(place, static_cast<acc_t>(source - 1)) : acc_t(0);
    first = std::min(static_cast<int64_t>(place), source - 1);
    second = std::min(first + 1, source - 1);
    fraction = std::min(std::max(place - static_cast<acc_t>(first), acc_t(0)), acc_t(1));
  }
};

template <typename Vec>
inline Vec between(const Vec& first, const Vec& second, const Vec& fraction) {
  return at::vec::fmadd(second, fraction, first * (Vec(1) - fraction));
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_RESAMPLING_H
