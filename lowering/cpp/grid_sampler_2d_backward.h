// The gradients of grid_sampler_2d, by the images and by the grid.  See grid_sampler.h.
//
// That by the grid is a gather, as the samples are: with S[j][k], the sum over channels of the output's gradient times
// the pixel of taps j and k,
//
//   grad_x = sum of row_weight[j] * column_slope[k] * S[j][k],    grad_y = sum of row_slope[j] * column_weight[k] *
//   S[j][k]
//
// That by the images is a scatter: any sample may add to any pixel.
//
//   slab   some channels, which one thread scatters together
//   band   some rows of the images, as many as fit a cache for a slab
//
// One thread sums a band up over all samples that touch it, in their order, and stores it.  There are no atomics, and
// no sum depends on the cut into slabs and bands, nor on the number of threads.  Of each tile it is known beforehand
// between which rows its samples lie, so that a band looks at those tiles alone that it has something of.
#ifndef INDUCTOR_VISION_GRID_SAMPLER_2D_BACKWARD_H
#define INDUCTOR_VISION_GRID_SAMPLER_2D_BACKWARD_H

#include "grid_sampler.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

template <typename scalar_t>
struct GridSampler2dGradients {
  View4d<scalar_t> output;
  Output4d<scalar_t> input;  // null: not wanted
  Output4d<scalar_t> grid;   // [B, 2, Ho, Wo], as that; null: not wanted
};

// [pixel][channel] of a tile of the output's gradient, of `block.channels` channels.
template <typename scalar_t, typename acc_t>
inline void load_tile(const View4d<scalar_t>& output, const OutputBlock& block, acc_t* grad) {
  for (int64_t row = 0; row < block.rows; ++row, grad += block.columns * block.channels) {
    const scalar_t* from = output.at(block.image, block.row + row, block.column) + block.channel * output.channel;
    load_block(from, output.column, output.channel, grad, block.channels, block.columns, block.channels);
  }
}

template <GridInterpolation kMode, typename scalar_t>
class GridGradient {
 public:
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  static constexpr int kTaps = grid_taps(kMode), kPixels = kTaps * kTaps;

  GridGradient(const GridSampler2d<scalar_t>& op, const GridSampler2dGradients<scalar_t>& gradients)
      : op_(op),
        gradients_(gradients) {
  }

  void run() const {
    const bool vectors = op_.input.channel == 1 && op_.channels >= Vec::size();
    constexpr int64_t kCached = 65536 / static_cast<int64_t>(sizeof(acc_t));  // elements of a tile
    const int64_t limit = std::max<int64_t>(1, std::min(kGridTile, kCached / std::max<int64_t>(1, op_.channels)));
    const GridTiling tiling(op_.out_height, op_.out_width, limit);
    const int threads = omp_get_max_threads();
    const int64_t size = round_up(std::min(limit, op_.out_pixels()) * op_.channels, kCacheLine);
    const Scratch<acc_t> scratch(threads * size);
    const Scratch<scalar_t> outside(op_.channels);
    std::fill_n(outside.get(), op_.channels, scalar_t(0));
#pragma omp parallel num_threads(threads)
    {
      acc_t* grad = scratch.get() + omp_get_thread_num() * size;
      GridTile<kMode, scalar_t> tile(op_);
      alignas(kCacheLine) acc_t sums[kPixels][kGridTile];
#pragma omp for
      for (int64_t unit = 0; unit < op_.batch * tiling.count(); ++unit) {
        OutputBlock block = tiling.tile(unit / tiling.count(), unit % tiling.count());
        block.channels = op_.channels;
        if constexpr (kMode != GridInterpolation::nearest) {
          tile.template find<true>(block);
          load_tile(gradients_.output, block, grad);
          for (auto& sum : sums) {
            std::fill_n(sum, kGridTile, acc_t(0));
          }
          if (vectors) {
            sum_pixels(tile, block, grad, outside.get(), sums);
          } else {
            sum_planes(tile, block, grad, sums);
          }
        }
        store(tile, block, sums);
      }
    }
  }

 private:
  void sum_pixels(
      const GridTile<kMode, scalar_t>& tile, const OutputBlock& block, const acc_t* grad, const scalar_t* outside,
      acc_t (&sums)[kPixels][kGridTile]) const {
    const scalar_t* first = op_.input.at(block.image, 0, 0);
    for (int64_t i = 0; i < tile.pixels; ++i, grad += op_.channels) {
      for (int p = 0; p < kPixels; ++p) {
        const int64_t y = tile.rows.index[p / kTaps][i], x = tile.columns.index[p % kTaps][i];
        const scalar_t* pixel = (y | x) < 0 ? outside : first + (y * op_.input.row + x * op_.input.column);
        Vec sum(0);
        for (int64_t c = 0; c < op_.channels; c += Vec::size()) {
          const int64_t count = std::min<int64_t>(Vec::size(), op_.channels - c);
          sum = at::vec::fmadd(Vec::loadu(grad + c, count), load_vector(pixel + c, count), sum);
        }
        sums[p][i] = at::vec::vec_reduce_all<acc_t>([](const Vec& a, const Vec& b) { return a + b; }, sum);
      }
    }
  }

  void sum_planes(
      const GridTile<kMode, scalar_t>& tile, const OutputBlock& block, const acc_t* grad,
      acc_t (&sums)[kPixels][kGridTile]) const {
    GridOffsets<kMode, scalar_t> offsets(op_);
    offsets.find(tile);
    alignas(kCacheLine) acc_t of_channel[kGridTile] = {}, values[kGridTile] = {};
    for (int64_t c = 0; c < op_.channels; ++c) {
      for (int64_t i = 0; i < tile.pixels; ++i) {
        of_channel[i] = grad[i * op_.channels + c];
      }
      const scalar_t* plane = op_.input.at(block.image, 0, 0) + c * op_.input.channel;
      for (int p = 0; p < kPixels; ++p) {
        offsets.gather(p, plane, values);
        for (int64_t i = 0; i < tile.pixels; i += Vec::size()) {
          at::vec::fmadd(Vec::loadu(of_channel + i), Vec::loadu(values + i), Vec::loadu(sums[p] + i))
              .store(sums[p] + i);
        }
      }
    }
  }

  void store(
      const GridTile<kMode, scalar_t>& tile, const OutputBlock& block, const acc_t (&sums)[kPixels][kGridTile]) const {
    int64_t i = 0;
    for (int64_t row = 0; row < block.rows; ++row) {
      for (int64_t column = 0; column < block.columns; ++column, ++i) {
        acc_t by_column = 0, by_row = 0;
        if constexpr (kMode != GridInterpolation::nearest) {
          for (int j = 0; j < kTaps; ++j) {
            for (int k = 0; k < kTaps; ++k) {
              const acc_t sum = sums[j * kTaps + k][i];
              by_column += tile.rows.weight[j][i] * tile.columns.slope[k][i] * sum;
              by_row += tile.rows.slope[j][i] * tile.columns.weight[k][i] * sum;
            }
          }
        }
        *gradients_.grid.at(block.image, 0, block.row + row, block.column + column) = static_cast<scalar_t>(by_column);
        *gradients_.grid.at(block.image, 1, block.row + row, block.column + column) = static_cast<scalar_t>(by_row);
      }
    }
  }

  const GridSampler2d<scalar_t>& op_;
  const GridSampler2dGradients<scalar_t>& gradients_;
};

template <GridInterpolation kMode, typename scalar_t>
class GridImageGradient {
 public:
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  static constexpr int kTaps = grid_taps(kMode);
  static constexpr int64_t kSlab = kCacheLine / static_cast<int64_t>(sizeof(acc_t));  // channels, at most

  GridImageGradient(const GridSampler2d<scalar_t>& op, const GridSampler2dGradients<scalar_t>& gradients)
      : op_(op),
        gradients_(gradients),
        threads_(omp_get_max_threads()),
        tiling_(op.out_height, op.out_width, kGridTile),
        slab_(std::max<int64_t>(1, std::min(kSlab, op.channels))),
        slabs_(divide_up(op.channels, slab_)),
        bands_(op.height, rows_in_cache(), bands_wanted()),
        first_row_(op.batch * tiling_.count()),
        last_row_(op.batch * tiling_.count()) {
  }

  void run() const {
    const int64_t size = round_up(divide_up(op_.height, bands_.tiles) * op_.width * slab_, kCacheLine);
    const Scratch<acc_t> scratch(threads_ * size);
#pragma omp parallel num_threads(threads_)
    {
      GridTile<kMode, scalar_t> tile(op_);
      acc_t* sums = scratch.get() + omp_get_thread_num() * size;
      alignas(kCacheLine) acc_t grad[kGridTile * kSlab];
#pragma omp for
      for (int64_t unit = 0; unit < op_.batch * tiling_.count(); ++unit) {
        find_rows(tile, unit);
      }
#pragma omp for schedule(dynamic)
      for (int64_t unit = 0; unit < op_.batch * slabs_ * bands_.tiles; ++unit) {
        const int64_t band = unit % bands_.tiles, channel = unit / bands_.tiles % slabs_ * slab_;
        sum_band(tile, unit / bands_.tiles / slabs_, channel, bands_.begin(band), bands_.begin(band + 1), grad, sums);
      }
    }
  }

 private:
  int64_t rows_in_cache() const {
    constexpr int64_t kCached = (int64_t{256} << 10) / static_cast<int64_t>(sizeof(acc_t));  // elements
    return std::max<int64_t>(1, kCached / (op_.width * slab_));
  }
  // To keep all threads busy.
  int64_t bands_wanted() const {
    const int64_t others = op_.batch * slabs_;
    return others >= 2 * threads_ ? 1 : 4 * threads_;
  }

  // Between which rows the samples of a tile lie.
  void find_rows(GridTile<kMode, scalar_t>& tile, int64_t unit) const {
    tile.find(tiling_.tile(unit / tiling_.count(), unit % tiling_.count()));
    int64_t first = op_.height, last = -1;
    for (const auto& index : tile.rows.index) {
      for (int64_t i = 0; i < tile.pixels; ++i) {
        const int64_t y = index[i];
        first = std::min(first, y < 0 ? first : y);
        last = std::max(last, y);
      }
    }
    first_row_[unit] = first;
    last_row_[unit] = last;
  }

  void sum_band(
      GridTile<kMode, scalar_t>& tile, int64_t image, int64_t channel, int64_t begin, int64_t end, acc_t* grad,
      acc_t* sums) const {
    const int64_t channels = std::min(slab_, op_.channels - channel);
    std::fill_n(sums, (end - begin) * op_.width * channels, acc_t(0));
    for (int64_t t = 0; t < tiling_.count(); ++t) {
      const int64_t unit = image * tiling_.count() + t;
      if (last_row_[unit] < begin || first_row_[unit] >= end) {
        continue;
      }
      OutputBlock block = tiling_.tile(image, t);
      block.channel = channel;
      block.channels = channels;
      tile.find(block);
      load_tile(gradients_.output, block, grad);
      if (channels == kSlab) {
        scatter<kSlab>(tile, begin, end, grad, sums, kSlab);
      } else {
        scatter<0>(tile, begin, end, grad, sums, channels);
      }
    }
    for (int64_t y = begin; y < end; ++y) {
      const acc_t* row = sums + (y - begin) * op_.width * channels;
      store_pixels(row, channels, gradients_.input, image, channel, y, 0, op_.width, channels);
    }
  }

  // `kChannels`: how many, if that is known.
  template <int64_t kChannels>
  void scatter(
      const GridTile<kMode, scalar_t>& tile, int64_t begin, int64_t end, const acc_t* grad, acc_t* sums,
      int64_t channels) const {
    channels = kChannels > 0 ? kChannels : channels;
    for (int64_t i = 0; i < tile.pixels; ++i, grad += channels) {
      for (int j = 0; j < kTaps; ++j) {
        const int64_t y = tile.rows.index[j][i];
        if (y < begin || y >= end) {
          continue;
        }
        for (int k = 0; k < kTaps; ++k) {
          const int64_t x = tile.columns.index[k][i];
          if (x < 0) {
            continue;
          }
          acc_t weight = 1;
          if constexpr (kMode != GridInterpolation::nearest) {
            weight = tile.rows.weight[j][i] * tile.columns.weight[k][i];
          }
          acc_t* to = sums + ((y - begin) * op_.width + x) * channels;
          if constexpr (kChannels > 0) {
            for (int64_t c = 0; c < kChannels; c += Vec::size()) {
              at::vec::fmadd(Vec(weight), Vec::loadu(grad + c), Vec::loadu(to + c)).store(to + c);
            }
          } else {
            for (int64_t c = 0; c < channels; ++c) {
              to[c] += weight * grad[c];
            }
          }
        }
      }
    }
  }

  const GridSampler2d<scalar_t>& op_;
  const GridSampler2dGradients<scalar_t>& gradients_;
  const int threads_;
  const GridTiling tiling_;
  const int64_t slab_, slabs_;
  const Tiling bands_;  // of rows
  const Scratch<int64_t> first_row_, last_row_;
};

template <GridInterpolation kMode, typename scalar_t>
inline void grid_sampler_2d_backward(
    const GridSampler2d<scalar_t>& op, const GridSampler2dGradients<scalar_t>& gradients) {
  if (gradients.grid.data != nullptr) {
    GridGradient<kMode, scalar_t>(op, gradients).run();
  }
  if (gradients.input.data != nullptr) {
    GridImageGradient<kMode, scalar_t>(op, gradients).run();
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_GRID_SAMPLER_2D_BACKWARD_H
