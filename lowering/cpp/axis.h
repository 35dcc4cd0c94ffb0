// One axis of a convolution, or of the gradient of its input: which taps meet which places.
#ifndef INDUCTOR_VISION_AXIS_H
#define INDUCTOR_VISION_AXIS_H

#include <vector>

#include "base.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// What meets a place of the result: tap number `tap` of the kernel, and the place of the input that it looks at.
struct AxisTap {
  int64_t tap, source;

  bool operator==(const AxisTap& other) const {
    return tap == other.tap && source == other.source;
  }
};

// Neighbouring places of the result that meet the same taps: begin, begin + step, ...
struct AxisSpan {
  int64_t begin, count;
  std::vector<AxisTap> taps;  // of the first; those of the others look `source_step` further each
};

struct Axis {
  int64_t out_size, size;  // of what is computed and what is read
  int64_t kernel, stride, padding, dilation;
  bool transposed;  // what is computed is the gradient of the input, what is read that of the result

  // The same of the gradient of the input.
  Axis of_gradient() const {
    return {size, out_size, kernel, stride, padding, dilation, true};
  }
  // Calls f(AxisTap) for all that meet a place, in the order of taps.
  template <typename F>
  void for_taps(int64_t out, const F& f) const {
    for (int64_t tap = 0; tap < kernel; ++tap) {
      int64_t source = out * stride - padding + tap * dilation;
      if (transposed) {
        const int64_t distance = out + padding - tap * dilation;
        source = distance >= 0 && distance % stride == 0 ? distance / stride : -1;
      }
      if (source >= 0 && source < size) {
        f(AxisTap{tap, source});
      }
    }
  }
  // Between neighbouring places of a span: places that are a stride apart meet the same taps in the gradient.
  int64_t step() const {
    return transposed ? stride : 1;
  }
  int64_t source_step() const {
    return transposed ? 1 : stride;
  }
  // All places, each in one span.
  std::vector<AxisSpan> spans() const {
    std::vector<AxisSpan> spans;
    std::vector<AxisTap> taps, next;
    for (int64_t phase = 0; phase < std::min(step(), out_size); ++phase) {
      next.clear();
      for (int64_t out = phase; out < out_size; out += step()) {
        taps.clear();
        for_taps(out, [&](const AxisTap& tap) { taps.push_back(tap); });
        if (out == phase || taps != next) {
          spans.push_back({out, 0, taps});
        }
        ++spans.back().count;
        next = taps;
        for (AxisTap& tap : next) {
          tap.source += source_step();
        }
      }
    }
    return spans;
  }
};

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_AXIS_H
