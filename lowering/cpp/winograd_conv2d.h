// Convolution with 3 x 3 kernels, stride 1, by Winograd's algorithm F(m x m, 3 x 3): m x m outputs from n x n inputs,
// n = m + 2, with n x n multiplications.  Lavin and Gray, https://arxiv.org/abs/1509.09308.
//
//   B, C, H, W    batch, channels, height, width of the input      tile     m x m pixels of the output
//   O, Ho, Wo     channels, height, width of the output            point    one of the n x n products of a tile
//   G             groups                                           line     a cache line of channels
//
//   V[point][tile][c]  = B^T input B       the transformed input
//   U[point][c][o]     = G weight G^T      the transformed weight
//   M[point][tile][o]  = V U               a matrix product for each point
//   out                = A^T M A + bias
//
// Nothing of this but U exists as a whole.  A block of tiles is transformed into V, which stays in cache.  For a slice
// of output channels all points are multiplied into M, which stays in the second-level cache, and M is transformed and
// handed to the store at once.  The depth of the products is cut into chunks, see kMaxDepth.
//
// Each number of V, M and the output is computed in an order that depends on nothing but the number of channels: the
// result has the same bits for any number of threads and any blocks.
#ifndef INDUCTOR_VISION_WINOGRAD_CONV2D_H
#define INDUCTOR_VISION_WINOGRAD_CONV2D_H

#include <vector>

#include "base.h"
#include "gemm.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// The transforms in one dimension, of vectors: `load(i)` gives the i-th, `store(i, value)` takes it.  In what order the
// points are, and how they were chosen, is said in ops/winograd_conv2d.py.
template <int kTile>
struct Winograd;

// Points 0, 1, -1, infinity.
template <>
struct Winograd<2> {
  template <typename acc_t, typename Load, typename Store>
  static void input(const Load& load, const Store& store) {
    const auto x0 = load(0), x1 = load(1), x2 = load(2), x3 = load(3);
    store(0, x2 - x0);
    store(1, x2 + x1);
    store(2, x2 - x1);
    store(3, x3 - x1);
  }
  template <typename acc_t, typename Load, typename Store>
  static void output(const Load& load, const Store& store) {
    const auto m0 = load(0), m1 = load(1), m2 = load(2), m3 = load(3);
    store(0, m0 + (m1 + m2));
    store(1, (m1 - m2) + m3);
  }
  template <typename acc_t, typename Load, typename Store>
  static void weight(const Load& load, const Store& store) {
    using Vec = Vectorized<acc_t>;
    const auto w0 = load(0), w1 = load(1), w2 = load(2);
    const auto even = Vec(0.5) * (w0 + w2), odd = Vec(0.5) * w1;
    store(0, w0.neg());
    store(1, even + odd);
    store(2, even - odd);
    store(3, w2);
  }
};

// Points 0, a, -a, b, -b, infinity.
template <>
struct Winograd<4> {
  static constexpr double a = 5.0 / 8, b = 3.0 / 2;

  template <typename acc_t, typename Load, typename Store>
  static void input(const Load& load, const Store& store) {
    using Vec = Vectorized<acc_t>;
    using at::vec::fmadd;
    const Vec minus_a2(-a * a), minus_b2(-b * b), product(a * a * b * b), sum(-(a * a + b * b));
    const Vec x0 = load(0), x1 = load(1), x2 = load(2), x3 = load(3), x4 = load(4), x5 = load(5);
    store(0, fmadd(product, x0, fmadd(sum, x2, x4)));
    const Vec even_a = fmadd(minus_b2, x2, x4), odd_a = fmadd(minus_b2, x1, x3);
    store(1, fmadd(Vec(a), odd_a, even_a));
    store(2, fmadd(Vec(-a), odd_a, even_a));
    const Vec even_b = fmadd(minus_a2, x2, x4), odd_b = fmadd(minus_a2, x1, x3);
    store(3, fmadd(Vec(b), odd_b, even_b));
    store(4, fmadd(Vec(-b), odd_b, even_b));
    store(5, fmadd(product, x1, fmadd(sum, x3, x5)));
  }
  template <typename acc_t, typename Load, typename Store>
  static void output(const Load& load, const Store& store) {
    using Vec = Vectorized<acc_t>;
    using at::vec::fmadd;
    const Vec m0 = load(0), m1 = load(1), m2 = load(2), m3 = load(3), m4 = load(4), m5 = load(5);
    const Vec even_a = m1 + m2, odd_a = m1 - m2, even_b = m3 + m4, odd_b = m3 - m4;
    store(0, m0 + (even_a + even_b));
    store(1, fmadd(Vec(a), odd_a, Vec(b) * odd_b));
    store(2, fmadd(Vec(a * a), even_a, Vec(b * b) * even_b));
    store(3, fmadd(Vec(a * a * a), odd_a, fmadd(Vec(b * b * b), odd_b, m5)));
  }
  template <typename acc_t, typename Load, typename Store>
  static void weight(const Load& load, const Store& store) {
    using Vec = Vectorized<acc_t>;
    constexpr double at_a = 1 / (2 * a * a * (a * a - b * b)), at_b = 1 / (2 * b * b * (b * b - a * a));
    const auto w0 = load(0), w1 = load(1), w2 = load(2);
    store(0, Vec(1 / (a * a * b * b)) * w0);
    const Vec even_a = at::vec::fmadd(Vec(a * a), w2, w0), odd_a = Vec(a) * w1;
    store(1, Vec(at_a) * (even_a + odd_a));
    store(2, Vec(at_a) * (even_a - odd_a));
    const Vec even_b = at::vec::fmadd(Vec(b * b), w2, w0), odd_b = Vec(b) * w1;
    store(3, Vec(at_b) * (even_b + odd_b));
    store(4, Vec(at_b) * (even_b - odd_b));
    store(5, w2);
  }
};

// A weight [G][O / G][C / G][9] that is to be transformed, with any strides but those of its taps, which are
// neighbours. Of the convolution that is the gradient of another one's input: `rotated`, taps are in the reverse order.
template <typename scalar_t>
struct WinogradWeight {
  const scalar_t* data;
  int64_t groups, outputs, inputs;  // the latter two of a group
  int64_t group, output, input;     // strides
  bool rotated;

  int64_t panels() const {
    return divide_up(outputs, kPanel<accumulate_t<scalar_t>>);
  }
};

// U of a panel of outputs and of the input channels [begin, end) of a group: [points][inputs][kPanel].
template <int kTile, typename scalar_t>
inline void transform_weight(
    const WinogradWeight<scalar_t>& weight, int64_t group, int64_t panel, int64_t begin, int64_t end,
    accumulate_t<scalar_t>* out) {
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  constexpr int64_t kLine = kPanel<acc_t>, kSide = kTile + 2, kTaps = 9;
  constexpr int kVectors = static_cast<int>(kLine / Vec::size());
  constexpr int64_t kChannels = 8;  // at a time
  alignas(kCacheLine) acc_t taps[kChannels * kTaps * kLine];
  alignas(kCacheLine) acc_t half[kSide * 3 * kLine];
  alignas(kCacheLine) acc_t transformed[kSide * kSide * kChannels * kLine];
  const int64_t outputs = std::min(kLine, weight.outputs - panel * kLine);
  if (outputs < kLine) {
    std::fill_n(taps, kChannels * kTaps * kLine, acc_t(0));
  }
  for (int64_t first = begin; first < end; first += kChannels) {
    const int64_t channels = std::min(kChannels, end - first);
    const scalar_t* from = weight.data + group * weight.group + panel * kLine * weight.output + first * weight.input;
    if (weight.input == kTaps) {  // one long row
      load_block(from, 1, weight.output, taps, kLine, channels * kTaps, outputs);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        load_block(from + c * weight.input, 1, weight.output, taps + c * kTaps * kLine, kLine, kTaps, outputs);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      const acc_t* line = taps + c * kTaps * kLine;
      for (int64_t j = 0; j < 3; ++j) {
        ForcedUnroll<kVectors>{}([&](auto v) {
          Winograd<kTile>::template weight<acc_t>(
              [&](int i) {
                const int64_t tap = weight.rotated ? kTaps - 1 - (i * 3 + j) : i * 3 + j;
                return Vec::loadu(line + tap * kLine + v * Vec::size());
              },
              [&](int x, const Vec& value) { value.store(half + (x * 3 + j) * kLine + v * Vec::size()); });
        });
      }
      for (int64_t x = 0; x < kSide; ++x) {
        ForcedUnroll<kVectors>{}([&](auto v) {
          Winograd<kTile>::template weight<acc_t>(
              [&](int j) { return Vec::loadu(half + (x * 3 + j) * kLine + v * Vec::size()); },
              [&](int y, const Vec& value) {
                value.store(transformed + ((x * kSide + y) * kChannels + c) * kLine + v * Vec::size());
              });
        });
      }
    }
    for (int64_t point = 0; point < kSide * kSide; ++point) {  // some lines in a row: points share cache sets
      std::copy_n(
          transformed + point * kChannels * kLine, channels * kLine, out + (point * weight.inputs + first) * kLine);
    }
  }
}

// U of a weight: [groups][panels][points][inputs][kPanel].
template <int kTile, typename scalar_t>
inline void winograd_weight(const WinogradWeight<scalar_t>& weight, accumulate_t<scalar_t>* out) {
  constexpr int64_t kPoints = (kTile + 2) * (kTile + 2), kChannels = 64;  // of a piece
  const int64_t cuts = divide_up(weight.inputs, kChannels), panels = weight.panels();
#pragma omp parallel for num_threads(omp_get_max_threads()) schedule(static)
  for (int64_t piece = 0; piece < weight.groups * panels * cuts; ++piece) {
    const int64_t panel = piece / cuts, begin = piece % cuts * kChannels;
    transform_weight<kTile>(
        weight, panel / panels, panel % panels, begin, std::min(begin + kChannels, weight.inputs),
        out + panel * kPoints * weight.inputs * kPanel<accumulate_t<scalar_t>>);
  }
}

template <typename scalar_t>
struct WinogradConv2d {
  using acc_t = accumulate_t<scalar_t>;
  View4d<scalar_t> input;
  const acc_t* weight;   // U: [G][panels][points][C / G][kPanel]; null where it is transformed in the call
  const scalar_t* bias;  // [O]; null: none
  int64_t batch, channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t padding_height, padding_width;  // may be negative
  int64_t groups;

  int64_t group_channels() const {
    return channels / groups;
  }
  int64_t group_outputs() const {
    return out_channels / groups;
  }
  int64_t group_panels() const {
    return divide_up(group_outputs(), kPanel<acc_t>);
  }
};

// Sizes that are chosen; see lowering/winograd_conv2d.py.
struct WinogradBlocking {
  int64_t tiles;   // in a block, at most
  int64_t panels;  // of output channels in a slice, at most
};

// Neighbouring tiles of one row of tiles, and where the first of them begins in the output.
struct TileRun {
  int64_t image, row, column;
  int64_t first, count;  // in the block
};

// V of some tiles: [chunk][point][tile][channel].
template <int kPoints, int64_t kRow, typename acc_t>
struct TransformedInput {
  acc_t* data;
  int64_t tiles;

  // A cache line more than is needed: points a power of two apart would share cache sets.
  static int64_t point_distance(int64_t tiles) {
    return tiles * kRow + kPanel<acc_t>;
  }
  static int64_t size(int64_t chunks, int64_t tiles) {
    return chunks * kPoints * point_distance(tiles);
  }
  int64_t distance() const {
    return point_distance(tiles);
  }
  acc_t* at(int64_t chunk, int64_t point, int64_t tile) const {
    return data + (chunk * kPoints + point) * distance() + tile * kRow;
  }
};

// One thread's buffers, and what it does with a block of tiles.
//
// kDepth: channels in a chunk, at most; whole lines.
template <bool kChannelsLast, int kTile, int64_t kDepth, typename scalar_t>
class WinogradBlock {
 public:
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  static constexpr int kSide = kTile + 2, kPoints = kSide * kSide;
  static constexpr int64_t kLine = kPanel<acc_t>;
  static constexpr int kVectors = static_cast<int>(kLine / Vec::size());  // in a line
  // An odd number of cache lines: rows a power of two apart would share cache sets.
  static constexpr int64_t kRow = kDepth / kLine % 2 == 0 ? kDepth + kLine : kDepth;
  static constexpr int64_t kRun = 16;  // tiles in a run, at most
  using Input = TransformedInput<kPoints, kRow, acc_t>;

  // Some panels of a group's output channels.
  struct Slice {
    int64_t group, panel, panels;
  };

  // `transforms`: the weight of slices too.
  WinogradBlock(const WinogradConv2d<scalar_t>& op, int64_t tiles, int64_t panels, bool transforms)
      : op_(op),
        tiles_(tiles),
        columns_(panels * kLine),
        tile_columns_(divide_up(op.out_width, kTile)),
        tile_rows_(divide_up(op.out_height, kTile)),
        zeros_(columns_),
        pixels_(kSide * (kRun * kTile + 2) * kLine),
        weight_(transforms ? panels * panel_size(op) : 0),
        products_(kPoints * product_distance()),
        bias_(columns_),
        results_(kTile * kRun * kTile * columns_),
        by_channel_(kChannelsLast ? 0 : kRun * kTile * kLine) {
    std::fill_n(zeros_.get(), columns_, acc_t(0));
    std::fill_n(no_pixel_, kLine, scalar_t(0));
  }

  static int64_t chunks(const WinogradConv2d<scalar_t>& op) {
    return op.groups * divide_up(op.group_channels(), kDepth);
  }

  // V of the tiles [begin, end) of all; the first becomes tile `to` of `out`.
  void transform_input(int64_t begin, int64_t end, const Input& out, int64_t to) {
    for_runs(begin, end, [&](const TileRun& run) {
      if (op_.input.channel == 1) {
        transform_pixels(run, out, to);
      } else {
        transform_planes(run, out, to);
      }
    });
  }

  // Zeros in the rows of V that micro-tiles read beyond its last.
  static void pad_input(const WinogradConv2d<scalar_t>& op, const Input& out, int64_t from, int64_t to) {
    for (int64_t chunk = 0; from < to && chunk < chunks(op); ++chunk) {
      for (int64_t point = 0; point < kPoints; ++point) {
        std::fill_n(out.at(chunk, point, from), (to - from) * kRow, acc_t(0));
      }
    }
  }

  // Elements of U for a panel.
  static int64_t panel_size(const WinogradConv2d<scalar_t>& op) {
    return kPoints * op.group_channels() * kLine;
  }
  // U of a slice.
  const acc_t* weight_of(const Slice& slice) const {
    return op_.weight + (slice.group * op_.group_panels() + slice.panel) * panel_size(op_);
  }
  const acc_t* transform_weight(const WinogradWeight<scalar_t>& weight, const Slice& slice) {
    for (int64_t p = 0; p < slice.panels; ++p) {
      inductor_vision::transform_weight<kTile>(
          weight, slice.group, slice.panel + p, 0, weight.inputs, weight_.get() + p * panel_size(op_));
    }
    return weight_.get();
  }

  // The output channels of a slice, whose U is `weight`, of the tiles [begin, end) of all, of which the first is tile
  // `from` of `in`.
  template <typename Store>
  void run(
      const Input& in, int64_t from, const acc_t* weight, int64_t begin, int64_t end, const Slice& slice,
      const Store& store) {
    multiply(in, from, weight, round_up(end - begin, kRowStep), slice);
    const int64_t channel = slice.group * op_.group_outputs() + slice.panel * kLine;
    const int64_t channels = std::min(slice.panels * kLine, op_.group_outputs() - slice.panel * kLine);
    for (int64_t i = 0; i < slice.panels * kLine; ++i) {
      const bool exists = op_.bias != nullptr && i < channels;
      bias_[i] = exists ? static_cast<acc_t>(op_.bias[channel + i]) : acc_t(0);
    }
    for_runs(begin, end, [&](const TileRun& run) {
      if constexpr (kChannelsLast) {
        finish_pixels(run, channel, channels, store);
      } else {
        finish_planes(run, channel, channels, store);
      }
    });
  }

 private:
  int64_t product_distance() const {
    return round_up(tiles_, kRowStep) * columns_ + kLine;
  }

  template <typename F>
  void for_runs(int64_t begin, int64_t end, const F& f) const {
    for (int64_t t = begin; t < end;) {
      const int64_t column = t % tile_columns_, row = t / tile_columns_ % tile_rows_;
      const int64_t count = std::min({kRun, tile_columns_ - column, end - t});
      f(TileRun{t / (tile_columns_ * tile_rows_), row * kTile, column * kTile, t - begin, count});
      t += count;
    }
  }

  // f(chunk, first channel, channels) for each line of each chunk.
  template <typename F>
  void for_lines(const F& f) const {
    int64_t chunk = 0;
    for (int64_t g = 0; g < op_.groups; ++g) {
      const int64_t end = (g + 1) * op_.group_channels();
      for (int64_t first = g * op_.group_channels(); first < end; first += kDepth, ++chunk) {
        for (int64_t c = first; c < std::min(first + kDepth, end); c += kLine) {
          f(chunk, c - first, c, std::min(kLine, std::min(first + kDepth, end) - c));
        }
      }
    }
  }

  // V of a line of channels of one tile.  `load(i, j, v)` gives vector v of pixel (i, j).
  template <typename Load>
  static void transform_tile(const Load& load, acc_t* out, int64_t distance) {
    alignas(kCacheLine) acc_t half[kPoints * kLine];
    for (int64_t j = 0; j < kSide; ++j) {
      ForcedUnroll<kVectors>{}([&](auto v) {
        Winograd<kTile>::template input<acc_t>(
            [&](int i) { return load(i, j, v); },
            [&](int x, const Vec& value) { value.store(half + (x * kSide + j) * kLine + v * Vec::size()); });
      });
    }
    for (int64_t x = 0; x < kSide; ++x) {
      ForcedUnroll<kVectors>{}([&](auto v) {
        Winograd<kTile>::template input<acc_t>(
            [&](int j) { return Vec::loadu(half + (x * kSide + j) * kLine + v * Vec::size()); },
            [&](int y, const Vec& value) { value.store(out + (x * kSide + y) * distance + v * Vec::size()); });
      });
    }
  }

  // A run whose pixels have neighbouring channels.
  void transform_pixels(const TileRun& run, const Input& out, int64_t to) {
    const scalar_t* pixels[kPoints];
    const int64_t top = run.row - op_.padding_height;
    for (int64_t t = 0; t < run.count; ++t) {
      const int64_t left = run.column + t * kTile - op_.padding_width, tile = to + run.first + t;
      bool exists[kPoints];
      for (int64_t i = 0; i < kPoints; ++i) {
        const int64_t y = top + i / kSide, x = left + i % kSide;
        exists[i] = y >= 0 && y < op_.height && x >= 0 && x < op_.width;
        pixels[i] = exists[i] ? op_.input.at(run.image, y, x) : no_pixel_;
      }
      for_lines([&](int64_t chunk, int64_t offset, int64_t channel, int64_t channels) {
        acc_t* to_line = out.at(chunk, 0, tile) + offset;
        const auto from = [&](int64_t i, int64_t j) {
          const int64_t pixel = i * kSide + j;
          return pixels[pixel] + (exists[pixel] ? channel : 0);
        };
        if (channels == kLine) {
          transform_tile(
              [&](int64_t i, int64_t j, int64_t v) { return load_vector(from(i, j) + v * Vec::size()); }, to_line,
              out.distance());
        } else {
          transform_tile(
              [&](int64_t i, int64_t j, int64_t v) {
                const int64_t count = std::clamp<int64_t>(channels - v * Vec::size(), 0, Vec::size());
                return count == 0 ? Vec(0) : load_vector(from(i, j) + v * Vec::size(), count);
              },
              to_line, out.distance());
        }
      });
    }
  }

  // Any other run: a line of channels at a time is brought into the order pixel, channel.
  void transform_planes(const TileRun& run, const Input& out, int64_t to) {
    const int64_t width = run.count * kTile + 2;
    const int64_t top = run.row - op_.padding_height, left = run.column - op_.padding_width;
    const int64_t begin = std::clamp<int64_t>(-left, 0, width);
    const int64_t end = std::clamp<int64_t>(op_.width - left, begin, width);
    for_lines([&](int64_t chunk, int64_t offset, int64_t channel, int64_t channels) {
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t y = top + i;
        acc_t* row = pixels_.get() + i * width * kLine;
        const bool whole = y >= 0 && y < op_.height && begin == 0 && end == width && channels == kLine;
        if (!whole) {
          std::fill_n(row, width * kLine, acc_t(0));
        }
        if (y >= 0 && y < op_.height && begin < end) {
          const scalar_t* from = op_.input.at(run.image, y, left + begin) + channel * op_.input.channel;
          load_block(from, op_.input.column, op_.input.channel, row + begin * kLine, kLine, end - begin, channels);
        }
      }
      for (int64_t t = 0; t < run.count; ++t) {
        const acc_t* from = pixels_.get() + t * kTile * kLine;
        transform_tile(
            [&](int64_t i, int64_t j, int64_t v) {
              return Vec::loadu(from + (i * width + j) * kLine + v * Vec::size());
            },
            out.at(chunk, 0, to + run.first + t) + offset, out.distance());
      }
    });
  }

  // M of a slice of panels.
  void multiply(const Input& in, int64_t from, const acc_t* weight, int64_t rows, const Slice& slice) {
    const int64_t inputs = op_.group_channels(), chunks = divide_up(inputs, kDepth);
    for (int64_t point = 0; point < kPoints; ++point) {
      acc_t* sums = products_.get() + point * product_distance();
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t k = chunk * kDepth;
        const Rows<acc_t, kRow> a{in.at(slice.group * chunks + chunk, point, from), 1, std::min(kDepth, inputs - k), 0};
        const Panels<acc_t> b{weight + (point * inputs + k) * kLine, panel_size(op_)};
        const Sums<acc_t> c(sums, columns_, chunk == 0 ? zeros_.get() : sums, chunk == 0 ? 0 : columns_);
        gemm(a, b, slice.panels, c, rows);
      }
    }
  }

  // The pixels of a line of output channels of one tile.  `store(i, j, v, value)` takes vector v of pixel (i, j).
  template <typename Store>
  void transform_products(int64_t tile, int64_t column, const Store& store) const {
    alignas(kCacheLine) acc_t half[kTile * kSide * kLine];
    const acc_t* from = products_.get() + tile * columns_ + column;
    for (int64_t y = 0; y < kSide; ++y) {
      ForcedUnroll<kVectors>{}([&](auto v) {
        Winograd<kTile>::template output<acc_t>(
            [&](int x) { return Vec::loadu(from + (x * kSide + y) * product_distance() + v * Vec::size()); },
            [&](int i, const Vec& value) { value.store(half + (i * kSide + y) * kLine + v * Vec::size()); });
      });
    }
    for (int64_t i = 0; i < kTile; ++i) {
      ForcedUnroll<kVectors>{}([&](auto v) {
        const Vec bias = Vec::loadu(bias_.get() + column + v * Vec::size());
        Winograd<kTile>::template output<acc_t>(
            [&](int y) { return Vec::loadu(half + (i * kSide + y) * kLine + v * Vec::size()); },
            [&](int j, const Vec& value) { store(i, j, v, value + bias); });
      });
    }
  }

  template <typename Store>
  void finish_pixels(const TileRun& run, int64_t channel, int64_t channels, const Store& store) {
    constexpr bool kAsTheyAre = std::is_same_v<Store, DenseStore<true, acc_t>>;
    const int64_t width = run.count * kTile;
    const int64_t rows = std::min<int64_t>(kTile, op_.out_height - run.row);
    const int64_t columns = std::min(width, op_.out_width - run.column);
    acc_t* to = results_.get();
    int64_t pixel = columns_, row = width * columns_;  // distances
    bool in_place = false;
    if constexpr (kAsTheyAre) {
      in_place = rows == kTile && columns == width && channels % kLine == 0;
      if (in_place) {
        to = store.at(OutputBlock{run.image, channel, channels, run.row, rows, run.column, columns});
        pixel = op_.out_channels;
        row = op_.out_width * op_.out_channels;
      }
    }
    for (int64_t t = 0; t < run.count; ++t) {
      for (int64_t c = 0; c < channels; c += kLine) {
        acc_t* out = to + t * kTile * pixel + c;
        transform_products(run.first + t, c, [&](int64_t i, int64_t j, int64_t v, const Vec& value) {
          value.store(out + i * row + j * pixel + v * Vec::size());
        });
      }
    }
    for (int64_t i = 0; !in_place && i < rows; ++i) {
      store(OutputBlock{run.image, channel, channels, run.row + i, 1, run.column, columns}, to + i * row, pixel);
    }
  }

  template <typename Store>
  void finish_planes(const TileRun& run, int64_t channel, int64_t channels, const Store& store) {
    const int64_t width = run.count * kTile;
    const int64_t rows = std::min<int64_t>(kTile, op_.out_height - run.row);
    const int64_t columns = std::min(width, op_.out_width - run.column);
    for (int64_t c = 0; c < channels; c += kLine) {
      for (int64_t t = 0; t < run.count; ++t) {
        acc_t* out = results_.get() + t * kTile * kLine;
        transform_products(run.first + t, c, [&](int64_t i, int64_t j, int64_t v, const Vec& value) {
          value.store(out + (i * width + j) * kLine + v * Vec::size());
        });
      }
      const int64_t count = std::min(kLine, channels - c);
      for (int64_t i = 0; i < rows; ++i) {
        const OutputBlock block{run.image, channel + c, count, run.row + i, 1, run.column, columns};
        const acc_t* row = results_.get() + i * width * kLine;
        if constexpr (std::is_same_v<Store, DenseStore<false, acc_t>>) {
          transpose(row, kLine, store.at(block), store.distance(), columns, count);
        } else {
          transpose(row, kLine, by_channel_.get(), columns, columns, count);
          store(block, by_channel_.get(), columns);
        }
      }
    }
  }

  const WinogradConv2d<scalar_t>& op_;
  int64_t tiles_;                     // in a block, at most
  int64_t columns_;                   // of M
  int64_t tile_columns_, tile_rows_;  // of an image
  Scratch<acc_t> zeros_;
  scalar_t no_pixel_[kLine];
  Scratch<acc_t> pixels_;      // of a run, a line of channels
  Scratch<acc_t> weight_;      // U of a slice
  Scratch<acc_t> products_;    // M
  Scratch<acc_t> bias_;        // of a slice
  Scratch<acc_t> results_;     // of a run
  Scratch<acc_t> by_channel_;  // a row of them
};

// kChannelsLast: of the output that `store` is for, see OutputBlock.  kDepth: see WinogradBlock.  `weight`: null if it
// is transformed already.
template <bool kChannelsLast, int kTile, int64_t kDepth, typename scalar_t, typename Store>
inline void winograd_conv2d(
    WinogradConv2d<scalar_t> op, const WinogradWeight<scalar_t>* weight, const WinogradBlocking& blocking,
    const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  using Block = WinogradBlock<kChannelsLast, kTile, kDepth, scalar_t>;
  using Input = typename Block::Input;
  const int64_t total = op.batch * divide_up(op.out_height, kTile) * divide_up(op.out_width, kTile);
  if (total * op.out_channels == 0) {
    return;
  }
  const int threads = omp_get_max_threads();
  // Blocks are cut at multiples of kMicroRows, so that only the last has rows that do not fill a micro-tile.
  const int64_t units = divide_up(total, kMicroRows), usual = divide_up(blocking.tiles, kMicroRows);
  // Few tiles: all of them are transformed first, and shared; then output channels are shared among threads.
  constexpr int64_t kBlocksPerThread = 2;
  const bool shared = units < kBlocksPerThread * threads * usual;
  // So few that much of the time goes into reading the weight: they are one block, although slices are narrower then.
  const bool wide = units > usual && units <= 2 * usual;
  const Tiling tiling(units, wide ? units : usual, shared ? 1 : threads);
  const int64_t block_tiles = divide_up(units, tiling.tiles) * kMicroRows;
  const int64_t input_tiles = shared ? units * kMicroRows : block_tiles;
  const int64_t most_panels = wide ? std::max<int64_t>(blocking.panels / 2, kMicroPanels) : blocking.panels;
  const int64_t panels = std::min(most_panels, op.group_panels());
  const int64_t group_slices = divide_up(op.group_panels(), panels), slices = op.groups * group_slices;
  const auto begin = [&](int64_t block) { return std::min(tiling.begin(block) * kMicroRows, total); };

  // Allocated here, because no exception may leave the parallel region.
  const int64_t input_size = Input::size(Block::chunks(op), input_tiles);
  const Scratch<acc_t> inputs((shared ? 1 : threads) * input_size);
  const bool once = weight != nullptr && !shared;  // the weight is transformed as a whole
  const Scratch<acc_t> transformed(once ? op.groups * op.group_panels() * Block::panel_size(op) : 0);
  std::vector<Block> blocks;
  for (int thread = 0; thread < threads; ++thread) {
    blocks.emplace_back(op, block_tiles, panels, weight != nullptr && shared);
  }
  if (once) {
    winograd_weight<kTile>(*weight, transformed.get());
    op.weight = transformed.get();
  }
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    Block& mine = blocks[thread];
    const Input input{inputs.get() + (shared ? 0 : thread * input_size), input_tiles};
    const auto slice_at = [&](int64_t i) {
      const int64_t panel = i % group_slices * panels;
      return typename Block::Slice{i / group_slices, panel, std::min(panels, op.group_panels() - panel)};
    };
    if (shared) {
#pragma omp for schedule(dynamic)
      for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t first = unit * kMicroRows, end = std::min(first + kMicroRows, total);
        mine.transform_input(first, end, input, first);
        Block::pad_input(op, input, end, first + kMicroRows);
      }
      // The weight of a slice is transformed once, so all blocks of the slice are done with it.
      const int64_t parts = weight == nullptr ? tiling.tiles : 1;
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < slices * parts; ++i) {
        const typename Block::Slice slice = slice_at(i / parts);
        const acc_t* u = weight == nullptr ? mine.weight_of(slice) : mine.transform_weight(*weight, slice);
        for (int64_t block = i % parts; block < tiling.tiles; block += parts) {
          mine.run(input, begin(block), u, begin(block), begin(block + 1), slice, store);
        }
      }
    } else {
#pragma omp for schedule(dynamic)
      for (int64_t block = 0; block < tiling.tiles; ++block) {
        const int64_t count = begin(block + 1) - begin(block);
        mine.transform_input(begin(block), begin(block + 1), input, 0);
        Block::pad_input(op, input, count, round_up(count, kRowStep));
        for (int64_t i = 0; i < slices; ++i) {
          const typename Block::Slice slice = slice_at(i);
          mine.run(input, 0, mine.weight_of(slice), begin(block), begin(block + 1), slice, store);
        }
      }
    }
  }
}

// Of a weight that is transformed.
template <bool kChannelsLast, int kTile, int64_t kDepth, typename scalar_t, typename Store>
inline void winograd_conv2d(const WinogradConv2d<scalar_t>& op, const WinogradBlocking& blocking, const Store& store) {
  const WinogradWeight<scalar_t>* none = nullptr;
  winograd_conv2d<kChannelsLast, kTile, kDepth>(op, none, blocking, store);
}

// Of a weight that is to be transformed in the call.
template <bool kChannelsLast, int kTile, int64_t kDepth, typename scalar_t, typename Store>
inline void winograd_conv2d(
    const WinogradConv2d<scalar_t>& op, const WinogradWeight<scalar_t>& weight, const WinogradBlocking& blocking,
    const Store& store) {
  winograd_conv2d<kChannelsLast, kTile, kDepth>(op, &weight, blocking, store);
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_WINOGRAD_CONV2D_H
