// The gradients of multi-scale deformable attention; symbols as in multiscale_deformable_attention.h.
//
//   g = gradient of out[b, q, h],  a = weight[b, q, h, k],  v00, v01, v10, v11 = corners, row by row
//   fy, fx = how far the point is below and to the right of the first
//
//   value at a corner: + corner weight * a * g                     weight: <g, bilinear sample>
//   location x: width  * a * <g, (1 - fy) * (v01 - v00) + fy * (v11 - v10)>
//   location y: height * a * <g, (1 - fx) * (v10 - v00) + fx * (v11 - v01)>
//
// Those of weights and locations are made like the result, a query and head at a time: products with g of all corners
// first, summed up over the channels for many corners at once, then the rest, where points are the vector again.
//
// That of the value is cut into tiles, some rows of a level for one head.  A tile is one thread's, which goes through
// all queries in their order and adds up, in cache, what their points on this level leave there: no two threads write
// to the same place, and no sum depends on the cut, or on how many threads there are.
#ifndef INDUCTOR_VISION_MULTISCALE_DEFORMABLE_ATTENTION_BACKWARD_H
#define INDUCTOR_VISION_MULTISCALE_DEFORMABLE_ATTENTION_BACKWARD_H

#include "base.h"
#include "multiscale_deformable_attention.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// All contiguous; null: not wanted.
template <typename scalar_t, typename location_t, typename weight_t>
struct DeformableAttentionGradients {
  const scalar_t* output;  // [B, Q, H * D]
  scalar_t* value;         // [B, S, H, D]
  location_t* locations;   // [B, Q, H, K, 2]
  weight_t* weights;       // [B, Q, H, K]
  int64_t bytes;           // of a tile of the value's gradient, at most, unless a row of pixels needs more
};

// The reverse of load_converted.
template <typename acc_t, typename scalar_t>
inline void store_converted(const Vectorized<acc_t>& value, scalar_t* p, int64_t count) {
  if constexpr (std::is_same_v<accumulate_t<scalar_t>, acc_t>) {
    store_vector(value, p, count);
  } else {
    alignas(kCacheLine) std::array<acc_t, Vectorized<acc_t>::size()> values;
    value.store(values.data());
    std::transform(values.begin(), values.begin() + count, p, [](acc_t x) { return static_cast<scalar_t>(x); });
  }
}

// Products of the gradient with each corner of each point, [4][K].
template <typename acc_t>
class CornerProducts {
 public:
  static constexpr int64_t kLanes = Vectorized<acc_t>::size();

  // `scratch`: of size(points).
  CornerProducts(acc_t* scratch, int64_t points)
      : distance_(round_up(points, kLanes)),
        lanes_(scratch),
        sums_(scratch + 4 * distance_ * kLanes) {
    std::fill_n(scratch, size(points), acc_t(0));
  }
  static int64_t size(int64_t points) {
    return 4 * round_up(points, kLanes) * (kLanes + 1) + kLanes * kLanes;
  }

  // Multiplies kVectors vectors of channels, of which `first` says whether they are the first of all.
  template <bool kDiscrete, bool kStrided, int kVectors, typename scalar_t>
  void multiply(
      const AttentionLevels<acc_t>& levels, const AttentionPoints<acc_t>& points, const scalar_t* value,
      const HeadsView<const scalar_t>& view, const scalar_t* grad, int64_t count, bool first) {
    using Vec = Vectorized<acc_t>;
    const int64_t lanes = kVectors > 1 ? kLanes : count;
    const ForcedUnroll<kVectors> unroll;
    const auto g = generate<kVectors>([&](int u) { return load_vector(grad + u * kLanes, lanes); });
    const auto product = [&](int64_t pixel) {
      const scalar_t* p = value + pixel * view.pixel;
      Vec sum(0);
      unroll([&](auto u) {
        sum = at::vec::fmadd(g[u], load_channels<kStrided>(p + u * kLanes * view.channel, view.channel, lanes), sum);
      });
      return sum;
    };
    for (int64_t k = 0; k < levels.points(); ++k) {
      const AttentionLevel& level = *levels.level[k];
      std::array<Vec, 4> products{Vec(0), Vec(0), Vec(0), Vec(0)};
      points.template corners<kDiscrete>(
          level, k,
          [&](int64_t pixel) {
            products = {
                product(pixel), product(pixel + 1), product(pixel + level.width), product(pixel + level.width + 1)};
          },
          [&](int corner, int64_t pixel) { products[corner] = product(pixel); });
      for (int corner = 0; corner < (kDiscrete ? 1 : 4); ++corner) {
        acc_t* to = lanes_ + (corner * distance_ + k) * kLanes;
        (first ? products[corner] : products[corner] + Vec::loadu(to)).store(to);
      }
    }
  }

  // Adds up the channels.
  template <bool kDiscrete>
  void sum() {
    acc_t* transposed = sums_ + 4 * distance_;
    for (int64_t i = 0; i < (kDiscrete ? 1 : 4) * distance_; i += kLanes) {
      transpose(lanes_ + i * kLanes, kLanes, transposed, kLanes, kLanes, kLanes);
      auto total = Vectorized<acc_t>::loadu(transposed);
      for (int64_t lane = 1; lane < kLanes; ++lane) {
        total = total + Vectorized<acc_t>::loadu(transposed + lane * kLanes);
      }
      total.store(sums_ + i);
    }
  }
  Vectorized<acc_t> of(int corner, int64_t k) const {
    return Vectorized<acc_t>::loadu(sums_ + corner * distance_ + k);
  }

 private:
  int64_t distance_;  // between corners
  acc_t *lanes_, *sums_;
};

// The gradients of the locations and weights of a query and head.
template <bool kDiscrete, typename acc_t, typename location_t, typename weight_t>
inline void store_point_gradients(
    const AttentionLevels<acc_t>& levels, const AttentionPoints<acc_t>& points, const CornerProducts<acc_t>& products,
    location_t* locations, weight_t* weights) {
  using Vec = Vectorized<acc_t>;
  constexpr int64_t kLanes = Vec::size();
  for (int64_t k = 0; k < levels.points(); k += kLanes) {
    const int64_t count = std::min(kLanes, levels.points() - k), first = std::min(2 * count, kLanes);
    Vec sample = products.of(0, k), x(0), y(0);
    if constexpr (!kDiscrete) {
      const Vec v00 = sample, v01 = products.of(1, k), v10 = products.of(2, k), v11 = products.of(3, k);
      const Vec down = Vec::loadu(points.down + k), right = Vec::loadu(points.right + k), one(1);
      const Vec up = one - down, left = one - right, a = Vec::loadu(points.attention + k);
      sample = up * (left * v00 + right * v01) + down * (left * v10 + right * v11);
      x = Vec::loadu(levels.width.data() + k) * a * (up * (v01 - v00) + down * (v11 - v10));
      y = Vec::loadu(levels.height.data() + k) * a * (left * (v10 - v00) + right * (v11 - v01));
    }
    if (weights != nullptr) {
      store_converted(sample, weights + k, count);
    }
    if (locations != nullptr) {
      std::tie(x, y) = at::vec::interleave2(x, y);
      store_converted(x, locations + 2 * k, first);
      if (first < 2 * count) {
        store_converted(y, locations + 2 * k + kLanes, 2 * count - kLanes);
      }
    }
  }
}

// The gradients of all locations and weights.
template <bool kDiscrete, bool kStrided, typename scalar_t, typename location_t, typename weight_t, typename acc_t>
inline void point_gradients(
    const DeformableAttention<scalar_t, location_t, weight_t>& op,
    const DeformableAttentionGradients<scalar_t, location_t, weight_t>& gradients,
    const AttentionLevels<acc_t>& levels) {
  const int threads = omp_get_max_threads();
  const int64_t count = levels.points();
  const int64_t numbers = AttentionPoints<acc_t>::size(count), products_size = CornerProducts<acc_t>::size(count);
  const Scratch<acc_t> scratch(threads * (numbers + products_size));
#pragma omp parallel num_threads(threads)
  {
    acc_t* mine = scratch.get() + omp_get_thread_num() * (numbers + products_size);
    AttentionPoints<acc_t> points(mine, count);
    CornerProducts<acc_t> products(mine + numbers, count);
#pragma omp for
    for (int64_t i = 0; i < op.batch * op.heads * op.queries; ++i) {
      const int64_t b = i / op.queries / op.heads, h = i / op.queries % op.heads;
      const int64_t place = (b * op.queries + i % op.queries) * op.heads + h;
      points.template locate<kDiscrete>(levels, op.locations + 2 * place * count, op.weights + place * count, 0, count);
      for_vectors<acc_t>(op.channels, [&](auto vectors, int64_t first, int64_t channels) {
        products.template multiply<kDiscrete, kStrided, decltype(vectors)::value>(
            levels, points, op.value.at(b, h, first), op.value, gradients.output + place * op.channels + first,
            channels, first == 0);
      });
      products.template sum<kDiscrete>();
      store_point_gradients<kDiscrete>(
          levels, points, products, gradients.locations == nullptr ? nullptr : gradients.locations + 2 * place * count,
          gradients.weights == nullptr ? nullptr : gradients.weights + place * count);
    }
  }
}

// Rows [top, bottom) of a level.
struct AttentionTile {
  const AttentionLevel* level;
  int64_t top, bottom;

  // Among the pixels of all levels.
  int64_t begin() const {
    return level->pixel + top * level->width;
  }
  int64_t end() const {
    return level->pixel + bottom * level->width;
  }
};

// Adds to a tile of the value's gradient, `distance` numbers for each pixel, what a point leaves there in kVectors
// vectors of channels.
template <bool kDiscrete, int kVectors, typename scalar_t, typename acc_t>
inline void spread_point(
    const AttentionTile& tile, const AttentionPoints<acc_t>& points, int64_t k, const scalar_t* grad, int64_t count,
    acc_t* sums, int64_t distance) {
  using Vec = Vectorized<acc_t>;
  constexpr int64_t kLanes = Vec::size();
  const int64_t lanes = kVectors > 1 ? kLanes : count, begin = tile.begin(), end = tile.end();
  const auto add = [&](int corner, int64_t pixel) {
    if (pixel >= begin && pixel < end) {
      acc_t* to = sums + (pixel - begin) * distance;
      const Vec weight(points.weight[corner][k]);
      for (int u = 0; u < kVectors; ++u, to += kLanes) {
        at::vec::fmadd(weight, load_vector(grad + u * kLanes, lanes), Vec::loadu(to)).store(to);
      }
    }
  };
  points.template corners<kDiscrete>(
      *tile.level, k,
      [&](int64_t pixel) {
        if (pixel + tile.level->width + 1 >= begin && pixel < end) {
          add(0, pixel), add(1, pixel + 1);
          add(2, pixel + tile.level->width), add(3, pixel + tile.level->width + 1);
        }
      },
      add);
}

template <bool kDiscrete, typename scalar_t, typename location_t, typename weight_t, typename acc_t>
inline void value_gradient(
    const DeformableAttention<scalar_t, location_t, weight_t>& op,
    const DeformableAttentionGradients<scalar_t, location_t, weight_t>& gradients,
    const AttentionLevels<acc_t>& levels) {
  const int threads = omp_get_max_threads();
  const int64_t count = levels.points(), numbers = AttentionPoints<acc_t>::size(count);
  const int64_t distance = round_up(op.channels, Vectorized<acc_t>::size());
  const int64_t units = std::max<int64_t>(op.batch * op.heads, 1);
  std::vector<AttentionTile> tiles;
  int64_t pixels = 0;  // of a tile, at most
  for (const AttentionLevel& level : levels.levels) {
    const int64_t row = level.width * distance * static_cast<int64_t>(sizeof(acc_t));
    const int64_t rows = std::clamp<int64_t>(gradients.bytes / std::max<int64_t>(row, 1), 1, level.height);
    const int64_t bands =
        std::min(std::max(divide_up(level.height, rows), divide_up(2 * threads, units)), level.height);
    for (int64_t band = 0; band < bands; ++band) {
      tiles.push_back({&level, level.height * band / bands, level.height * (band + 1) / bands});
      pixels = std::max(pixels, tiles.back().end() - tiles.back().begin());
    }
  }
  const int64_t size = pixels * distance;
  const Scratch<acc_t> scratch(threads * (numbers + size));
#pragma omp parallel num_threads(threads)
  {
    acc_t* sums = scratch.get() + omp_get_thread_num() * (numbers + size);
    AttentionPoints<acc_t> points(sums + size, count);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < op.batch * op.heads * static_cast<int64_t>(tiles.size()); ++i) {
      const AttentionTile& tile = tiles[i / units];
      const int64_t b = i % units / op.heads, h = i % op.heads, tile_pixels = tile.end() - tile.begin();
      std::fill_n(sums, tile_pixels * distance, acc_t(0));
      for (int64_t q = 0; q < op.queries; ++q) {
        const int64_t place = (b * op.queries + q) * op.heads + h;
        points.template locate<kDiscrete>(
            levels, op.locations + 2 * place * count, op.weights + place * count, tile.level->begin, tile.level->end);
        for_vectors<acc_t>(op.channels, [&](auto vectors, int64_t first, int64_t channels) {
          for (int64_t k = tile.level->begin; k < tile.level->end; ++k) {
            spread_point<kDiscrete, decltype(vectors)::value>(
                tile, points, k, gradients.output + place * op.channels + first, channels, sums + first, distance);
          }
        });
      }
      store_block(
          sums, distance, gradients.value + ((b * op.pixels + tile.begin()) * op.heads + h) * op.channels,
          op.heads * op.channels, tile_pixels, op.channels);
    }
  }
}

template <bool kDiscrete, bool kStrided, typename scalar_t, typename location_t, typename weight_t>
inline void multiscale_deformable_attention_backward(
    const DeformableAttention<scalar_t, location_t, weight_t>& op,
    const DeformableAttentionGradients<scalar_t, location_t, weight_t>& gradients) {
  const AttentionLevels<accumulate_t<scalar_t>> levels(op);
  if (gradients.locations != nullptr || gradients.weights != nullptr) {
    point_gradients<kDiscrete, kStrided>(op, gradients, levels);
  }
  if (gradients.value != nullptr) {
    value_gradient<kDiscrete>(op, gradients, levels);
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_MULTISCALE_DEFORMABLE_ATTENTION_BACKWARD_H
