// What grid_sampler_2d.h and its gradient share: where samples are taken, and the pixels that each is made of.
//
//   H, W     height and width of the images
//   Ho, Wo   of the grid, and of the output
//   place    where a sample is taken along an axis, in pixels
//   taps     the rows, and the columns, that a sample is made of: 1 (nearest), 2 (bilinear) or 4 (bicubic)
//   tile     some pixels of the output of one image: consecutive ones of a row, or some whole rows
//
//   sample = sum of row_weight[j] * column_weight[k] * pixel(row[j], column[k])    for taps j, k
//
// A tap outside of the image counts as a pixel that is zero: its weight, which is NaN at a place that is NaN or
// infinite, is multiplied with that zero.
#ifndef INDUCTOR_VISION_GRID_SAMPLER_H
#define INDUCTOR_VISION_GRID_SAMPLER_H

#include <limits>

#include "base.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

enum class GridInterpolation { bilinear, nearest, bicubic };  // in aten's order
enum class GridPadding { zeros, border, reflection };

constexpr int grid_taps(GridInterpolation interpolation) {
  return interpolation == GridInterpolation::nearest ? 1 : interpolation == GridInterpolation::bilinear ? 2 : 4;
}

template <typename scalar_t>
struct GridSampler2d {
  View4d<scalar_t> input;
  View4d<scalar_t> grid;  // [B, 2, Ho, Wo], whatever its order in memory: columns, rows, from -1 to 1
  int64_t batch, channels, height, width;
  int64_t out_height, out_width;
  GridPadding padding;
  bool align_corners;  // -1 and 1 are the centres of the outermost pixels, otherwise their outer borders

  int64_t out_pixels() const {
    return out_height * out_width;
  }
};

// How places along an axis come from coordinates, in aten's order of operations, and from places the taps.
template <typename acc_t>
class GridSamplerAxis {
 public:
  using Vec = Vectorized<acc_t>;

  GridSamplerAxis(int64_t size, GridPadding padding, bool align_corners)
      : size_(static_cast<acc_t>(size)),
        scale_(align_corners ? static_cast<acc_t>(size - 1) / 2 : static_cast<acc_t>(size) / 2),
        offset_(align_corners ? acc_t(0) : acc_t(0.5)),
        span_(static_cast<acc_t>(2 * (align_corners ? size - 1 : size))),
        padding_(padding) {
  }

  // Pixels for a step of 1 of the coordinate.
  acc_t scale() const {
    return scale_;
  }
  Vec place(const Vec& coordinate) const {
    return (coordinate + Vec(1)) * Vec(scale_) - Vec(offset_);
  }
  // NaN becomes 0, unless outside is zero.
  Vec padded(const Vec& place) const {
    switch (padding_) {
      case GridPadding::zeros:
        return place;
      case GridPadding::border:
        return clamped(place);
      default:
        return clamped(reflected(place));
    }
  }
  // The derivative of `padded`: on the border, where it has a kink, that of what is outside.
  Vec padded_slope(const Vec& place) const {
    const Vec zero(0), one(1);
    if (padding_ == GridPadding::zeros) {
      return one;
    }
    Vec slope = one, at = place;
    if (padding_ == GridPadding::reflection) {
      if (span_ == 0) {
        return zero;
      }
      const Vec from = place + Vec(offset_), extra = beyond(from.abs());
      const Vec forth = Vec::blendv(one, Vec(-1), extra > Vec(span_) - extra);
      slope = Vec::blendv(forth, forth.neg(), from < zero);
      at = reflected(place);
    }
    return Vec::blendv(zero, slope, (at > zero) & (at < Vec(size_ - 1)));
  }
  Vec inside(const Vec& tap) const {
    return (tap > Vec(-1)) & (tap < Vec(size_));
  }

 private:
  Vec clamped(const Vec& place) const {
    const Vec zero(0);
    return at::vec::minimum(Vec::blendv(zero, place, place > zero), Vec(size_ - 1));
  }
  Vec reflected(const Vec& place) const {
    if (span_ == 0) {
      return Vec(0);
    }
    const Vec extra = beyond((place + Vec(offset_)).abs());
    return at::vec::minimum(extra, Vec(span_) - extra) - Vec(offset_);
  }
  Vec beyond(const Vec& distance) const {
    return distance - (distance / Vec(span_)).trunc() * Vec(span_);
  }

  acc_t size_, scale_, offset_, span_;
  GridPadding padding_;
};

// The cubic convolution kernel with A = -0.75: its values, or its slopes, at the distances of four taps.
template <bool kSlope, typename Vec>
inline std::array<Vec, 4> cubic_weights(const Vec& fraction) {
  const Vec a(-0.75), one(1), two(2);
  const auto near = [&](const Vec& t) {  // within a pixel
    if constexpr (kSlope) {
      return ((a + two) * Vec(3) * t - (a + Vec(3)) * two) * t;
    } else {
      return ((a + two) * t - (a + Vec(3))) * t * t + one;
    }
  };
  const auto far = [&](const Vec& t) {  // between one and two pixels away
    if constexpr (kSlope) {
      return (a * Vec(3) * t - a * Vec(10)) * t + a * Vec(8);
    } else {
      return ((a * t - a * Vec(5)) * t + a * Vec(8)) * t - a * Vec(4);
    }
  };
  std::array<Vec, 4> weights{far(fraction + one), near(fraction), near(one - fraction), far(two - fraction)};
  if constexpr (kSlope) {
    weights[2] = weights[2].neg();
    weights[3] = weights[3].neg();
  }
  return weights;
}

constexpr int64_t kGridTile = 128;  // pixels, at most

// The taps of a tile's samples along an axis.
template <GridInterpolation kMode, typename acc_t>
struct GridTaps {
  static constexpr int kTaps = grid_taps(kMode);
  using Vec = Vectorized<acc_t>;
  using index_t = at::vec::int_same_size_t<acc_t>;

  alignas(kCacheLine) index_t index[kTaps][kGridTile];  // -1: outside of the image
  alignas(kCacheLine) acc_t weight[kTaps][kGridTile];
  alignas(kCacheLine) acc_t slope[kTaps][kGridTile];  // of the weight, by the coordinate; with kSlopes

  // `coordinates`: those of the tile; they are read up to a whole vector.
  template <bool kSlopes>
  void find(const GridSamplerAxis<acc_t>& axis, const acc_t* coordinates, int64_t pixels) {
    const Vec zero(0), one(1);
    for (int64_t i = 0; i < pixels; i += Vec::size()) {
      const Vec unpadded = axis.place(Vec::loadu(coordinates + i));
      if constexpr (kMode == GridInterpolation::nearest) {
        set_index(0, i, axis, axis.padded(unpadded).round());
      } else if constexpr (kMode == GridInterpolation::bilinear) {
        const Vec place = axis.padded(unpadded), first = place.floor(), second_weight = place - first;
        set_index(0, i, axis, first);
        set_index(1, i, axis, first + one);
        (one - second_weight).store(weight[0] + i);
        second_weight.store(weight[1] + i);
        if constexpr (kSlopes) {
          const Vec by_coordinate = axis.padded_slope(unpadded) * Vec(axis.scale());
          by_coordinate.neg().store(slope[0] + i);
          by_coordinate.store(slope[1] + i);
        }
      } else {
        const Vec floor = unpadded.floor(), fraction = unpadded - floor;
        const auto weights = cubic_weights<false>(fraction);
        for (int tap = 0; tap < kTaps; ++tap) {
          set_index(tap, i, axis, axis.padded(floor + Vec(static_cast<acc_t>(tap - 1))));
          weights[tap].store(weight[tap] + i);
        }
        if constexpr (kSlopes) {
          const auto slopes = cubic_weights<true>(fraction);
          for (int tap = 0; tap < kTaps; ++tap) {
            (slopes[tap] * Vec(axis.scale())).store(slope[tap] + i);
          }
        }
      }
    }
  }

 private:
  void set_index(int tap, int64_t i, const GridSamplerAxis<acc_t>& axis, const Vec& place) {
    const Vec known = Vec::blendv(Vec(-1), place, axis.inside(place));  // before it is converted
    at::vec::convert_to_int_of_same_size(known).store(index[tap] + i);
  }
};

// How the pixels of an output are cut into tiles: at most `limit` pixels in each, as OutputBlock has them.
class GridTiling {
 public:
  GridTiling(int64_t height, int64_t width, int64_t limit)
      : height_(height),
        width_(width),
        rows_(std::max<int64_t>(1, limit / std::max<int64_t>(1, width))),
        parts_(divide_up(width, std::max<int64_t>(1, limit))),
        bands_(divide_up(height, rows_)) {
  }
  int64_t count() const {
    return bands_ * parts_;
  }
  OutputBlock tile(int64_t image, int64_t tile) const {
    const int64_t row = tile / parts_ * rows_, part = tile % parts_;
    const int64_t begin = width_ * part / parts_, end = width_ * (part + 1) / parts_;
    return {image, 0, 0, row, std::min(rows_, height_ - row), begin, end - begin};
  }

 private:
  int64_t height_, width_, rows_, parts_, bands_;
};

// A tile, and where its samples are.
template <GridInterpolation kMode, typename scalar_t>
class GridTile {
 public:
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int kTaps = grid_taps(kMode);
  static constexpr int kPixels = kTaps * kTaps;  // of a sample

  explicit GridTile(const GridSampler2d<scalar_t>& op)
      : op_(op),
        row_axis_(op.height, op.padding, op.align_corners),
        column_axis_(op.width, op.padding, op.align_corners) {
    std::fill_n(x_, kGridTile, acc_t(0));
    std::fill_n(y_, kGridTile, acc_t(0));
  }

  template <bool kSlopes = false>
  void find(const OutputBlock& block) {
    const View4d<scalar_t>& grid = op_.grid;
    acc_t* x = x_;
    acc_t* y = y_;
    for (int64_t row = 0; row < block.rows; ++row) {
      const scalar_t* from = grid.at(block.image, block.row + row, block.column);
      for (int64_t column = 0; column < block.columns; ++column, from += grid.column) {
        *x++ = static_cast<acc_t>(from[0]);
        *y++ = static_cast<acc_t>(from[grid.channel]);
      }
    }
    pixels = block.rows * block.columns;
    rows.template find<kSlopes>(row_axis_, y_, pixels);
    columns.template find<kSlopes>(column_axis_, x_, pixels);
  }

  int64_t pixels = 0;
  GridTaps<kMode, acc_t> rows, columns;

 private:
  const GridSampler2d<scalar_t>& op_;
  const GridSamplerAxis<acc_t> row_axis_, column_axis_;
  alignas(kCacheLine) acc_t x_[kGridTile], y_[kGridTile];
};

// For each pixel that a tile's samples are made of: where it is from the first one of a plane, -1 if it is outside.
template <GridInterpolation kMode, typename scalar_t>
class GridOffsets {
 public:
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  using index_t = at::vec::int_same_size_t<acc_t>;
  using IndexVec = Vectorized<index_t>;
  static constexpr int kTaps = grid_taps(kMode), kPixels = kTaps * kTaps;

  explicit GridOffsets(const GridSampler2d<scalar_t>& op)
      : row_(op.input.row),
        column_(op.input.column),
        fits_((op.height - 1) * row_ + (op.width - 1) * column_ <= std::numeric_limits<index_t>::max()) {
  }

  void find(const GridTile<kMode, scalar_t>& tile) {
    tile_ = &tile;
    const IndexVec outside(-1), row(static_cast<index_t>(row_)), column(static_cast<index_t>(column_));
    for (int p = 0; fits_ && p < kPixels; ++p) {
      for (int64_t i = 0; i < tile.pixels; i += Vec::size()) {
        const IndexVec y = IndexVec::loadu(tile.rows.index[p / kTaps] + i);
        const IndexVec x = IndexVec::loadu(tile.columns.index[p % kTaps] + i);
        IndexVec::blendv(outside, y * row + x * column, (y > outside) & (x > outside)).store(offset_[p] + i);
      }
    }
  }
  // values[i] = that pixel of the tile's samples, in a plane; up to a whole vector.
  void gather(int pixel, const scalar_t* plane, acc_t* values) const {
    const index_t* offset = offset_[pixel];
    if (!fits_) {
      gather_far(pixel, plane, values);
    } else if constexpr (std::is_same_v<scalar_t, acc_t>) {
      for (int64_t i = 0; i < tile_->pixels; i += Vec::size()) {
        // at::vec::mask_gather gathers nothing with AVX-512: it takes a mask for a number, which is NaN.
        const IndexVec at = IndexVec::loadu(offset + i), first(0);
        const Vec pixels = at::vec::gather<sizeof(acc_t)>(plane, at::vec::maximum(at, first));
        Vec::blendv(Vec(0), pixels, at::vec::cast<acc_t>(at >= first)).store(values + i);
      }
    } else {
      static constexpr scalar_t kOutside{};
      for (int64_t i = 0; i < tile_->pixels; ++i) {
        const scalar_t* from = offset[i] < 0 ? &kOutside : plane + offset[i];
        values[i] = static_cast<acc_t>(*from);
      }
    }
  }

 private:
  // Where 32 bits are too few for an offset.
  void gather_far(int pixel, const scalar_t* plane, acc_t* values) const {
    for (int64_t i = 0; i < tile_->pixels; ++i) {
      const int64_t y = tile_->rows.index[pixel / kTaps][i], x = tile_->columns.index[pixel % kTaps][i];
      values[i] = (y | x) < 0 ? acc_t(0) : static_cast<acc_t>(plane[y * row_ + x * column_]);
    }
  }

  const int64_t row_, column_;
  const bool fits_;
  const GridTile<kMode, scalar_t>* tile_ = nullptr;
  alignas(kCacheLine) index_t offset_[kPixels][kGridTile];
};

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_GRID_SAMPLER_H
