// Multi-scale deformable attention: weighted samples of a pyramid of maps, for each query and head.
//
//   B, S, Q   batch, pixels of all levels, queries          H, D   heads, channels of a head
//   L, K      levels, points of a query on all of them      corner   one of the four pixels around a point
//
//   out[b, q, h] = sum over k of weight[b, q, h, k] * bilinear(value of the level of k [b, :, h], y, x)
//   x = location[b, q, h, k, 0] * width of the level - 0.5,  y likewise with [..., 1] and the height
//
// Channels are the vector where values are read, and points where it is computed which and how they count.  A head is
// done after the other: what neighbouring queries read of it is still in cache then.
#ifndef INDUCTOR_VISION_MULTISCALE_DEFORMABLE_ATTENTION_H
#define INDUCTOR_VISION_MULTISCALE_DEFORMABLE_ATTENTION_H

#include <limits>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "base.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// [B, S, H, D] with any strides, in elements.
template <typename scalar_t>
struct HeadsView {
  scalar_t* data;
  int64_t batch, pixel, head, channel;

  // The first pixel of a head, from a channel on.
  scalar_t* at(int64_t b, int64_t h, int64_t c) const {
    return data + (b * batch + h * head + c * channel);
  }
};

template <typename scalar_t, typename location_t, typename weight_t>
struct DeformableAttention {
  HeadsView<const scalar_t> value;
  const location_t* locations;  // [B, Q, H, K, 2]
  const weight_t* weights;      // [B, Q, H, K]
  const int64_t* sizes;         // [L, 2], height and width
  const int64_t* points;        // [L], adding up to K
  int64_t levels;
  int64_t batch, pixels, queries, heads, channels;
};

struct AttentionLevel {
  int64_t height, width;
  int64_t pixel;       // the first
  int64_t begin, end;  // points
};

// The levels, and of each point what it must know of its own.
template <typename acc_t>
struct AttentionLevels {
  std::vector<AttentionLevel> levels;
  std::vector<const AttentionLevel*> level;
  std::vector<acc_t> height, width;  // and more, for whole vectors

  template <typename op_t>
  explicit AttentionLevels(const op_t& op) {
    int64_t pixel = 0, point = 0;
    for (int64_t l = 0; l < op.levels; ++l) {
      const int64_t rows = op.sizes[2 * l], columns = op.sizes[2 * l + 1];
      if (rows <= 0 || columns <= 0 || rows > (op.pixels - pixel) / columns) {
        refuse();
      }
      levels.push_back({rows, columns, pixel, point, point + op.points[l]});
      pixel += rows * columns;
      point += op.points[l];
    }
    if (pixel != op.pixels) {
      refuse();
    }
    const size_t padded = static_cast<size_t>(point + Vectorized<acc_t>::size());
    height.resize(padded), width.resize(padded);
    for (const AttentionLevel& of : levels) {
      for (int64_t k = of.begin; k < of.end; ++k) {
        level.push_back(&of);
        height[k] = static_cast<acc_t>(of.height), width[k] = static_cast<acc_t>(of.width);
      }
    }
  }
  int64_t points() const {
    return static_cast<int64_t>(level.size());
  }

 private:
  [[noreturn]] static void refuse() {
    throw std::runtime_error(
        "multiscale_deformable_attention: value_spatial_shapes must be positive, and have as many pixels as value");
  }
};

// Vectorized<acc_t> from elements of a type that is as precise, or less.
template <typename acc_t, typename scalar_t>
inline Vectorized<acc_t> load_converted(const scalar_t* p, int64_t count) {
  if constexpr (std::is_same_v<accumulate_t<scalar_t>, acc_t>) {
    return load_vector(p, count);
  } else {
    alignas(kCacheLine) std::array<acc_t, Vectorized<acc_t>::size()> values{};
    std::copy_n(p, count, values.begin());
    return Vectorized<acc_t>::loadu(values.data());
  }
}

// Where the points of a query and head sample, number by number for all of them.
template <typename acc_t>
class AttentionPoints {
 public:
  static constexpr int64_t kNumbers = 9;

  // `scratch`: of size(points).
  AttentionPoints(acc_t* scratch, int64_t points) {
    for (acc_t** numbers : {&row, &column, &down, &right, &attention, &weight[0], &weight[1], &weight[2], &weight[3]}) {
      *numbers = scratch;
      scratch += padded(points);
    }
  }
  static int64_t size(int64_t points) {
    return kNumbers * padded(points);
  }

  acc_t *row, *column;  // of the first corner; -2, where no corner exists, for a point that does not count
  acc_t *down, *right;  // how far the point is from there
  acc_t* attention;     // 0 for a point that does not count
  acc_t* weight[4];     // of the corners, row by row, times attention

  // Locates the points [begin, end), given the numbers of all.
  template <bool kDiscrete, typename location_t, typename weight_t>
  void locate(
      const AttentionLevels<acc_t>& levels, const location_t* locations, const weight_t* weights, int64_t begin,
      int64_t end) {
    using Vec = Vectorized<acc_t>;
    constexpr int64_t kLanes = Vec::size();
    for (int64_t k = begin; k < end; k += kLanes) {
      const int64_t count = std::min(kLanes, end - k), first = std::min(2 * count, kLanes);
      Vec x = load_converted<acc_t>(locations + 2 * k, first), y(0);
      if (first < 2 * count) {
        y = load_converted<acc_t>(locations + 2 * k + kLanes, 2 * count - kLanes);
      }
      std::tie(x, y) = at::vec::deinterleave2(x, y);
      const Vec width = Vec::loadu(levels.width.data() + k), height = Vec::loadu(levels.height.data() + k);
      const Vec one(1), half(acc_t(0.5)), none(-2);
      Vec counts(0);
      if constexpr (kDiscrete) {
        x = x * width + half, y = y * height + half;
        const Vec infinity(std::numeric_limits<acc_t>::infinity());
        counts = (x.abs() < infinity) & (y.abs() < infinity);
        x = at::vec::minimum(at::vec::maximum(x, Vec(0)).floor(), width - one);
        y = at::vec::minimum(at::vec::maximum(y, Vec(0)).floor(), height - one);
      } else {
        x = x * width - half, y = y * height - half;
        counts = (x > Vec(-1)) & (y > Vec(-1)) & (x < width) & (y < height);  // NaN fails
      }
      x = Vec::blendv(none, x, counts), y = Vec::blendv(none, y, counts);
      const Vec left = x.floor(), top = y.floor(), to_right = x - left, to_bottom = y - top;
      const Vec a = Vec::blendv(Vec(0), load_converted<acc_t>(weights + k, count), counts);
      left.store(column + k), top.store(row + k);
      to_right.store(right + k), to_bottom.store(down + k);
      a.store(attention + k);
      const Vec below = a * to_bottom, above = a - below;
      const Vec below_right = below * to_right, above_right = above * to_right;
      (above - above_right).store(weight[0] + k), above_right.store(weight[1] + k);
      (below - below_right).store(weight[2] + k), below_right.store(weight[3] + k);
    }
  }

  // Calls whole(pixel) for a point all of whose corners exist, with the first corner's place among the pixels of all
  // levels, or each(corner, pixel) for those that do.
  template <bool kDiscrete, typename Whole, typename Each>
  void corners(const AttentionLevel& level, int64_t k, const Whole& whole, const Each& each) const {
    const int64_t y = static_cast<int64_t>(row[k]), x = static_cast<int64_t>(column[k]);
    const int64_t pixel = level.pixel + y * level.width + x;
    if constexpr (kDiscrete) {
      if (y >= 0) {  // beside a side above 2^24, a float may be rounded up to it
        each(0, level.pixel + std::min(y, level.height - 1) * level.width + std::min(x, level.width - 1));
      }
      return;
    }
    const auto below = [](int64_t at, int64_t limit) {
      return static_cast<uint64_t>(at) < static_cast<uint64_t>(limit);
    };
    if (below(y, level.height - 1) && below(x, level.width - 1)) {
      whole(pixel);
      return;
    }
    for (int corner = 0; corner < 4; ++corner) {
      if (below(y + corner / 2, level.height) && below(x + corner % 2, level.width)) {
        each(corner, pixel + corner / 2 * level.width + corner % 2);
      }
    }
  }

 private:
  static int64_t padded(int64_t points) {
    return round_up(points + Vectorized<acc_t>::size(), kCacheLine / static_cast<int64_t>(sizeof(acc_t)));
  }
};

// Channels of a pixel as a vector; the lanes from `count` on are zero.  kStrided: they are not neighbours.
template <bool kStrided, typename scalar_t>
inline Vectorized<accumulate_t<scalar_t>> load_channels(const scalar_t* p, int64_t channel, int64_t count) {
  using acc_t = accumulate_t<scalar_t>;
  if constexpr (kStrided) {
    alignas(kCacheLine) std::array<acc_t, Vectorized<acc_t>::size()> values{};
    for (int64_t c = 0; c < count; ++c) {
      values[c] = static_cast<acc_t>(p[c * channel]);
    }
    return Vectorized<acc_t>::loadu(values.data());
  } else {
    return load_vector(p, count);
  }
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr bool kSplitsPairs = true;

// Two vectors of elements: those of even places, and those of odd ones.  A shift and a mask make floats of bfloat16 so;
// in their order they would be moved from lane to lane, which takes longer than the sums.
inline std::pair<Vectorized<float>, Vectorized<float>> load_even_and_odd(const at::BFloat16* p) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i both = _mm512_loadu_si512(p), odd = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), _mm512_castsi512_ps(_mm512_and_si512(both, odd))};
#else
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), _mm256_castsi256_ps(_mm256_and_si256(both, odd))};
#endif
}
#else
constexpr bool kSplitsPairs = false;
#endif

// out[0, count) = the sum over all points, of kVectors vectors of channels; `value` is that of the first pixel.
template <bool kDiscrete, bool kStrided, int kVectors, typename scalar_t, typename acc_t>
inline void sum_samples(
    const AttentionLevels<acc_t>& levels, const AttentionPoints<acc_t>& points, const scalar_t* value,
    const HeadsView<const scalar_t>& view, int64_t count, acc_t* out) {
  using Vec = Vectorized<acc_t>;
  constexpr int64_t kLanes = Vec::size();
  // Pairs of vectors have the sums of even places in the one, and of odd ones in the other.
  constexpr bool kPairs = kSplitsPairs && kVectors % 2 == 0 && !kStrided && std::is_same_v<scalar_t, at::BFloat16>;
  const int64_t lanes = kVectors > 1 ? kLanes : count;
  // Two sums each, for the instructions to overlap.
  auto above = generate<kVectors>([](int) { return Vec(0); });
  auto below = above;
  const auto add = [&](auto& sums, const scalar_t* pixel, acc_t weight) {
    const Vec w(weight);
    if constexpr (kPairs) {
      const ForcedUnroll<kVectors / 2> unroll;
      unroll([&](auto u) {
        const auto [even, odd] = load_even_and_odd(pixel + 2 * u * kLanes);
        sums[2 * u] = at::vec::fmadd(w, even, sums[2 * u]);
        sums[2 * u + 1] = at::vec::fmadd(w, odd, sums[2 * u + 1]);
      });
    } else {
      const ForcedUnroll<kVectors> unroll;
      unroll([&](auto u) {
        sums[u] =
            at::vec::fmadd(w, load_channels<kStrided>(pixel + u * kLanes * view.channel, view.channel, lanes), sums[u]);
      });
    }
  };
  for (int64_t k = 0; k < levels.points(); ++k) {
    const AttentionLevel& level = *levels.level[k];
    points.template corners<kDiscrete>(
        level, k,
        [&](int64_t pixel) {
          const scalar_t* p = value + pixel * view.pixel;
          const scalar_t* next = p + level.width * view.pixel;
          add(above, p, points.weight[0][k]);
          add(below, next, points.weight[2][k]);
          add(above, p + view.pixel, points.weight[1][k]);
          add(below, next + view.pixel, points.weight[3][k]);
        },
        [&](int corner, int64_t pixel) { add(above, value + pixel * view.pixel, points.weight[corner][k]); });
  }
  for (int u = 0; u < kVectors; ++u) {
    above[u] = above[u] + below[u];
  }
  if constexpr (kPairs) {
    for (int u = 0; u < kVectors; u += 2) {
      std::tie(above[u], above[u + 1]) = at::vec::interleave2(above[u], above[u + 1]);
    }
  }
  for (int u = 0; u < kVectors; ++u) {
    above[u].store(out + u * kLanes, lanes);
  }
}

constexpr int64_t kAttentionQueries = 32;  // whose results are stored together

// `store` is for a channels_last output [B, H * D, 1, Q], see OutputBlock.
template <bool kDiscrete, bool kStrided, typename scalar_t, typename location_t, typename weight_t, typename Store>
inline void multiscale_deformable_attention(
    const DeformableAttention<scalar_t, location_t, weight_t>& op, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  const AttentionLevels<acc_t> levels(op);
  const int threads = omp_get_max_threads();
  const int64_t count = levels.points(), tiles = divide_up(op.queries, kAttentionQueries);
  const Scratch<acc_t> scratch(threads * AttentionPoints<acc_t>::size(count));
  const Scratch<acc_t> results(threads * kAttentionQueries * op.channels);
#pragma omp parallel num_threads(threads)
  {
    AttentionPoints<acc_t> points(scratch.get() + omp_get_thread_num() * AttentionPoints<acc_t>::size(count), count);
    acc_t* out = results.get() + omp_get_thread_num() * kAttentionQueries * op.channels;
#pragma omp for
    for (int64_t i = 0; i < op.batch * op.heads * tiles; ++i) {
      const int64_t b = i / tiles / op.heads, h = i / tiles % op.heads;
      const int64_t first = i % tiles * kAttentionQueries, queries = std::min(kAttentionQueries, op.queries - first);
      for (int64_t q = 0; q < queries; ++q) {
        const int64_t place = ((b * op.queries + first + q) * op.heads + h) * count;
        points.template locate<kDiscrete>(levels, op.locations + 2 * place, op.weights + place, 0, count);
        for_vectors<acc_t>(op.channels, [&](auto vectors, int64_t channel, int64_t channels) {
          sum_samples<kDiscrete, kStrided, decltype(vectors)::value>(
              levels, points, op.value.at(b, h, channel), op.value, channels, out + q * op.channels + channel);
        });
      }
      store(OutputBlock{b, h * op.channels, op.channels, 0, 1, first, queries}, out, op.channels);
    }
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_MULTISCALE_DEFORMABLE_ATTENTION_H
