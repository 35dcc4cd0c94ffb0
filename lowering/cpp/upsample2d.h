// Resizing images, with zeros below and at the right of what is resized.
//
//   H, W             height and width of the input
//   Ho, Wo           of what it is resized to
//   rows, columns    of the output: Ho and Wo, and zeros
//   line             the columns of a row of the input, resized
//   K                taps of a pixel along an axis: 2 (bilinear) or 4 (bicubic), see resampling.h
//
//   out[b, c, y, x] = sum of weight[j] * line[row[j]][x] for j < K          for y < Ho, x < Wo, otherwise 0
//   line[y][x] = sum of weight[k] * input[b, c, y, column[k]] for k < K
//
// Which rows a row reads, and what each counts, are found out once for it, those of a column once for a call.  A row
// of the input is brought into cache in the precision of the sums, whatever its layout and dtype, and is resized once:
// K lines are kept, which all rows of the output between them are made of.  A vector is consecutive numbers of a
// line, in the order of the output.  Where a pixel has enough channels for vectors of its own, it is summed from its
// K x K.
#ifndef INDUCTOR_VISION_UPSAMPLE2D_H
#define INDUCTOR_VISION_UPSAMPLE2D_H

#include "resampling.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

template <typename scalar_t>
struct Upsample2d {
  View4d<scalar_t> input;
  int64_t batch, channels, height, width;
  int64_t out_height, out_width;
  int64_t rows, columns;
  bool align_corners;  // see Resampling
  double scale_height, scale_width;

  Resampling row_axis() const {
    return {height, out_height, align_corners, scale_height};
  }
  Resampling column_axis() const {
    return {width, out_width, align_corners, scale_width};
  }
};

// Some channels, which are resized together, and what is the same for all rows: where in a row of the input, [channel]
// [W], the numbers of a line have their taps.  A line is [channel][columns], or [columns][channel] for channels_last,
// with zeros beyond Wo.
template <template <typename> class Taps, bool kChannelsLast, typename acc_t>
class LinePlan {
 public:
  using index_t = at::vec::int_same_size_t<acc_t>;
  static constexpr int kTaps = Taps<acc_t>::kCount;
  static constexpr int64_t kFewest = kChannelsLast ? 4 : 1;  // a part of a pixel's channels takes long to store

  template <typename scalar_t>
  LinePlan(const Upsample2d<scalar_t>& op, int64_t limit)
      : channels(std::min(op.channels, std::max(kFewest, limit / (op.width + (kTaps + 1) * op.columns)))),
        source(channels * op.width),
        line(channels * op.columns),
        parts_(kChannelsLast ? 1 : channels),
        count_(op.out_width * channels / parts_),
        padded_(round_up(count_, Vectorized<acc_t>::size())),
        part_source_(op.width),
        part_line_(op.columns),
        index_(kTaps * padded_),
        weight_(kTaps * padded_) {
    std::fill_n(index_.get(), kTaps * padded_, index_t(0));  // the last vector is a whole one
    std::fill_n(weight_.get(), kTaps * padded_, acc_t(0));
    const int64_t together = channels / parts_;  // neighbours of one column
    for (int64_t x = 0; x < op.out_width; ++x) {
      const Taps<acc_t> taps(op.column_axis(), x);
      for (int k = 0; k < kTaps; ++k) {
        for (int64_t c = 0; c < together; ++c) {
          index_[k * padded_ + x * together + c] = static_cast<index_t>(c * op.width + taps.index[k]);
          weight_[k * padded_ + x * together + c] = taps.weight[k];
        }
      }
    }
  }

  const int64_t channels, source, line;  // how many, and elements of a row of the input and of a line

  void resize(const acc_t* row, acc_t* resized) const {
    using Vec = Vectorized<acc_t>;
    constexpr int64_t kLanes = Vec::size();
    for (int64_t part = 0; part < parts_; ++part, row += part_source_, resized += part_line_) {
      for (int64_t i = 0; i < count_; i += kLanes) {
        const auto weights = generate<kTaps>([&](int k) { return Vec::loadu(weight_.get() + k * padded_ + i); });
        const Vec sum = weighted(weights, [&](int k) {
          const auto index = Vectorized<index_t>::loadu(index_.get() + k * padded_ + i);
          return at::vec::gather<sizeof(acc_t)>(row, index);
        });
        sum.store(resized + i, std::min(kLanes, count_ - i));
      }
    }
  }

 private:
  int64_t parts_, count_, padded_, part_source_, part_line_;
  Scratch<index_t> index_;
  Scratch<acc_t> weight_;
};

// One thread's lines.
template <template <typename> class Taps, bool kChannelsLast, typename scalar_t>
class Lines {
 public:
  using acc_t = accumulate_t<scalar_t>;
  using Plan = LinePlan<Taps, kChannelsLast, acc_t>;
  static constexpr int kTaps = Plan::kTaps;

  static int64_t scratch(const Plan& plan) {
    return plan.source + (kTaps + 1) * plan.line;
  }

  // `memory`: `scratch` zeros.
  Lines(const Upsample2d<scalar_t>& op, const Plan& plan, acc_t* memory)
      : op_(op),
        plan_(plan),
        lines_(memory),
        row_(memory + kTaps * plan.line),
        source_(row_ + plan.line) {
  }

  // Of `channels` channels from `channel` on: rows from `begin` to `end`.
  template <typename Store>
  void run(int64_t image, int64_t channel, int64_t channels, int64_t begin, int64_t end, const Store& store) {
    const int64_t distance = kChannelsLast ? plan_.channels : op_.columns;
    held_.fill(-1);
    const int64_t zeros = std::max(begin, std::min(end, op_.out_height));  // where they begin
    for (int64_t y = begin; y < zeros; ++y) {
      blend(image, channel, channels, Taps<acc_t>(op_.row_axis(), y));
      store(OutputBlock{image, channel, channels, y, 1, 0, op_.columns}, row_, distance);
    }
    if (zeros < end) {
      std::fill_n(row_, plan_.line, acc_t(0));
    }
    for (int64_t y = zeros; y < end; ++y) {
      store(OutputBlock{image, channel, channels, y, 1, 0, op_.columns}, row_, distance);
    }
  }

 private:
  // A row of the input, resized.  As many rows as there are taps, which are neighbours, are all held.
  const acc_t* line(int64_t image, int64_t channel, int64_t channels, int64_t y) {
    acc_t* line = lines_ + y % kTaps * plan_.line;
    if (held_[y % kTaps] != y) {
      held_[y % kTaps] = y;
      const View4d<scalar_t>& in = op_.input;
      const scalar_t* from = in.at(image, y, 0) + channel * in.channel;
      load_block(from, in.channel, in.column, source_, op_.width, channels, op_.width);
      plan_.resize(source_, line);
    }
    return line;
  }

  void blend(int64_t image, int64_t channel, int64_t channels, const Taps<acc_t>& taps) {
    using Vec = Vectorized<acc_t>;
    constexpr int64_t kLanes = Vec::size();
    const auto lines = generate<kTaps>([&](int j) { return line(image, channel, channels, taps.index[j]); });
    const auto weights = broadcast_weights(taps);
    for (int64_t i = 0; i < plan_.line; i += kLanes) {
      const int64_t n = std::min(kLanes, plan_.line - i);
      weighted(weights, [&](int j) { return Vec::loadu(lines[j] + i, n); }).store(row_ + i, n);
    }
  }

  const Upsample2d<scalar_t>& op_;
  const Plan& plan_;
  acc_t* lines_;
  std::array<int64_t, kTaps> held_;
  acc_t* row_;
  acc_t* source_;
};

template <template <typename> class Taps, bool kChannelsLast, typename scalar_t, typename Store>
inline void upsample_lines(const Upsample2d<scalar_t>& op, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t kCached = 65536 / static_cast<int64_t>(sizeof(acc_t));  // elements, of all that a thread works on
  constexpr int64_t kBand = 32;  // rows that a thread does at a time: it resizes a few lines of its neighbour's
  const LinePlan<Taps, kChannelsLast, acc_t> plan(op, kCached);
  const int threads = omp_get_max_threads();
  const int64_t groups = divide_up(op.channels, plan.channels);
  const Tiling bands(op.rows, kBand, threads);
  const int64_t mine = round_up(Lines<Taps, kChannelsLast, scalar_t>::scratch(plan), kCacheLine);
  const Scratch<acc_t> scratch(threads * mine);
#pragma omp parallel num_threads(threads)
  {
    acc_t* memory = scratch.get() + omp_get_thread_num() * mine;
    std::fill_n(memory, mine, acc_t(0));
    Lines<Taps, kChannelsLast, scalar_t> lines(op, plan, memory);
#pragma omp for
    for (int64_t unit = 0; unit < op.batch * groups * bands.tiles; ++unit) {
      const int64_t band = unit % bands.tiles, image = unit / bands.tiles / groups;
      const int64_t channel = unit / bands.tiles % groups * plan.channels;
      const int64_t channels = std::min(plan.channels, op.channels - channel);
      lines.run(image, channel, channels, bands.begin(band), bands.begin(band + 1), store);
    }
  }
}

// A channels_last input, to a channels_last output.
template <template <typename> class Taps, typename scalar_t, typename Store>
inline void upsample_pixels(const Upsample2d<scalar_t>& op, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  constexpr int kTaps = Taps<acc_t>::kCount;
  constexpr int64_t kLanes = Vec::size();
  constexpr int64_t kCached = 16384 / static_cast<int64_t>(sizeof(acc_t));  // elements
  const int64_t channels = op.channels;
  const int64_t pixels = std::max<int64_t>(1, std::min(op.columns, kCached / channels));
  const int threads = omp_get_max_threads();
  const int64_t mine = round_up(pixels * channels, kCacheLine);
  const Scratch<acc_t> scratch(threads * mine);
  const Scratch<Taps<acc_t>> column_taps(op.out_width);
  for (int64_t x = 0; x < op.out_width; ++x) {
    column_taps[x] = Taps<acc_t>(op.column_axis(), x);
  }
#pragma omp parallel num_threads(threads)
  {
    acc_t* sums = scratch.get() + omp_get_thread_num() * mine;
#pragma omp for
    for (int64_t row = 0; row < op.batch * op.rows; ++row) {
      const int64_t image = row / op.rows, y = row % op.rows;
      const Taps<acc_t> rows(op.row_axis(), std::min(y, op.out_height - 1));
      const auto down = broadcast_weights(rows);
      for (int64_t begin = 0; begin < op.columns; begin += pixels) {
        const int64_t end = std::min(begin + pixels, op.columns);
        acc_t* out = sums;
        for (int64_t x = begin; x < end; ++x, out += channels) {
          if (y >= op.out_height || x >= op.out_width) {
            std::fill_n(out, channels, acc_t(0));
            continue;
          }
          const Taps<acc_t>& columns = column_taps[x];
          const auto right = broadcast_weights(columns);
          std::array<const scalar_t*, kTaps * kTaps> from;
          for (int j = 0; j < kTaps; ++j) {
            for (int k = 0; k < kTaps; ++k) {
              from[j * kTaps + k] = op.input.at(image, rows.index[j], columns.index[k]);
            }
          }
          for (int64_t c = 0; c < channels; c += kLanes) {
            const int64_t count = std::min(kLanes, channels - c);
            const auto line = [&](int j) {
              return weighted(right, [&](int k) { return load_vector(from[j * kTaps + k] + c, count); });
            };
            weighted(down, line).store(out + c, count);
          }
        }
        store(OutputBlock{image, 0, channels, y, 1, begin, end - begin}, sums, channels);
      }
    }
  }
}

// `store`: for an output of that memory format, see OutputBlock.  The bits do not depend on it, nor on the input's.
template <template <typename> class Taps, bool kChannelsLast, typename scalar_t, typename Store>
inline void upsample2d(const Upsample2d<scalar_t>& op, const Store& store) {
  if (kChannelsLast && op.input.channel == 1 && op.channels >= Vectorized<accumulate_t<scalar_t>>::size()) {
    upsample_pixels<Taps>(op, store);
  } else {
    upsample_lines<Taps, kChannelsLast>(op, store);
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_UPSAMPLE2D_H
