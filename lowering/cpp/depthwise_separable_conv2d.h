// A depthwise convolution, an activation and a pointwise convolution, in one pass: what is between stays in cache.
//
//   B, C, H, W     batch, channels, height, width of the input         M          filters of each input channel
//   O, Ho, Wo      channels, height, width of the output               hidden     the C * M channels between the two
//
//   hidden[k, p] = activation(depthwise_bias[k] + sum over taps of depthwise_weight[k, tap] * input[c, p at tap])
//   out[o, p]    = pointwise_bias[o] + sum over k of pointwise_weight[o, k] * hidden[k, p]
//
// Hidden channels are in the order [M][C], so that those that are neighbours read neighbouring channels of the input.
//
// A tile of pixels is done at a time: some rows of the output, or a part of one.  For a block of hidden channels they
// are computed, vectorized over channels, into a buffer that stays in cache, which is multiplied at once by that part
// of the packed pointwise weight into the tile's sums.  Taps in the padding are left out.  An input that is not
// channels_last is transposed row by row, as the tiles of a thread come to need them, into a ring of rows.
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

// Sizes that are chosen; see lowering/depthwise_separable_conv2d.py.
struct SeparableBlocking {
  int64_t pixels;  // in a tile, at most, unless a row of the output has fewer than kMicroRows
};

// One thread's buffers, and what it does with a tile.
template <bool kChannelsLast, typename Activation, typename scalar_t>
class SeparableTile {
 public:
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  static constexpr int64_t kLanes = Vec::size();

  SeparableTile(
      const DepthwiseSeparableConv2d<scalar_t>& op, const Activation& activation, int64_t rows, int64_t columns)
      : op_(op),
        transposed_(op.channels > 1 && op.input.channel != 1),
        activation_(activation),
        // A cache line more than the channels need: pixels a power of two apart would share cache sets.
        distance_(transposed_ ? op.channels + kCacheLine / static_cast<int64_t>(sizeof(scalar_t)) : op.input.column),
        slots_((rows - 1) * op.stride_height + (op.kernel_height - 1) * op.dilation_height + 1),
        sum_distance_(round_up(op.out_channels, kPanel<acc_t>)),
        rows_(op.rows()),
        list_(op.columns(), rows, op.kernel_height, distance_, op.hidden()),
        ring_(transposed_ ? slots_ * op.width * distance_ : 0),
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
  // Has the rows up to `end` in the ring; those that are needed after it are the next.
  void load_rows(int64_t end) {
    end = std::min(end, op_.height);
    for (; transposed_ && next_row_ < end; ++next_row_) {
      if (next_row_ + slots_ >= end) {
        scalar_t* to = ring_.get() + next_row_ % slots_ * op_.width * distance_;
        transpose(op_.input.at(image_, next_row_, 0), op_.input.channel, to, distance_, op_.channels, op_.width);
      }
    }
  }

  void list_taps(int64_t y, int64_t y_end, int64_t x, int64_t x_end) {
    list_.clear();
    for (int64_t row = y; row < y_end; ++row) {
      list_.begin_row();
      rows_.for_taps(row, [&](const AxisTap& tap) {
        const scalar_t* from = transposed_ ? ring_.get() + tap.source % slots_ * op_.width * distance_
                                           : op_.input.at(image_, tap.source, 0);
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
  bool transposed_;
  Activation activation_;
  int64_t distance_;      // elements between neighbouring pixels of a row
  int64_t slots_;         // rows in the ring
  int64_t sum_distance_;  // between the sums of two pixels: whole panels
  Axis rows_;
  DepthwiseTapList<scalar_t> list_;
  int64_t image_ = 0;
  int64_t next_row_ = 0;  // that is not in the ring yet
  Scratch<scalar_t> ring_;
  Scratch<acc_t> hidden_;
  Scratch<acc_t> bias_;
  Scratch<acc_t> sums_;
  Scratch<acc_t> by_channel_;
};

// kChannelsLast: of the output that `store` is for, see OutputBlock.
template <bool kChannelsLast, typename Activation, typename scalar_t, typename Store>
inline void depthwise_separable_conv2d(
    const DepthwiseSeparableConv2d<scalar_t>& op, const Activation& activation, const SeparableBlocking& blocking,
    const Store& store) {
  if (op.batch * op.out_channels * op.out_height * op.out_width == 0) {
    return;
  }
  const int threads = omp_get_max_threads();
  // A tile is some whole rows, or one of even parts of a row.
  const int64_t limit = std::max<int64_t>(blocking.pixels, kMicroRows);
  const int64_t fewest =
      std::min(op.out_height, divide_up(threads, op.batch));  // of an image, to keep all threads busy
  const int64_t rows =
      divide_up(op.out_height, std::max(fewest, divide_up(op.out_height, std::max<int64_t>(1, limit / op.out_width))));
  int64_t columns = divide_up(op.out_width, divide_up(op.out_width, limit));
  columns = std::min(op.out_width, round_up(columns, kMicroRows));
  // A band of tiles is what a thread takes at a time.  Where one begins, rows of the input are transposed once more.
  // The bands of a thread follow each other and are always the same: it has mostly written what it reads, in the layer
  // before.
  constexpr int64_t kBandsPerThread = 4;
  const int64_t steps = divide_up(op.out_height, rows);
  const int64_t bands = std::clamp<int64_t>(divide_up(kBandsPerThread * threads, op.batch), 1, steps);

  // Allocated here, because no exception may leave the parallel region.
  std::vector<SeparableTile<kChannelsLast, Activation, scalar_t>> tiles;
  for (int thread = 0; thread < threads; ++thread) {
    tiles.emplace_back(op, activation, rows, columns);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t band = 0; band < op.batch * bands; ++band) {
    auto& tile = tiles[omp_get_thread_num()];
    const int64_t image = band / bands, first = steps * (band % bands) / bands * rows;
    const int64_t end = std::min(op.out_height, steps * (band % bands + 1) / bands * rows);
    tile.begin(image, first);
    for (int64_t y = first; y < end; y += rows) {
      for (int64_t x = 0; x < op.out_width; x += columns) {
        tile.run(y, std::min(y + rows, end), x, std::min(x + columns, op.out_width), store);
      }
    }
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_DEPTHWISE_SEPARABLE_CONV2D_H
