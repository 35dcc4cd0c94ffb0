// Depthwise sums, vectorized over channels, which are neighbours: of a depthwise convolution, or of its gradients.
#ifndef INDUCTOR_VISION_DEPTHWISE_H
#define INDUCTOR_VISION_DEPTHWISE_H

#include <vector>

#include "axis.h"
#include "base.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// Where a tap finds the first of some pixels, and its weights; of channel 0.
template <typename value_t>
struct DepthwiseTap {
  const value_t* source;
  const accumulate_t<value_t>* weight;
};

// Pixels that have the same taps.
struct DepthwiseSpan {
  int64_t first_tap, taps;  // in the list
  int64_t pixel, step;      // the number of the first, the difference between the numbers of neighbours
  int64_t pixels;
};

// Lists the pixels of some rows of the result with their taps.  Taps outside of what is read are left out.
template <typename value_t>
class DepthwiseTapList {
 public:
  using acc_t = accumulate_t<value_t>;

  // `rows` of the result, each with at most `row_taps` rows of what is read, are the most that is listed at once: lists
  // have all the room that they can need, nothing is allocated while threads are running.  Elements lie `distance`
  // apart for neighbouring columns, `weight_distance` for neighbouring taps.
  DepthwiseTapList(const Axis& columns, int64_t rows, int64_t row_taps, int64_t distance, int64_t weight_distance)
      : step_(columns.step()),
        source_step_(columns.source_step()),
        distance_(distance),
        weight_distance_(weight_distance),
        columns_(columns.spans()) {
    spans_.reserve(rows * columns_.size());
    taps_.reserve(spans_.capacity() * row_taps * columns.kernel);
    rows_.reserve(row_taps);
  }

  void clear() {
    taps_.clear();
    spans_.clear();
  }
  // Begins a row of the result: those that follow, in the order in which they are summed, are what it is made of.
  void begin_row() {
    rows_.clear();
  }
  // A row of what is read, from its first column on, and the first tap that looks at it.
  void add(const DepthwiseTap<value_t>& row) {
    rows_.push_back(row);
  }
  // Lists the columns [begin, end) of the row; `pixel` is the number of the first.
  void end_row(int64_t begin, int64_t end, int64_t pixel) {
    for (const AxisSpan& span : columns_) {
      const int64_t first = std::max<int64_t>(0, divide_up(begin - span.begin, step_));
      const int64_t last = std::min(span.count, divide_up(end - span.begin, step_));
      if (first < last) {
        const auto first_tap = static_cast<int64_t>(taps_.size());
        for (const DepthwiseTap<value_t>& row : rows_) {
          for (const AxisTap& tap : span.taps) {
            const int64_t column = tap.source + first * source_step_;
            taps_.push_back({row.source + column * distance_, row.weight + tap.tap * weight_distance_});
          }
        }
        const auto taps = static_cast<int64_t>(taps_.size()) - first_tap;
        spans_.push_back({first_tap, taps, pixel + span.begin + first * step_ - begin, step_, last - first});
      }
    }
  }

  const std::vector<DepthwiseSpan>& spans() const {
    return spans_;
  }
  const DepthwiseTap<value_t>* taps(const DepthwiseSpan& span) const {
    return taps_.data() + span.first_tap;
  }
  // Elements between what neighbouring pixels of a span look at.
  int64_t distance() const {
    return source_step_ * distance_;
  }

 private:
  int64_t step_, source_step_;
  int64_t distance_, weight_distance_;
  std::vector<AxisSpan> columns_;
  std::vector<DepthwiseTap<value_t>> rows_;  // of the row that was begun
  std::vector<DepthwiseTap<value_t>> taps_;
  std::vector<DepthwiseSpan> spans_;
};

// Sums of some pixels of a span and some channels of each, in registers: see depthwise_sums.
template <int kPixels, int kVectors, typename value_t, typename Begin, typename Finish>
inline void depthwise_block(
    const DepthwiseTapList<value_t>& list, const DepthwiseSpan& span, int64_t n, int64_t source, int64_t weight,
    int64_t k, int64_t count, const Begin& begin, const Finish& finish) {
  using Vec = Vectorized<accumulate_t<value_t>>;
  constexpr int64_t kLanes = Vec::size();
  const bool part = kVectors == 1 && count < kLanes;
  const auto load = [&](const auto* from) { return part ? load_vector(from, count) : load_vector(from); };
  auto sum = generate<kPixels * kVectors>([&](int i) { return begin(k + i % kVectors * kLanes, load); });
  const int64_t step = list.distance();
  const DepthwiseTap<value_t>* tap = list.taps(span);
  for (const DepthwiseTap<value_t>* end = tap + span.taps; tap < end; ++tap) {
    const value_t* from = tap->source + source + n * step + k;
    const auto* weights = tap->weight + weight + k;
    const auto w = generate<kVectors>([&](int u) { return load(weights + u * kLanes); });
    ForcedUnroll<kPixels>{}([&](auto p) {
      ForcedUnroll<kVectors>{}([&](auto u) {
        const Vec value = load(from + p * step + u * kLanes);
        sum[p * kVectors + u] = ::at::vec::fmadd(value, w[u], sum[p * kVectors + u]);
      });
    });
  }
  ForcedUnroll<kPixels * kVectors>{}(
      [&](auto i) { finish(n + i / kVectors, k + i % kVectors * kLanes, sum[i], part ? count : kLanes); });
}

// For the pixels [first, end) of a span and the channels k < depth:
//
//   finish(n, k, begin(k) + sum over taps of weight[tap][weight + k] * source[tap][pixel n][source + k], count)
//
// of `count` channels from k on, at most a vector, of the n-th pixel of the span.  `begin` is a function of k and of
// another, which loads so many channels of what it is given.
template <typename value_t, typename Begin, typename Finish>
inline void depthwise_sums(
    const DepthwiseTapList<value_t>& list, const DepthwiseSpan& span, int64_t first, int64_t end, int64_t source,
    int64_t weight, int64_t depth, const Begin& begin, const Finish& finish) {
  constexpr int64_t kLanes = Vectorized<accumulate_t<value_t>>::size();
  // Neighbouring pixels, and vectors of channels of each, whose sums are in registers at once.
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int kPixels = 4, kVectors = 4;  // 16 sums and 4 weights of 32 registers
#else
  constexpr int kPixels = 4, kVectors = 2;  // 8 sums and 2 weights of 16 registers
#endif
  const auto pixels = [&](auto count, int64_t n) {
    constexpr int kCount = decltype(count)::value;
    int64_t k = 0;
    for (; k + kVectors * kLanes <= depth; k += kVectors * kLanes) {
      depthwise_block<kCount, kVectors>(list, span, n, source, weight, k, kLanes, begin, finish);
    }
    for (; k < depth; k += kLanes) {
      depthwise_block<kCount, 1>(list, span, n, source, weight, k, std::min(kLanes, depth - k), begin, finish);
    }
  };
  int64_t n = first;
  for (; n + kPixels <= end; n += kPixels) {
    pixels(std::integral_constant<int, kPixels>{}, n);
  }
  for (; n + 2 <= end; n += 2) {
    pixels(std::integral_constant<int, 2>{}, n);
  }
  if (n < end) {
    pixels(std::integral_constant<int, 1>{}, n);
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_DEPTHWISE_H
