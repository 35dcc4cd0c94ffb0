// A convolution, dense or depthwise, that reads its input where it is: no transform, no column buffer.
//
//   B, C, H, W     batch, channels, height, width of the input
//   O, Ho, Wo      channels, height, width of the output
//   tile           some whole rows of the output, or a part of one
//   slice          some of its channels
//
//   dense:     out[o, p] = bias[o] + sum over taps and c of weight[o, c, tap] * input[c, p at tap]
//   depthwise: out[c, p] = bias[c] + sum over taps of weight[c, tap] * input[c, p at tap]
//
// Channels are the vector.  A dense convolution is a matrix product whose rows are pixels: of a channels_last input the
// numbers that a row of the kernel looks at follow each other, and the next pixel's are a stride further.  A depthwise
// one is a sum for each tap that is not in the padding.
//
// The input is read in place if it is channels_last, in the precision of the sums, and a dense convolution has no
// padding.  Otherwise what a tile reads is copied into a buffer first, in which all of this is so.
//
// Work is cut into tiles of pixels and, where these are few, into slices of channels.  Each sum is one chain in an
// order that depends on nothing but the kernel's size and C: the result has the same bits for any number of threads.
#ifndef INDUCTOR_VISION_DIRECT_CONV2D_H
#define INDUCTOR_VISION_DIRECT_CONV2D_H

#include <vector>

#include "axis.h"
#include "base.h"
#include "depthwise.h"
#include "gemm.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

template <typename scalar_t>
struct DirectConv2d {
  using acc_t = accumulate_t<scalar_t>;
  View4d<scalar_t> input;  // its channels or its columns are neighbours
  const acc_t* weight;     // dense: [panels][taps][C][kPanel]; depthwise: [taps][C]
  const scalar_t* bias;    // [O]; null: none
  int64_t batch, channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_height, padding_width;
  int64_t dilation_height, dilation_width;

  int64_t taps() const {
    return kernel_height * kernel_width;
  }
  Axis rows() const {
    return {out_height, height, kernel_height, stride_height, padding_height, dilation_height, false};
  }
  Axis columns() const {
    return {out_width, width, kernel_width, stride_width, padding_width, dilation_width, false};
  }
};

// Sizes that are chosen; see lowering/direct_conv2d.py.
struct DirectBlocking {
  int64_t pixels;    // in a tile, at most, unless a row of the output has more
  int64_t channels;  // in a slice, at most; whole panels
  int64_t parallel;  // multiplications and numbers read from which on threads share the work
};

// How pixels and channels of the output are cut into pieces of work.
//
// A thread takes pieces that follow each other, always the same ones: what it reads it has mostly written itself, by
// the convolution before, and it is in its own second-level cache.
struct DirectPieces {
  int64_t rows, columns;            // of a tile, at most
  int64_t row_tiles, column_tiles;  // of an image
  int64_t slice, slices;            // channels of one, how many
  int64_t out_height;

  template <typename scalar_t>
  DirectPieces(const DirectConv2d<scalar_t>& op, const DirectBlocking& blocking, int64_t threads)
      : out_height(op.out_height) {
    constexpr int64_t kLine = kPanel<accumulate_t<scalar_t>>;
    columns = divide_up(op.out_width, divide_up(op.out_width, std::max<int64_t>(1, blocking.pixels)));
    if (columns < op.out_width) {
      columns = std::min(op.out_width, round_up(columns, kPixelRows));
    }
    column_tiles = divide_up(op.out_width, columns);
    const int64_t most = column_tiles > 1 ? 1 : std::clamp<int64_t>(blocking.pixels / op.out_width, 1, op.out_height);
    row_tiles = divide_up(op.out_height, most);
    if (op.batch * row_tiles % threads != 0 && op.batch * row_tiles >= threads) {  // as many for each thread
      row_tiles = std::min(op.out_height, round_up(row_tiles, threads));
    }
    rows = divide_up(op.out_height, row_tiles);
    // Each slice reads the tile once more, so that there are no more than threads need.
    const int64_t lines = divide_up(op.out_channels, kLine);
    const int64_t wanted = std::min(lines, divide_up(threads, op.batch * tiles()));
    slice = round_up(divide_up(lines, wanted), lines >= 2 * wanted ? kPixelPanels : 1) * kLine;
    slices = divide_up(op.out_channels, slice);
  }
  // Of an image.
  int64_t tiles() const {
    return row_tiles * column_tiles;
  }
  // The first row of the i-th tile of one column of them.
  int64_t row(int64_t i) const {
    return out_height * i / row_tiles;
  }
};

// One thread's buffers, and what it does with a piece of work.
template <bool kChannelsLast, bool kDepthwise, typename scalar_t>
class DirectTile {
 public:
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  static constexpr int64_t kLanes = Vec::size(), kLine = kPanel<acc_t>;

  // `bias`: of whole panels of output channels.
  DirectTile(
      const DirectConv2d<scalar_t>& op, const acc_t* bias, const DirectBlocking& blocking, const DirectPieces& pieces)
      : op_(op),
        bias_(bias),
        pieces_(pieces),
        channels_(std::min(round_up(op.out_channels, kLine), blocking.channels)),
        in_place_(reads_in_place(op)),
        copied_rows_((pieces.rows - 1) * op.stride_height + (op.kernel_height - 1) * op.dilation_height + 1),
        copied_columns_((pieces.columns - 1) * op.stride_width + (op.kernel_width - 1) * op.dilation_width + 1),
        rows_(op.rows()),
        list_(
            op.columns(), kDepthwise ? pieces.rows : 0, op.kernel_height, in_place_ ? op.input.column : op.channels,
            op.channels),
        copy_(in_place_ ? 0 : copied_rows_ * copied_columns_ * op.channels),
        sums_(pieces.rows * pieces.columns * channels_),
        by_channel_(kChannelsLast ? 0 : pieces.rows * pieces.columns * channels_) {
  }

  static bool reads_in_place(const DirectConv2d<scalar_t>& op) {
    const bool padded = op.padding_height != 0 || op.padding_width != 0;
    const bool dense_rows = op.kernel_width == 1 || op.input.column == op.channels;
    return std::is_same_v<scalar_t, acc_t> && (op.input.channel == 1 || op.channels == 1) &&
           (kDepthwise || (!padded && dense_rows));
  }

  // A slice of a tile; both are counted from 0.
  template <typename Store>
  void run(int64_t image, int64_t tile, int64_t slice, const Store& store) {
    const int64_t i = tile / pieces_.column_tiles, x = tile % pieces_.column_tiles * pieces_.columns;
    const int64_t y = pieces_.row(i), rows = pieces_.row(i + 1) - y;
    const int64_t columns = std::min(pieces_.columns, op_.out_width - x), pixels = rows * columns;
    const int64_t number = image * pieces_.tiles() + tile;
    if (number != prepared_) {
      prepared_ = number;
      prepare(image, y, rows, x, columns);
    }
    const int64_t end = std::min(op_.out_channels, (slice + 1) * pieces_.slice);
    for (int64_t o = slice * pieces_.slice; o < end; o += channels_) {
      const int64_t count = std::min(channels_, end - o);
      const OutputBlock block{image, o, count, y, rows, x, columns};
      constexpr bool kAsTheyAre = std::is_same_v<Store, DenseStore<kChannelsLast, acc_t>>;  // of the sums
      if constexpr (kChannelsLast && kAsTheyAre) {
        if (kDepthwise || count % kLine == 0) {
          compute(o, count, rows, columns, store.at(block), op_.out_channels);
          continue;
        }
      }
      compute(o, count, rows, columns, sums_.get(), channels_);
      if constexpr (kChannelsLast) {
        store(block, sums_.get(), channels_);
      } else {
        transpose(sums_.get(), channels_, by_channel_.get(), pixels, pixels, count);
        store(block, by_channel_.get(), pixels);
      }
    }
  }

 private:
  // Finds what a tile reads.
  void prepare(int64_t image, int64_t y, int64_t rows, int64_t x, int64_t columns) {
    const int64_t top = y * op_.stride_height - op_.padding_height, left = x * op_.stride_width - op_.padding_width;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      source_ = op_.input.at(image, 0, 0);
      row_ = op_.input.row;
      column_ = op_.input.column;
    }
    if (!in_place_) {
      copy(
          image, top, (rows - 1) * op_.stride_height + (op_.kernel_height - 1) * op_.dilation_height + 1, left,
          (columns - 1) * op_.stride_width + (op_.kernel_width - 1) * op_.dilation_width + 1);
      row_ = copied_columns_ * op_.channels;
      column_ = op_.channels;
    }
    if constexpr (kDepthwise) {
      list_.clear();
      for (int64_t row = y; row < y + rows; ++row) {
        list_.begin_row();
        rows_.for_taps(row, [&](const AxisTap& tap) {
          const acc_t* from =
              in_place_ ? source_ + tap.source * row_ : copy_.get() + (tap.source - top) * row_ - left * column_;
          list_.add({from, op_.weight + tap.tap * op_.kernel_width * op_.channels});
        });
        list_.end_row(x, x + columns, (row - y) * columns);
      }
    } else {
      source_ = in_place_ ? source_ + top * row_ + left * column_ : copy_.get();
    }
  }

  // Rows and columns of the input from (top, left) on as channels_last; zeros outside of it.
  void copy(int64_t image, int64_t top, int64_t rows, int64_t left, int64_t columns) {
    const int64_t begin = std::clamp<int64_t>(-left, 0, columns);
    const int64_t end = std::clamp<int64_t>(op_.width - left, begin, columns);
    for (int64_t i = 0; i < rows; ++i) {
      acc_t* to = copy_.get() + i * copied_columns_ * op_.channels;
      const bool inside = top + i >= 0 && top + i < op_.height && begin < end;
      const int64_t first = inside ? begin : columns, last = inside ? end : columns;
      std::fill_n(to, first * op_.channels, acc_t(0));
      if (inside) {
        const View4d<scalar_t>& in = op_.input;
        const scalar_t* from = in.at(image, top + i, left + first);
        acc_t* inner = to + first * op_.channels;
        if (op_.channels < kLanes / 2) {  // an image: too few to be transposed in vectors
          for (int64_t c = 0; c < op_.channels; ++c) {
            for (int64_t j = 0; j < last - first; ++j) {
              inner[j * op_.channels + c] = static_cast<acc_t>(from[j * in.column + c * in.channel]);
            }
          }
        } else {
          load_block(from, in.column, in.channel, inner, op_.channels, last - first, op_.channels);
        }
      }
      std::fill_n(to + last * op_.channels, (columns - last) * op_.channels, acc_t(0));
    }
  }

  // The channels [o, o + count) of the tile that was prepared.
  void compute(int64_t o, int64_t count, int64_t rows, int64_t columns, acc_t* out, int64_t distance) {
    if constexpr (kDepthwise) {
      const auto begin = [&](int64_t k, const auto& load) { return load(bias_ + o + k); };
      for (const DepthwiseSpan& span : list_.spans()) {
        acc_t* pixel = out + span.pixel * distance;
        depthwise_sums(
            list_, span, 0, span.pixels, o, o, count, begin,
            [&](int64_t n, int64_t k, Vec sum, int64_t lanes) { store_vector(sum, pixel + n * distance + k, lanes); });
      }
    } else {
      const int64_t depth = op_.taps() * op_.channels, panels = divide_up(count, kLine);
      const Panels<acc_t> b{op_.weight + o * depth, depth * kLine};
      const StridedRows<acc_t> a{
          source_, op_.stride_width * column_, op_.kernel_height, op_.kernel_width * op_.channels,
          op_.dilation_height * row_};
      const int64_t next = op_.stride_height * row_;  // row of the tile
      if (next == columns * a.row) {
        multiply_pixels(a, b, panels, Sums<acc_t>(out, distance, bias_ + o, 0), rows * columns);
        return;
      }
      for (int64_t i = 0; i < rows; ++i) {
        auto row = a;
        row.data += i * next;
        multiply_pixels(row, b, panels, Sums<acc_t>(out + i * columns * distance, distance, bias_ + o, 0), columns);
      }
    }
  }

  const DirectConv2d<scalar_t>& op_;
  const acc_t* bias_;
  const DirectPieces& pieces_;
  int64_t channels_;  // whose sums are in the buffer at once
  bool in_place_;
  int64_t copied_rows_, copied_columns_;
  Axis rows_;
  DepthwiseTapList<acc_t> list_;
  int64_t prepared_ = -1;
  const acc_t* source_ = nullptr;  // dense: what the first pixel of the tile looks at; depthwise: the image
  int64_t row_ = 0, column_ = 0;   // elements between neighbouring rows and columns of what is read
  Scratch<acc_t> copy_;
  Scratch<acc_t> sums_;
  Scratch<acc_t> by_channel_;
};

// kChannelsLast: of the output that `store` is for, see OutputBlock.
template <bool kChannelsLast, bool kDepthwise, typename scalar_t, typename Store>
inline void direct_conv2d(const DirectConv2d<scalar_t>& op, const DirectBlocking& blocking, const Store& store) {
  const int64_t pixels = op.batch * op.out_height * op.out_width;
  if (pixels * op.out_channels == 0) {
    return;
  }
  const int64_t terms = op.taps() * (kDepthwise ? 1 : op.channels);
  const int64_t work = (pixels + 16) * op.out_channels * terms;  // a number of the weight is read from far away
  const int threads = work < blocking.parallel ? 1 : omp_get_max_threads();
  const DirectPieces pieces(op, blocking, threads);
  // Allocated here, because no exception may leave the parallel region.
  using acc_t = accumulate_t<scalar_t>;
  const Scratch<acc_t> bias(round_up(op.out_channels, kPanel<acc_t>));
  std::fill_n(bias.get(), round_up(op.out_channels, kPanel<acc_t>), acc_t(0));
  if (op.bias != nullptr) {
    load_block(op.bias, 0, 1, bias.get(), 0, 1, op.out_channels);
  }
  std::vector<DirectTile<kChannelsLast, kDepthwise, scalar_t>> tiles;
  tiles.reserve(threads);
  for (int thread = 0; thread < threads; ++thread) {
    tiles.emplace_back(op, bias.get(), blocking, pieces);
  }
  const int64_t count = op.batch * pieces.tiles() * pieces.slices;
  const auto run = [&](int64_t piece, int thread) {
    const int64_t tile = piece / pieces.slices;
    tiles[thread].run(tile / pieces.tiles(), tile % pieces.tiles(), piece % pieces.slices, store);
  };
  if (threads == 1) {
    for (int64_t piece = 0; piece < count; ++piece) {
      run(piece, 0);
    }
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t piece = 0; piece < count; ++piece) {
    run(piece, omp_get_thread_num());
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_DIRECT_CONV2D_H
