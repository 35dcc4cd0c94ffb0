// The gradients of the depthwise half of depthwise_separable_conv2d.h, from that of the hidden channels: symbols as
// there, and `sum` for what the activation is applied to.  The pointwise half are products of matrices, aten's.
//
//   grad_sum[k, p]      = grad_hidden[k, p] * activation'(sum[k, p])
//   grad_input[c, q]    = sum over m, and over taps and pixels p that look at q, of weight[k, tap] * grad_sum[k, p]
//   grad_weight[k, tap] = sum over p of grad_sum[k, p] * input[c, p at tap]
//   grad_bias[k]        = sum over p of grad_sum[k, p]
//   grad_slope          = sum over k and p of grad_hidden[k, p] * min(sum[k, p], 0), of prelu
//
// `sum` is not kept by the forward pass: computed again, vectorized over channels, it costs less than reading it.  What
// the weight of the pointwise convolution's gradient needs, activation(sum), is a result too.
//
// Some channels of a band of rows are done at a time.  Rows of grad_sum go into a ring that stays in cache, where what
// a row of grad_input is the sum of is found.  The first rows of a band need some of grad_sum from the band before it,
// which are computed twice.  An input of which neighbouring channels are not neighbours, or in low precision, is
// brought into a ring likewise.
//
// Pieces of work depend on the shape alone, but for slabs of channels, which share no sums, and sums are added up in
// order: the result is the same, to the bit, for any number of threads.
#ifndef INDUCTOR_VISION_DEPTHWISE_SEPARABLE_CONV2D_BACKWARD_H
#define INDUCTOR_VISION_DEPTHWISE_SEPARABLE_CONV2D_BACKWARD_H

#include <numeric>

#include "depthwise_separable_conv2d.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// Beside the operation itself, whose pointwise half is not looked at; channels are hidden ones in the order [M][C].
// Results are null where they are not wanted.
template <typename scalar_t>
struct SeparableGradients {
  using acc_t = accumulate_t<scalar_t>;
  const acc_t* grad_hidden;  // [B, Ho, Wo, hidden]; null: `hidden` alone is wanted
  bool channels_last;        // which memory format grad_input has
  scalar_t* input;           // [B, H, W, C] or [B, C, H, W]
  acc_t* weight;             // [taps][hidden]
  acc_t* bias;               // [hidden]
  acc_t* slope;              // one number
  acc_t* hidden;             // [B, Ho, Wo, hidden]
};

// Sizes that are chosen; see lowering/depthwise_separable_conv2d.py.
struct SeparableBackwardBlocking {
  int64_t bytes;  // of the rows that a thread has in cache
};

// How the work is cut: into chunks of images, bands of rows, of which those of the output and of grad_input are cut
// alike, and slabs of channels.
template <typename scalar_t>
struct SeparablePieces {
  using acc_t = accumulate_t<scalar_t>;

  bool in_place;                    // the input is read where it is
  int64_t rows_at_once;             // of the input, that are brought into the ring
  int64_t input_rows, output_rows;  // in the rings
  int64_t channels;                 // of a slab, at most
  int64_t chunks, bands, slabs;

  SeparablePieces(
      const DepthwiseSeparableConv2d<scalar_t>& op, const SeparableGradients<scalar_t>& gradients,
      const SeparableBackwardBlocking& blocking)
      : in_place(std::is_same_v<scalar_t, acc_t> && (op.input.channel == 1 || op.channels == 1)) {
    constexpr int64_t kLoaded =
        64;  // pixels that are brought into the ring at once, at least: lines of memory are whole
    const int64_t reach = (op.kernel_height - 1) * op.dilation_height;
    rows_at_once = divide_up(kLoaded, op.width);
    input_rows = round_up(std::min(op.height, reach + 1) + rows_at_once - 1, rows_at_once);
    const int64_t twice = std::min(op.out_height - 1, reach / op.stride_height);  // rows of a band that are done twice
    output_rows = gradients.input == nullptr ? 1 : twice + 1;
    constexpr int64_t kFewest = 16, kMost = 256;  // channels; the fewest are a cache line of floats
    const int64_t ring_pixels = (in_place ? 0 : input_rows * op.width) + output_rows * op.multiplier * op.out_width;
    const int64_t channel_bytes = ring_pixels * static_cast<int64_t>(sizeof(acc_t));
    channels = std::clamp(round_down(blocking.bytes / channel_bytes, kFewest), kFewest, kMost);
    constexpr int64_t kWanted = 32;  // pieces
    chunks = std::clamp<int64_t>(op.batch, 1, kWanted);
    // Bands first: lines of memory that a pixel's channels share are better read by one thread.
    constexpr int64_t kRows = 4;  // a band has at least so many times as many rows
    bands = std::clamp<int64_t>(op.out_height / (kRows * std::max<int64_t>(twice, 1)), 1, divide_up(kWanted, chunks));
    slabs = std::max(divide_up(op.channels, channels), kWanted / (chunks * bands));
    channels = round_up(divide_up(op.channels, slabs), kFewest);
    slabs = divide_up(op.channels, channels);
  }

  int64_t count() const {
    return chunks * bands * slabs;
  }
};

// One thread's buffers, and what it does with a piece of work.
template <typename Activation, typename scalar_t>
class SeparableGradientsTile {
 public:
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  static constexpr int64_t kLanes = Vec::size();
  static constexpr bool kHasSlope = std::is_same_v<Activation, Prelu>;
  static constexpr int64_t kSums = kHasSlope ? 2 : 1;  // of a hidden channel: for the bias, and for the slope

  SeparableGradientsTile(
      const DepthwiseSeparableConv2d<scalar_t>& op, const Activation& activation,
      const SeparableGradients<scalar_t>& gradients, const SeparablePieces<scalar_t>& pieces)
      : op_(op),
        gradients_(gradients),
        pieces_(pieces),
        taps_(op.kernel_height * op.kernel_width),
        rows_(op.rows()),
        gradient_rows_(op.rows().of_gradient()),
        distance_(pieces.channels),
        weight_distance_(op.multiplier * distance_),
        input_block_(pieces.rows_at_once * op.width * distance_ + kApart),
        output_row_(op.out_width * distance_ + kApart),
        stored_rows_(divide_up(kStoredPixels, op.width)),
        list_(op.columns(), 1, op.kernel_height, pieces.in_place ? op.input.column : distance_, weight_distance_),
        gradient_list_(op.columns().of_gradient(), 1, op.multiplier * op.kernel_height, distance_, weight_distance_),
        weight_(taps_ * weight_distance_),
        grad_weight_(taps_ * weight_distance_),
        sums_(kSums * weight_distance_),
        input_(pieces.in_place ? 0 : pieces.input_rows / pieces.rows_at_once * input_block_),
        grad_sum_(pieces.output_rows * op.multiplier * output_row_),
        grad_input_(gradients.input == nullptr ? 0 : stored_rows_ * op.width * distance_),
        converted_(
            gradients.input == nullptr || gradients.channels_last || std::is_same_v<scalar_t, acc_t>
                ? 0
                : stored_rows_ * op.width * kLanes),
        activation_(activation) {
  }

  // The sums of a piece go into `weight` and `sums`, [taps][hidden] and [kSums][hidden], beside those of other slabs.
  void run(int64_t piece, acc_t* weight, acc_t* sums) {
    const int64_t slab = piece % pieces_.slabs, band = piece / pieces_.slabs % pieces_.bands;
    const int64_t chunk = piece / (pieces_.slabs * pieces_.bands);
    channel_ = slab * pieces_.channels;
    channels_ = std::min(op_.channels - channel_, pieces_.channels);
    load_weight();
    for (image_ = op_.batch * chunk / pieces_.chunks; image_ < op_.batch * (chunk + 1) / pieces_.chunks; ++image_) {
      run_band(band);
    }
    store_sums(weight, sums);
  }

 private:
  static constexpr int64_t kApart = kCacheLine / static_cast<int64_t>(sizeof(acc_t));  // rows: not a power of two
  // Pixels that are summed, differentiated and added up before the next: what they need is in the first-level cache.
  static constexpr int64_t kBlock = 16;
  static constexpr int64_t kStoredPixels = 64;  // of whole rows of the gradient of the input, at least

  // How many rows of the gradient of the input need no row of the output from `y` on.
  int64_t complete(int64_t y) const {
    return std::clamp<int64_t>(y * op_.stride_height - op_.padding_height, 0, op_.height);
  }

  // The slab's weights, and no sums yet.
  void load_weight() {
    std::fill_n(grad_weight_.get(), taps_ * weight_distance_, acc_t(0));
    std::fill_n(sums_.get(), kSums * weight_distance_, acc_t(0));
    for (int64_t tap = 0; tap < taps_; ++tap) {
      for (int64_t m = 0; m < op_.multiplier; ++m) {
        const acc_t* from = op_.depthwise_weight + tap * op_.hidden() + m * op_.channels + channel_;
        std::copy_n(from, channels_, weight_.get() + tap * weight_distance_ + m * distance_);
      }
    }
  }

  void store_sums(acc_t* weight, acc_t* sums) const {
    for (int64_t m = 0; m < op_.multiplier; ++m) {
      const int64_t k = m * op_.channels + channel_;
      for (int64_t tap = 0; tap < taps_; ++tap) {
        std::copy_n(
            grad_weight_.get() + tap * weight_distance_ + m * distance_, channels_, weight + tap * op_.hidden() + k);
      }
      for (int64_t i = 0; i < kSums; ++i) {
        std::copy_n(sums_.get() + i * weight_distance_ + m * distance_, channels_, sums + i * op_.hidden() + k);
      }
    }
  }

  void run_band(int64_t band) {
    const int64_t begin = op_.out_height * band / pieces_.bands, end = op_.out_height * (band + 1) / pieces_.bands;
    // Rows of the gradient of the input, which are stored by the band that has the last row of the output they need.
    next_stored_ = band == 0 ? 0 : complete(begin);
    const int64_t stored_end = band + 1 == pieces_.bands ? op_.height : complete(end);
    pending_ = 0;
    const int64_t first = std::max<int64_t>(0, begin - (pieces_.output_rows - 1));
    next_row_ = 0;
    for (int64_t y = first; y < end; ++y) {
      load_rows(y);
      differentiate(y, y >= begin);
      if (gradients_.input != nullptr) {
        store_rows(y + 1 == end ? stored_end : std::min(stored_end, complete(y + 1)));
      }
    }
    if (gradients_.input != nullptr) {
      flush(stored_end);
    }
  }

  // Has the rows of the input that a row of the output looks at in the ring.
  void load_rows(int64_t y) {
    const int64_t begin = y * op_.stride_height - op_.padding_height;
    const int64_t end = std::min(op_.height, begin + (op_.kernel_height - 1) * op_.dilation_height + 1);
    if (pieces_.in_place || begin >= end) {
      return;
    }
    const int64_t at_once = pieces_.rows_at_once;
    for (next_row_ = std::max(next_row_, round_down(std::max<int64_t>(begin, 0), at_once)); next_row_ < end;
         next_row_ += at_once) {
      const int64_t count = std::min(at_once, op_.height - next_row_);
      const bool flat = op_.input.row == op_.width * op_.input.column;  // rows follow each other
      const int64_t rows = flat ? 1 : count, columns = flat ? count * op_.width : op_.width;
      for (int64_t row = 0; row < rows; ++row) {
        const scalar_t* from = op_.input.at(image_, next_row_ + row, 0) + channel_ * op_.input.channel;
        acc_t* to = ring_row(next_row_ + row);
        load_block(from, op_.input.column, op_.input.channel, to, distance_, columns, channels_);
      }
    }
  }

  // The channels of the first pixel of a row of the input.
  const acc_t* input_row(int64_t row) const {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (pieces_.in_place) {
        return op_.input.at(image_, row, 0) + channel_;
      }
    }
    return ring_row(row);
  }

  acc_t* ring_row(int64_t row) const {
    const int64_t slot = row % pieces_.input_rows, at_once = pieces_.rows_at_once;
    return input_.get() + slot / at_once * input_block_ + slot % at_once * op_.width * distance_;
  }

  acc_t* grad_sum(int64_t y, int64_t m) const {
    return grad_sum_.get() + (y % pieces_.output_rows * op_.multiplier + m) * output_row_;
  }

  // A row of grad_sum.  Where it belongs to the band its sums are added up, and `hidden` is stored.
  void differentiate(int64_t y, bool own) {
    list_.clear();
    list_.begin_row();
    rows_.for_taps(y, [&](const AxisTap& tap) {
      list_.add({input_row(tap.source), weight_.get() + tap.tap * op_.kernel_width * weight_distance_});
    });
    list_.end_row(0, op_.out_width, 0);
    for (int64_t m = 0; m < op_.multiplier; ++m) {
      const int64_t k = m * op_.channels + channel_;
      const acc_t* bias = op_.depthwise_bias == nullptr ? nullptr : op_.depthwise_bias + k;
      const int64_t row = (image_ * op_.out_height + y) * op_.out_width * op_.hidden() + k;
      acc_t* hidden = own && gradients_.hidden != nullptr ? gradients_.hidden + row : nullptr;
      const acc_t* grad = gradients_.grad_hidden == nullptr ? nullptr : gradients_.grad_hidden + row;
      for (const auto& span : list_.spans()) {
        for (int64_t n = 0; n < span.pixels; n += kBlock) {
          const int64_t end = std::min(n + kBlock, span.pixels);
          read_ahead(y, span.pixel + end, kBlock, grad, hidden);
          sum_block(span, n, end, m, bias, grad_sum(y, m));
          if constexpr (kHasSlope) {
            if (own && gradients_.slope != nullptr) {
              add_slope(span, n, end, m, grad, grad_sum(y, m));
            }
          }
          differentiate_block(span, n, end, grad, hidden, grad_sum(y, m));
          if (own && gradients_.weight != nullptr) {
            add_weight(span, n, end, m, grad_sum(y, m));
          }
          if (own && gradients_.bias != nullptr) {
            add_bias(span, n, end, m, grad_sum(y, m));
          }
        }
      }
    }
  }

  // Has the memory that `count` pixels from `pixel` on are the first to touch on its way.
  void read_ahead(int64_t y, int64_t pixel, int64_t count, const acc_t* grad, const acc_t* hidden) const {
    count = std::min(count, op_.out_width - pixel);
    if (pieces_.in_place) {  // rows that the row before did not need, but for those that the kernel skips
      const int64_t end =
          y * op_.stride_height - op_.padding_height + (op_.kernel_height - 1) * op_.dilation_height + 1;
      const int64_t column = pixel * op_.stride_width;
      const int64_t columns = std::min(count * op_.stride_width, op_.width - column);
      for (int64_t row = std::max<int64_t>(0, end - op_.stride_height); row < std::min(end, op_.height); ++row) {
        prefetch(input_row(row) + column * op_.input.column, op_.input.column, columns, channels_);
      }
    }
    if (grad != nullptr) {
      prefetch(grad + pixel * op_.hidden(), op_.hidden(), count, channels_);
    }
    if (hidden != nullptr) {
      prefetch<true>(hidden + pixel * op_.hidden(), op_.hidden(), count, channels_);
    }
  }

  // What the activation is applied to, of the pixels [first, end) of a span.
  void sum_block(
      const DepthwiseSpan& span, int64_t first, int64_t end, int64_t m, const acc_t* bias, acc_t* row) const {
    const auto begin = [&](int64_t k, const auto& load) { return bias == nullptr ? Vec(0) : load(bias + k); };
    const auto finish = [&](int64_t n, int64_t k, Vec sum, int64_t count) {
      store_vector(sum, row + (span.pixel + n) * distance_ + k, count);
    };
    depthwise_sums(list_, span, first, end, 0, m * distance_, channels_, begin, finish);
  }

  // Puts the gradients of the sums in their place.  Apart from them: what calls functions has no registers for sums.
  void differentiate_block(
      const DepthwiseSpan& span, int64_t first, int64_t end, const acc_t* grad, acc_t* hidden, acc_t* row) const {
    for (int64_t n = first; n < end; ++n) {
      acc_t* sums = row + (span.pixel + n) * distance_;
      const int64_t at = (span.pixel + n) * op_.hidden();
      for (int64_t k = 0; k < channels_; k += kLanes) {
        const int64_t count = std::min(kLanes, channels_ - k);
        const Vec of_hidden = grad == nullptr ? Vec(0) : load_vector(grad + at + k, count);
        const auto result = activation_.both(load_vector(sums + k, count), of_hidden);
        store_vector(result.gradient, sums + k, count);
        if (hidden != nullptr) {
          store_vector(result.value, hidden + at + k, count);
        }
      }
    }
  }

  void add_weight(const DepthwiseSpan& span, int64_t first, int64_t end, int64_t m, const acc_t* grad) const {
    for (int64_t k = 0; k < channels_; k += kLanes) {
      int64_t tap = 0;
      for (; tap + 9 <= span.taps; tap += 9) {
        add_taps<9>(span, first, end, tap, m, k, grad);
      }
      for (; tap + 3 <= span.taps; tap += 3) {
        add_taps<3>(span, first, end, tap, m, k, grad);
      }
      for (; tap < span.taps; ++tap) {
        add_taps<1>(span, first, end, tap, m, k, grad);
      }
    }
  }

  // The weights of some taps and a vector of channels; sums stay in registers.
  template <int kTaps>
  void add_taps(
      const DepthwiseSpan& span, int64_t first, int64_t end, int64_t tap, int64_t m, int64_t k,
      const acc_t* grad) const {
    const int64_t count = std::min(kLanes, channels_ - k);
    const bool part = count < kLanes;
    const auto load = [&](const acc_t* from) { return part ? load_vector(from, count) : load_vector(from); };
    const DepthwiseTap<acc_t>* taps = list_.taps(span) + tap;
    const auto weights = generate<kTaps>(
        [&](int t) { return grad_weight_.get() + (taps[t].weight - weight_.get()) + m * distance_ + k; });
    const auto sources = generate<kTaps>([&](int t) { return taps[t].source + k; });
    auto sum = generate<kTaps>([&](int) { return Vec(0); });  // in parts, which loses less than one long chain
    for (int64_t n = first; n < end; ++n) {
      const Vec value = load(grad + (span.pixel + n) * distance_ + k);
      ForcedUnroll<kTaps>{}(
          [&](auto t) { sum[t] = ::at::vec::fmadd(value, load(sources[t] + n * list_.distance()), sum[t]); });
    }
    ForcedUnroll<kTaps>{}([&](auto t) { store_vector(load(weights[t]) + sum[t], weights[t], count); });
  }

  void add_bias(const DepthwiseSpan& span, int64_t first, int64_t end, int64_t m, const acc_t* grad) const {
    for (int64_t k = 0; k < channels_; k += kLanes) {
      const int64_t count = std::min(kLanes, channels_ - k);
      acc_t* bias = sums_.get() + m * distance_ + k;
      Vec sum(0);
      for (int64_t n = first; n < end; ++n) {
        sum = sum + load_vector(grad + (span.pixel + n) * distance_ + k, count);
      }
      store_vector(load_vector(bias, count) + sum, bias, count);
    }
  }

  // From what the activation is applied to, `row`, before its gradient takes the place.
  void add_slope(
      const DepthwiseSpan& span, int64_t first, int64_t end, int64_t m, const acc_t* grad, const acc_t* row) const {
    for (int64_t k = 0; k < channels_; k += kLanes) {
      const int64_t count = std::min(kLanes, channels_ - k);
      acc_t* slope = sums_.get() + weight_distance_ + m * distance_ + k;
      Vec sum(0);
      for (int64_t n = first; n < end; ++n) {
        const Vec x = load_vector(row + (span.pixel + n) * distance_ + k, count);
        sum = sum + Activation::of_slope(x, load_vector(grad + (span.pixel + n) * op_.hidden() + k, count));
      }
      store_vector(load_vector(slope, count) + sum, slope, count);
    }
  }

  // Sums rows of the gradient of the input up to `end`, and stores them once they are long enough.
  void store_rows(int64_t end) {
    for (; next_stored_ < end; ++next_stored_) {
      gradient_list_.clear();
      gradient_list_.begin_row();
      for (int64_t m = 0; m < op_.multiplier; ++m) {
        gradient_rows_.for_taps(next_stored_, [&](const AxisTap& tap) {
          const acc_t* weight = weight_.get() + tap.tap * op_.kernel_width * weight_distance_ + m * distance_;
          gradient_list_.add({grad_sum(tap.source, m), weight});
        });
      }
      gradient_list_.end_row(0, op_.width, pending_ * op_.width);
      for (const auto& span : gradient_list_.spans()) {
        depthwise_sums(
            gradient_list_, span, 0, span.pixels, 0, 0, channels_, [](auto...) { return Vec(0); },
            [&](int64_t n, int64_t k, Vec sum, int64_t count) {
              store_vector(sum, grad_input_.get() + (span.pixel + n * span.step) * distance_ + k, count);
            });
      }
      if (++pending_ == stored_rows_) {
        flush(next_stored_ + 1);
      }
    }
  }

  // Stores the rows that are summed, of which `end` would be the next.
  void flush(int64_t end) {
    const int64_t pixels = pending_ * op_.width, size = op_.height * op_.width;
    const int64_t pixel = (end - pending_) * op_.width;
    scalar_t* image = gradients_.input + image_ * op_.channels * size;
    if (gradients_.channels_last) {
      scalar_t* to = image + pixel * op_.channels + channel_;
      store_block(grad_input_.get(), distance_, to, op_.channels, pixels, channels_);
    } else {
      // A few channels after the other: lines of many would share cache sets.
      for (int64_t c = 0; c < channels_; c += kLanes) {
        const int64_t count = std::min(kLanes, channels_ - c);
        scalar_t* to = image + (channel_ + c) * size + pixel;
        if constexpr (std::is_same_v<scalar_t, acc_t>) {
          transpose(grad_input_.get() + c, distance_, to, size, pixels, count);
        } else {
          transpose(grad_input_.get() + c, distance_, converted_.get(), pixels, pixels, count);
          store_block(converted_.get(), pixels, to, size, count, pixels);
        }
      }
    }
    pending_ = 0;
  }

  const DepthwiseSeparableConv2d<scalar_t>& op_;
  const SeparableGradients<scalar_t>& gradients_;
  const SeparablePieces<scalar_t>& pieces_;
  int64_t taps_;
  Axis rows_, gradient_rows_;
  int64_t distance_;         // elements between neighbouring pixels in the rings
  int64_t weight_distance_;  // between weights of neighbouring taps
  int64_t input_block_;      // between rows of the input that are brought into the ring at once, and the next
  int64_t output_row_;       // between rows of grad_sum
  int64_t stored_rows_;
  int64_t image_ = 0, channel_ = 0, channels_ = 0;
  int64_t next_row_ = 0;     // that is not in the ring yet
  int64_t next_stored_ = 0;  // of the gradient of the input, that is not summed yet
  int64_t pending_ = 0;      // rows before it that are not stored yet
  DepthwiseTapList<acc_t> list_, gradient_list_;
  Scratch<acc_t> weight_, grad_weight_;  // [taps][M][channels]
  Scratch<acc_t> sums_;                  // [kSums][M][channels]
  Scratch<acc_t> input_;                 // rows of [width][channels]
  Scratch<acc_t> grad_sum_;              // rows of [M][width][channels]
  Scratch<acc_t> grad_input_;
  Scratch<acc_t> converted_;
  Activation activation_;
};

template <typename Activation, typename scalar_t>
inline void depthwise_separable_conv2d_backward(
    const DepthwiseSeparableConv2d<scalar_t>& op, const Activation& activation,
    const SeparableGradients<scalar_t>& gradients, const SeparableBackwardBlocking& blocking) {
  using acc_t = accumulate_t<scalar_t>;
  using Tile = SeparableGradientsTile<Activation, scalar_t>;
  const SeparablePieces<scalar_t> pieces(op, gradients, blocking);
  const int64_t weights = op.kernel_height * op.kernel_width * op.hidden();
  // Of each chunk and band, the sums for all slabs.
  const Scratch<acc_t> weight(pieces.chunks * pieces.bands * weights);
  const int64_t parts = pieces.chunks * pieces.bands, sums_of_part = Tile::kSums * op.hidden();
  const Scratch<acc_t> sums(parts * sums_of_part);
  const int threads = omp_get_max_threads();
  // Allocated here, because no exception may leave the parallel region.
  std::vector<Tile> tiles;
  for (int thread = 0; thread < threads; ++thread) {
    tiles.emplace_back(op, activation, gradients, pieces);
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t piece = 0; piece < pieces.count(); ++piece) {
    const int64_t part = piece / pieces.slabs;
    tiles[omp_get_thread_num()].run(piece, weight.get() + part * weights, sums.get() + part * sums_of_part);
  }
  const auto add_parts = [&](const acc_t* from, int64_t distance, int64_t count, acc_t* total) {
    std::fill_n(total, count, acc_t(0));
    for (int64_t part = 0; part < parts; ++part) {
      add_to(total, from + part * distance, count);
    }
  };
  if (gradients.weight != nullptr) {
    add_parts(weight.get(), weights, weights, gradients.weight);
  }
  if (gradients.bias != nullptr) {
    add_parts(sums.get(), sums_of_part, op.hidden(), gradients.bias);
  }
  if constexpr (Tile::kHasSlope) {
    if (gradients.slope != nullptr) {
      double total = 0;  // of many numbers
      for (int64_t part = 0; part < parts; ++part) {
        const acc_t* of_part = sums.get() + part * sums_of_part + op.hidden();
        total = std::accumulate(of_part, of_part + op.hidden(), total);
      }
      *gradients.slope = static_cast<acc_t>(total);
    }
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_DEPTHWISE_SEPARABLE_CONV2D_BACKWARD_H
