// The gradients of the depthwise half of depthwise_separable_conv2d.h, from that of the hidden channels: symbols as
// there, and `sum` for what the activation is applied to.  The pointwise half are products of matrices, aten's.
//
//   grad_sum[k, p]      = grad_hidden[k, p] * activation'(sum[k, p])
//   grad_input[c, q]    = sum over m, and over taps and pixels p that look at q, of weight[k, tap] * grad_sum[k, p]
//   grad_weight[k, tap] = sum over p of grad_sum[k, p] * input[c, p at tap]
//   grad_bias[k]        = sum over p of grad_sum[k, p]
//
// `sum` is not kept by the forward pass: computed again, vectorized over channels, it costs less than reading it.  What
// the weight of the pointwise convolution's gradient needs, activation(sum), is a result too.
//
// Some channels of a band of rows are done at a time.  Their input is brought into cache, row by row, in one layout and
// precision, into a ring; so are rows of grad_sum, and what a row of grad_input is the sum of is then there.  The first
// rows of a band need some of grad_sum from the band before it, which are computed twice.
//
// Bands depend on the shape alone, and their sums are added up in order: the result is the same, to the bit, for any
// number of threads.
#ifndef INDUCTOR_VISION_DEPTHWISE_SEPARABLE_CONV2D_BACKWARD_H
#define INDUCTOR_VISION_DEPTHWISE_SEPARABLE_CONV2D_BACKWARD_H

#include "depthwise_separable_conv2d.h"

namespace inductor_vision {

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
  acc_t* hidden;             // [B, Ho, Wo, hidden]
};

// Sizes that are chosen; see lowering/depthwise_separable_conv2d.py.
struct SeparableBackwardBlocking {
  int64_t bytes;  // of the rows that a thread has in cache
};

// What is done at a time: some channels of some rows of an image, of which grad_input's and the output's are cut alike.
template <typename scalar_t>
struct SeparableBands {
  using acc_t = accumulate_t<scalar_t>;

  int64_t input_rows, output_rows;  // in the rings
  int64_t channels;                 // that are done together, at most
  int64_t slabs, bands;

  SeparableBands(
      const DepthwiseSeparableConv2d<scalar_t>& op, const SeparableGradients<scalar_t>& gradients,
      const SeparableBackwardBlocking& blocking) {
    constexpr int64_t kFewest = 16, kMost = 256;  // channels: a cache line of floats
    constexpr int64_t kPieces = 32;               // of work
    const int64_t reach = (op.kernel_height - 1) * op.dilation_height;
    input_rows = std::min(op.height, reach + 1);
    output_rows = gradients.input == nullptr ? 1 : std::min(op.out_height, reach / op.stride_height + 1);
    const int64_t channel_bytes =
        (input_rows * op.width + output_rows * op.multiplier * op.out_width) * static_cast<int64_t>(sizeof(acc_t));
    channels = std::clamp(round_down(blocking.bytes / channel_bytes, kFewest), kFewest, kMost);
    // Fewer channels at a time, down to a number that is as fast, give more pieces; rows that are done twice cost.
    constexpr int64_t kAsFast = 64;
    const int64_t wanted = divide_up(kPieces, std::max<int64_t>(op.batch, 1));  // of an image
    channels = std::min(channels, std::max(kAsFast, divide_up(op.channels, wanted)));
    channels = round_up(divide_up(op.channels, divide_up(op.channels, channels)), kFewest);  // evenly
    slabs = divide_up(op.channels, channels);
    constexpr int64_t kRows = 4;  // a band has so many times as many rows as are done twice
    const int64_t most = op.out_height / (kRows * std::max<int64_t>(output_rows - 1, 1));
    bands = std::clamp<int64_t>(divide_up(wanted, slabs), 1, std::max<int64_t>(most, 1));
  }
};

// One thread's buffers, and what it does with a piece of work.
template <typename Activation, typename scalar_t>
class SeparableGradientsTile {
 public:
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  static constexpr int64_t kLanes = Vec::size();

  SeparableGradientsTile(
      const DepthwiseSeparableConv2d<scalar_t>& op, const SeparableGradients<scalar_t>& gradients,
      const SeparableBands<scalar_t>& bands)
      : op_(op),
        gradients_(gradients),
        bands_(bands),
        taps_(op.kernel_height * op.kernel_width),
        rows_(op.rows()),
        gradient_rows_(op.rows().of_gradient()),
        distance_(bands.channels),
        weight_distance_(op.multiplier * distance_),
        input_row_(op.width * distance_ + kApart),
        output_row_(op.out_width * distance_ + kApart),
        stored_rows_(divide_up(kStoredPixels, op.width)),
        list_(op.columns(), 1, op.kernel_height, distance_, weight_distance_),
        gradient_list_(op.columns().of_gradient(), 1, op.multiplier * op.kernel_height, distance_, weight_distance_),
        weight_(taps_ * weight_distance_),
        grad_weight_(taps_ * weight_distance_),
        grad_bias_(weight_distance_),
        input_(bands.input_rows * input_row_),
        grad_sum_(bands.output_rows * op.multiplier * output_row_),
        grad_input_(gradients.input == nullptr ? 0 : stored_rows_ * op.width * distance_),
        converted_(gradients.input == nullptr || gradients.channels_last ? 0 : stored_rows_ * op.width * kLanes) {
  }

  // Channels of the input that a piece has.
  std::pair<int64_t, int64_t> channels_of(int64_t piece) const {
    const int64_t first = piece % bands_.slabs * bands_.channels;
    return {first, std::min(op_.channels, first + bands_.channels)};
  }

  void run(int64_t piece) {
    const int64_t band = piece / bands_.slabs % bands_.bands;
    image_ = piece / (bands_.slabs * bands_.bands);
    channel_ = channels_of(piece).first;
    channels_ = channels_of(piece).second - channel_;
    const int64_t begin = op_.out_height * band / bands_.bands, end = op_.out_height * (band + 1) / bands_.bands;
    load_weight();
    // Rows of the gradient of the input, which are stored by the band that has the last row of the output they need.
    next_stored_ = band == 0 ? 0 : complete(begin);
    const int64_t stored_end = band + 1 == bands_.bands ? op_.height : complete(end);
    pending_ = 0;
    const int64_t first = std::max<int64_t>(0, begin - (bands_.output_rows - 1));
    next_row_ = std::max<int64_t>(0, first * op_.stride_height - op_.padding_height);
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

  // Adds the piece's sums to [taps][hidden] and [hidden].
  void add_sums(acc_t* weight, acc_t* bias) const {
    for (int64_t m = 0; m < op_.multiplier; ++m) {
      const int64_t k = m * op_.channels + channel_;
      for (int64_t tap = 0; weight != nullptr && tap < taps_; ++tap) {
        add_to(weight + tap * op_.hidden() + k, grad_weight_.get() + tap * weight_distance_ + m * distance_, channels_);
      }
      if (bias != nullptr) {
        add_to(bias + k, grad_bias_.get() + m * distance_, channels_);
      }
    }
  }

 private:
  static constexpr int64_t kApart = kCacheLine / static_cast<int64_t>(sizeof(acc_t));  // rows: not a power of two
  // Pixels that are summed, differentiated and added up before the next: what they need is in the first-level cache.
  static constexpr int64_t kPixels = 16;
  static constexpr int64_t kStoredPixels = 64;  // of whole rows of the gradient of the input, at least

  // How many rows of the gradient of the input need no row of the output from `y` on.
  int64_t complete(int64_t y) const {
    return std::clamp<int64_t>(y * op_.stride_height - op_.padding_height, 0, op_.height);
  }

  void load_weight() {
    std::fill_n(grad_weight_.get(), taps_ * weight_distance_, acc_t(0));
    std::fill_n(grad_bias_.get(), weight_distance_, acc_t(0));
    for (int64_t tap = 0; tap < taps_; ++tap) {
      for (int64_t m = 0; m < op_.multiplier; ++m) {
        const acc_t* from = op_.depthwise_weight + tap * op_.hidden() + m * op_.channels + channel_;
        std::copy_n(from, channels_, weight_.get() + tap * weight_distance_ + m * distance_);
      }
    }
  }

  // Has the rows of the input that a row of the output looks at in the ring.
  void load_rows(int64_t y) {
    const int64_t begin = y * op_.stride_height - op_.padding_height;
    const int64_t end = std::min(op_.height, begin + (op_.kernel_height - 1) * op_.dilation_height + 1);
    for (next_row_ = std::max(next_row_, begin); next_row_ < end; ++next_row_) {
      const scalar_t* from = op_.input.at(image_, next_row_, 0) + channel_ * op_.input.channel;
      load_block(
          from, op_.input.column, op_.input.channel, input_.get() + next_row_ % bands_.input_rows * input_row_,
          distance_, op_.width, channels_);
    }
  }

  acc_t* grad_sum(int64_t y, int64_t m) const {
    return grad_sum_.get() + (y % bands_.output_rows * op_.multiplier + m) * output_row_;
  }

  // A row of grad_sum.  Where it belongs to the band its sums are added up, and `hidden` is stored.
  void differentiate(int64_t y, bool own) {
    list_.clear();
    list_.begin_row();
    rows_.for_taps(y, [&](const AxisTap& tap) {
      const acc_t* from = input_.get() + tap.source % bands_.input_rows * input_row_;
      list_.add({from, weight_.get() + tap.tap * op_.kernel_width * weight_distance_});
    });
    list_.end_row(0, op_.out_width, 0);
    for (int64_t m = 0; m < op_.multiplier; ++m) {
      const int64_t k = m * op_.channels + channel_;
      const acc_t* bias = op_.depthwise_bias == nullptr ? nullptr : op_.depthwise_bias + k;
      const int64_t row = (image_ * op_.out_height + y) * op_.out_width * op_.hidden() + k;
      acc_t* hidden = own && gradients_.hidden != nullptr ? gradients_.hidden + row : nullptr;
      const acc_t* grad = gradients_.grad_hidden == nullptr ? nullptr : gradients_.grad_hidden + row;
      for (const auto& span : list_.spans()) {
        for (int64_t n = 0; n < span.pixels; n += kPixels) {
          const int64_t end = std::min(n + kPixels, span.pixels);
          differentiate(span, n, end, m, bias, grad, hidden, grad_sum(y, m));
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

  // The pixels [first, end) of a span.
  void differentiate(
      const TapSpan<acc_t>& span, int64_t first, int64_t end, int64_t m, const acc_t* bias, const acc_t* grad,
      acc_t* hidden, acc_t* grad_sum) const {
    const auto begin = [&](int64_t k, const auto& load) { return bias == nullptr ? Vec(0) : load(bias + k); };
    const auto finish = [&](int64_t n, int64_t k, Vec sum, int64_t count) {
      const int64_t pixel = span.pixel + n, at = pixel * op_.hidden() + k;
      const auto result = Activation::both(sum, grad == nullptr ? Vec(0) : load_vector(grad + at, count));
      store_vector(result.gradient, grad_sum + pixel * distance_ + k, count);
      if (hidden != nullptr) {
        store_vector(result.value, hidden + at, count);
      }
    };
    depthwise_sums(list_, span, first, end, 0, m * distance_, channels_, begin, finish);
  }

  void add_weight(const TapSpan<acc_t>& span, int64_t first, int64_t end, int64_t m, const acc_t* grad) const {
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
      const TapSpan<acc_t>& span, int64_t first, int64_t end, int64_t tap, int64_t m, int64_t k,
      const acc_t* grad) const {
    const int64_t count = std::min(kLanes, channels_ - k);
    const bool part = count < kLanes;
    const auto load = [&](const acc_t* from) { return part ? load_vector(from, count) : load_vector(from); };
    const Tap<acc_t>* taps = list_.taps(span) + tap;
    const auto weights = generate<kTaps>(
        [&](int t) { return grad_weight_.get() + (taps[t].weight - weight_.get()) + m * distance_ + k; });
    const auto sources = generate<kTaps>([&](int t) { return taps[t].source + k; });
    auto sum = generate<kTaps>([&](int t) { return load(weights[t]); });
    for (int64_t n = first; n < end; ++n) {
      const Vec value = load(grad + (span.pixel + n) * distance_ + k);
      ForcedUnroll<kTaps>{}(
          [&](auto t) { sum[t] = ::at::vec::fmadd(value, load(sources[t] + n * list_.distance()), sum[t]); });
    }
    ForcedUnroll<kTaps>{}([&](auto t) { store_vector(sum[t], weights[t], count); });
  }

  void add_bias(const TapSpan<acc_t>& span, int64_t first, int64_t end, int64_t m, const acc_t* grad) const {
    for (int64_t k = 0; k < channels_; k += kLanes) {
      const int64_t count = std::min(kLanes, channels_ - k);
      acc_t* bias = grad_bias_.get() + m * distance_ + k;
      Vec sum = load_vector(bias, count);
      for (int64_t n = first; n < end; ++n) {
        sum = sum + load_vector(grad + (span.pixel + n) * distance_ + k, count);
      }
      store_vector(sum, bias, count);
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
  const SeparableBands<scalar_t>& bands_;
  int64_t taps_;
  Axis rows_, gradient_rows_;
  int64_t distance_;         // elements between neighbouring pixels in the rings
  int64_t weight_distance_;  // between weights of neighbouring taps
  int64_t input_row_, output_row_;
  int64_t stored_rows_;
  int64_t image_ = 0, channel_ = 0, channels_ = 0;
  int64_t next_row_ = 0;     // that is not in the ring yet
  int64_t next_stored_ = 0;  // of the gradient of the input, that is not summed yet
  int64_t pending_ = 0;      // rows before it that are not stored yet
  TapList<acc_t> list_, gradient_list_;
  Scratch<acc_t> weight_, grad_weight_;  // [taps][M][channels]
  Scratch<acc_t> grad_bias_;             // [M][channels]
  Scratch<acc_t> input_;                 // rows of [width][channels]
  Scratch<acc_t> grad_sum_;              // rows of [M][width][channels]
  Scratch<acc_t> grad_input_;
  Scratch<acc_t> converted_;
};

template <typename Activation, typename scalar_t>
inline void depthwise_separable_conv2d_backward(
    const DepthwiseSeparableConv2d<scalar_t>& op, const SeparableGradients<scalar_t>& gradients,
    const SeparableBackwardBlocking& blocking) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t sums = op.hidden() * op.kernel_height * op.kernel_width;
  if (gradients.weight != nullptr) {
    std::fill_n(gradients.weight, sums, acc_t(0));
  }
  if (gradients.bias != nullptr) {
    std::fill_n(gradients.bias, op.hidden(), acc_t(0));
  }
  const SeparableBands<scalar_t> bands(op, gradients, blocking);
  const int threads = omp_get_max_threads();
  // Allocated here, because no exception may leave the parallel region.
  std::vector<SeparableGradientsTile<Activation, scalar_t>> tiles;
  for (int thread = 0; thread < threads; ++thread) {
    tiles.emplace_back(op, gradients, bands);
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic) ordered
  for (int64_t piece = 0; piece < op.batch * bands.bands * bands.slabs; ++piece) {
    auto& tile = tiles[omp_get_thread_num()];
    tile.run(piece);
#pragma omp ordered
    tile.add_sums(gradients.weight, gradients.bias);
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_DEPTHWISE_SEPARABLE_CONV2D_BACKWARD_H
