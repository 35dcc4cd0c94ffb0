// A depthwise convolution, an activation and a pointwise convolution, in one pass: what is between stays in cache.
// Before them there may be another pointwise convolution and activation, an expansion: together an inverted residual.
//
//   B, C, H, W     batch, channels, height, width of the input         M          filters of each input channel
//   O, Ho, Wo      channels, height, width of the output               hidden     the C * M channels between the two
//
//   hidden[k, p] = activation(depthwise_bias[k] + sum over taps of depthwise_weight[k, tap] * input[c, p at tap])
//   out[o, p]    = pointwise_bias[o] + sum over k of pointwise_weight[o, k] * hidden[k, p]
//
//   input          with an expansion: activation(bias[c] + sum over the image's channels of weight[c, i] * image[i])
//
// Hidden channels are in the order [M][C], so that those that are neighbours read neighbouring channels of the input.
//
// A tile of pixels is done at a time: some rows of the output, or a part of one.  For a block of hidden channels they
// are computed, vectorized over channels, into a buffer that stays in cache, which is multiplied at once by that part
// of the packed pointwise weight into the tile's sums.  Taps in the padding are left out.  An input that is not
// channels_last is transposed row by row, as the tiles of a thread come to need them, into a ring of rows.  The rows
// that an expansion makes go into the same ring.
//
// Each sum is one chain in an order that depends on the shape alone: the result is the same, to the bit, for any number
// of threads.
#ifndef INDUCTOR_VISION_DEPTHWISE_SEPARABLE_CONV2D_H
#define INDUCTOR_VISION_DEPTHWISE_SEPARABLE_CONV2D_H

#include <vector>

#include "activations.h"
#include "axis.h"
#include "base.h"
#include "depthwise.h"
#include "gemm.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

template <typename scalar_t>
struct DepthwiseSeparableConv2d {
  using acc_t = accumulate_t<scalar_t>;
  View4d<scalar_t> input;          // forward, its channels or its columns are neighbours
  const acc_t* depthwise_weight;   // [taps][hidden]
  const acc_t* depthwise_bias;     // [hidden]; null: none
  const acc_t* pointwise_weight;   // [panels][hidden][kPanel]
  const scalar_t* pointwise_bias;  // [O]; null: none
  int64_t batch, channels, height, width;
  int64_t multiplier;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_height, padding_width;
  int64_t dilation_height, dilation_width;

  int64_t hidden() const {
    return channels * multiplier;
  }
  Axis rows() const {
    return {out_height, height, kernel_height, stride_height, padding_height, dilation_height, false};
  }
  Axis columns() const {
    return {out_width, width, kernel_width, stride_width, padding_width, dilation_width, false};
  }
};

// The depthwise convolution reads the image itself.
struct NoExpansion {};

// Before the depthwise convolution there is a pointwise one, of an image that lies as `input` says.
template <typename acc_t, typename Activation>
struct Expansion {
  const acc_t* weight;  // [panels][channels][kPanel]
  const acc_t* bias;    // [panels][kPanel]
  int64_t channels;     // of the image
  Activation activation;
};

// Sizes that are chosen; see lowering/depthwise_separable_conv2d.py.
struct SeparableBlocking {
  int64_t pixels;  // in a tile, at most, unless a row of the output has fewer than kMicroRows
};

// One thread's buffers, and what it does with a tile.
template <bool kChannelsLast, typename Expansion, typename Activation, typename scalar_t>
class SeparableTile {
 public:
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  static constexpr int64_t kLanes = Vec::size();
  static constexpr bool kExpands = !std::is_same_v<Expansion, NoExpansion>;
  using source_t = std::conditional_t<kExpands, acc_t, scalar_t>;  // what the depthwise convolution reads

  SeparableTile(
      const DepthwiseSeparableConv2d<scalar_t>& op, const Expansion& expansion, const Activation& activation,
      int64_t rows, int64_t columns)
      : op_(op),
        expansion_(expansion),
        in_ring_(kExpands || (op.channels > 1 && op.input.channel != 1)),
        activation_(activation),
        // A cache line more than the channels need: pixels a power of two apart would share cache sets.
        distance_(in_ring_ ? round_up(op.channels, kExpands ? kPanel<acc_t> : 1) + kLine : op.input.column),
        slots_((rows - 1) * op.stride_height + (op.kernel_height - 1) * op.dilation_height + 1),
        sum_distance_(round_up(op.out_channels, kPanel<acc_t>)),
        rows_(op.rows()),
        list_(op.columns(), rows, op.kernel_height, distance_, op.hidden()),
        ring_(in_ring_ ? slots_ * op.width * distance_ : 0),
        image_rows_(copied_channels() * slots_ * op.width),
        hidden_(round_up(rows * columns, kMicroRows) * kRowDistance),
        bias_(sum_distance_),
        sums_(round_up(rows * columns, kMicroRows) * sum_distance_),
        by_channel_(kChannelsLast ? 0 : rows * columns * op.out_channels) {
    std::fill_n(bias_.get(), sum_distance_, acc_t(0));
    for (int64_t o = 0; op.pointwise_bias != nullptr && o < op.out_channels; ++o) {
      bias_[o] = static_cast<acc_t>(op.pointwise_bias[o]);
    }
  }

  // Other rows come next than those that follow: what is in the ring is of no use.
  void begin(int64_t image, int64_t row) {
    image_ = image;
    next_row_ = std::max<int64_t>(0, row * op_.stride_height - op_.padding_height);
  }

  // The columns [x, x_end) of the rows [y, y_end); several rows only if they are whole.
  template <typename Store>
  void run(int64_t y, int64_t y_end, int64_t x, int64_t x_end, const Store& store) {
    const int64_t width = x_end - x, pixels = (y_end - y) * width, rows = round_up(pixels, kRowStep);
    load_rows((y_end - 1) * op_.stride_height - op_.padding_height + (op_.kernel_height - 1) * op_.dilation_height + 1);
    list_taps(y, y_end, x, x_end);
    const OutputBlock block{image_, 0, op_.out_channels, y, y_end - y, x, width};
    acc_t* sums = sums_.get();
    constexpr bool kAsTheyAre = std::is_same_v<Store, DenseStore<kChannelsLast, acc_t>>;  // of the sums
    bool in_place = false;
    if constexpr (kChannelsLast && kAsTheyAre) {
      in_place = pixels == rows && sum_distance_ == op_.out_channels;
      sums = in_place ? store.at(block) : sums;
    }
    for (int64_t m = 0; m < op_.multiplier; ++m) {
      for (int64_t c = 0; c < op_.channels; c += kMaxDepth) {
        const int64_t depth = std::min(kMaxDepth, op_.channels - c), k = m * op_.channels + c;
        depthwise(c, depth, k);
        for (int64_t p = pixels; p < rows; ++p) {  // multiplied with the others, and ignored
          std::fill_n(hidden_.get() + p * kRowDistance, depth, acc_t(0));
        }
        const Rows<acc_t> a{hidden_.get(), 1, depth, 0};
        const Panels<acc_t> b{op_.pointwise_weight + k * kPanel<acc_t>, op_.hidden() * kPanel<acc_t>};
        const Sums<acc_t> result(sums, sum_distance_, k == 0 ? bias_.get() : sums, k == 0 ? 0 : sum_distance_);
        gemm(a, b, sum_distance_ / kPanel<acc_t>, result, rows);
      }
    }
    if constexpr (kChannelsLast) {
      if (!in_place) {
        store(block, sums, sum_distance_);
      }
    } else if constexpr (kAsTheyAre) {
      // A few channels after the other: lines of many would share cache sets.
      for (int64_t o = 0; o < op_.out_channels; o += kLanes) {
        acc_t* out = store.at(block) + o * store.distance();
        transpose(sums + o, sum_distance_, out, store.distance(), pixels, std::min(kLanes, op_.out_channels - o));
      }
    } else {
      transpose(sums, sum_distance_, by_channel_.get(), pixels, pixels, op_.out_channels);
      store(block, by_channel_.get(), pixels);
    }
  }

 private:
  static constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(source_t));

  // How many of the image's channels are copied to be multiplied, all or none: those of a dense channels_last image in
  // the precision of the sums are read where they are.
  int64_t copied_channels() const {
    if constexpr (!kExpands) {
      return 0;
    } else {
      const bool dense = op_.input.channel == 1 && op_.input.row == op_.width * op_.input.column;
      return dense && std::is_same_v<scalar_t, acc_t> ? 0 : expansion_.channels;
    }
  }

  // Has the rows up to `end` in the ring; those that are needed after it are the next.
  void load_rows(int64_t end) {
    end = std::min(end, op_.height);
    next_row_ = std::max(next_row_, end - slots_);
    while (in_ring_ && next_row_ < end) {
      const int64_t slot = next_row_ % slots_, rows = std::min(end - next_row_, slots_ - slot);
      source_t* to = ring_.get() + slot * op_.width * distance_;
      if constexpr (kExpands) {
        expand(next_row_, rows, to);
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          const scalar_t* from = op_.input.at(image_, next_row_ + i, 0);
          transpose(from, op_.input.channel, to + i * op_.width * distance_, distance_, op_.channels, op_.width);
        }
      }
      next_row_ += rows;
    }
  }

  void expand(int64_t row, int64_t rows, acc_t* to) {
    StridedRows<acc_t> a{nullptr, op_.input.column, 1, expansion_.channels, 0};
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      a.data = op_.input.at(image_, row, 0);
    }
    if (const int64_t channels = copied_channels(); channels > 0) {
      for (int64_t i = 0; i < rows; ++i) {
        acc_t* copy = image_rows_.get() + i * op_.width * channels;
        const scalar_t* from = op_.input.at(image_, row + i, 0);
        load_block(from, op_.input.column, op_.input.channel, copy, channels, op_.width, channels);
      }
      a.data = image_rows_.get();
      a.row = channels;
    }
    const Panels<acc_t> b{expansion_.weight, expansion_.channels * kPanel<acc_t>};
    const Sums result(to, distance_, expansion_.bias, 0, expansion_.activation);
    multiply_pixels(a, b, divide_up(op_.channels, kPanel<acc_t>), result, rows * op_.width);
  }

  void list_taps(int64_t y, int64_t y_end, int64_t x, int64_t x_end) {
    list_.clear();
    for (int64_t row = y; row < y_end; ++row) {
      list_.begin_row();
      rows_.for_taps(row, [&](const AxisTap& tap) {
        const source_t* from = ring_.get() + tap.source % slots_ * op_.width * distance_;
        if constexpr (!kExpands) {
          from = in_ring_ ? from : op_.input.at(image_, tap.source, 0);
        }
        list_.add({from, op_.depthwise_weight + tap.tap * op_.kernel_width * op_.hidden()});
      });
      list_.end_row(x, x_end, (row - y) * (x_end - x));
    }
  }

  // hidden_[pixel][k] of the listed pixels, for the channels [c, c + depth), which hidden channels from k on read.
  void depthwise(int64_t c, int64_t depth, int64_t k) {
    const auto begin = [&](int64_t i, const auto& load) {
      return op_.depthwise_bias == nullptr ? Vec(0) : load(op_.depthwise_bias + k + i);
    };
    for (const auto& span : list_.spans()) {
      acc_t* hidden = hidden_.get() + span.pixel * kRowDistance;
      depthwise_sums(
          list_, span, 0, span.pixels, c, k, depth, begin, [&](int64_t n, int64_t i, Vec sum, int64_t count) {
            store_vector(activation_.apply(sum), hidden + n * kRowDistance + i, count);
          });
    }
  }

  const DepthwiseSeparableConv2d<scalar_t>& op_;
  const Expansion& expansion_;
  bool in_ring_;
  Activation activation_;
  int64_t distance_;      // elements between neighbouring pixels of a row
  int64_t slots_;         // rows in the ring
  int64_t sum_distance_;  // between the sums of two pixels: whole panels
  Axis rows_;
  DepthwiseTapList<source_t> list_;
  int64_t image_ = 0;
  int64_t next_row_ = 0;  // that is not in the ring yet
  Scratch<source_t> ring_;
  Scratch<acc_t> image_rows_;  // copied
  Scratch<acc_t> hidden_;
  Scratch<acc_t> bias_;
  Scratch<acc_t> sums_;
  Scratch<acc_t> by_channel_;
};

// kChannelsLast: of the output that `store` is for, see OutputBlock.
template <bool kChannelsLast, typename Expansion, typename Activation, typename scalar_t, typename Store>
inline void depthwise_separable_conv2d(
    const DepthwiseSeparableConv2d<scalar_t>& op, const Expansion& expansion, const Activation& activation,
    const SeparableBlocking& blocking, const Store& store) {
  if (op.batch * op.out_channels * op.out_height * op.out_width == 0) {
    return;
  }
  const int threads = omp_get_max_threads();
  // A tile is some whole rows, or one of even parts of a row.
  const int64_t limit = std::max<int64_t>(blocking.pixels, kMicroRows);
  const int64_t rows = std::clamp<int64_t>(limit / op.out_width, 1, op.out_height);
  int64_t columns = divide_up(op.out_width, divide_up(op.out_width, limit));
  columns = std::min(op.out_width, round_up(columns, kMicroRows));

  // Allocated here, because no exception may leave the parallel region.
  std::vector<SeparableTile<kChannelsLast, Expansion, Activation, scalar_t>> tiles;
  tiles.reserve(threads);
  for (int thread = 0; thread < threads; ++thread) {
    tiles.emplace_back(op, expansion, activation, rows, columns);
  }
  // Each thread takes rows that follow each other, always the same ones: it has mostly written what it reads, in the
  // layer before.  Where it begins, rows are transposed, or expanded, that another thread has in its ring, too.
  const int64_t all_rows = op.batch * op.out_height;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; ++part) {
    auto& tile = tiles[omp_get_thread_num()];
    const int64_t end = all_rows * (part + 1) / threads;
    for (int64_t row = all_rows * part / threads, count = 0; row < end; row += count) {  // of one image after the other
      const int64_t image = row / op.out_height, first = row % op.out_height;
      count = std::min(end - row, op.out_height - first);
      tile.begin(image, first);
      const int64_t steps = divide_up(count, rows);
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t y = first + count * step / steps, y_end = first + count * (step + 1) / steps;
        for (int64_t x = 0; x < op.out_width; x += columns) {
          tile.run(y, y_end, x, std::min(x + columns, op.out_width), store);
        }
      }
    }
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_DEPTHWISE_SEPARABLE_CONV2D_H
