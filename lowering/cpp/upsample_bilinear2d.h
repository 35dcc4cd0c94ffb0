// Bilinear resizing, with zeros below and at the right of what is resized.
//
//   H, W             height and width of the input
//   Ho, Wo           of what it is resized to
//   rows, columns    of the output: Ho and Wo, and zeros
//   place            a row or a column of what it is resized to
//   line             the columns of a row of the input, resized
//
//   out[b, c, y, x] = (1 - f) * line[y0][x] + f * line[y1][x]        for y < Ho, x < Wo, otherwise 0
//   line[y][x] = (1 - g) * input[b, c, y, x0] + g * input[b, c, y, x1]
//
// Which two rows a row reads, and the fraction f, are found out once for it, those of a column once for a call.  A row
// of the input is brought into cache in the precision of the sums, whatever its layout and dtype, and is resized once:
// two lines are kept, which all rows of the output between them are made of.  A vector is consecutive numbers of a
// line, in the order of the output.  Where a pixel has enough channels for vectors of its own, it is summed from its
// four.
#ifndef INDUCTOR_VISION_UPSAMPLE_BILINEAR2D_H
#define INDUCTOR_VISION_UPSAMPLE_BILINEAR2D_H

#include "resampling.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

template <typename scalar_t>
struct UpsampleBilinear2d {
  View4d<scalar_t> input;
  int64_t batch, channels, height, width;
  int64_t out_height, out_width;
  int64_t rows, columns;
  bool align_corners;  // the centres of the first and of the last pixels coincide, otherwise the outer borders
  double scale_height, scale_width;  // if positive, they count, and not the sizes
};

template <typename scalar_t>
inline LinearTaps<accumulate_t<scalar_t>> row_taps(const UpsampleBilinear2d<scalar_t>& op, int64_t y) {
  return {y, op.height, op.out_height, op.align_corners, op.scale_height};
}

template <typename scalar_t>
inline LinearTaps<accumulate_t<scalar_t>> column_taps(const UpsampleBilinear2d<scalar_t>& op, int64_t x) {
  return {x, op.width, op.out_width, op.align_corners, op.scale_width};
}

// Some channels, which are resized together, and what is the same for all rows: where in a row of the input, [channel]
// [W], the numbers of a line are between.  A line is [channel][columns], or [columns][channel] for channels_last, with
// zeros beyond Wo.
template <bool kChannelsLast, typename acc_t>
class LinePlan {
 public:
  using index_t = at::vec::int_same_size_t<acc_t>;

  template <typename scalar_t>
  LinePlan(const UpsampleBilinear2d<scalar_t>& op, int64_t limit)
      : channels(std::max<int64_t>(1, std::min(op.channels, limit / (op.width + 3 * op.columns)))),
        source(channels * op.width),
        line(channels * op.columns),
        parts_(kChannelsLast ? 1 : channels),
        count_(op.out_width * channels / parts_),
        part_source_(op.width),
        part_line_(op.columns),
        first_(padded()),
        second_(padded()),
        fraction_(padded()) {
    std::fill_n(first_.get(), padded(), index_t(0));  // the last vector is a whole one
    std::fill_n(second_.get(), padded(), index_t(0));
    std::fill_n(fraction_.get(), padded(), acc_t(0));
    const int64_t together = channels / parts_;  // neighbours of one column
    for (int64_t x = 0; x < op.out_width; ++x) {
      const LinearTaps<acc_t> taps = column_taps(op, x);
      for (int64_t c = 0; c < together; ++c) {
        first_[x * together + c] = static_cast<index_t>(c * op.width + taps.first);
        second_[x * together + c] = static_cast<index_t>(c * op.width + taps.second);
        fraction_[x * together + c] = taps.fraction;
      }
    }
  }

  const int64_t channels, source, line;  // how many, and elements of a row of the input and of a line

  void resize(const acc_t* row, acc_t* resized) const {
    using Vec = Vectorized<acc_t>;
    constexpr int64_t kLanes = Vec::size();
    for (int64_t part = 0; part < parts_; ++part, row += part_source_, resized += part_line_) {
      for (int64_t i = 0; i < count_; i += kLanes) {
        const int64_t n = std::min(kLanes, count_ - i);
        const auto pixels = [&](const Scratch<index_t>& index) {
          return at::vec::gather<sizeof(acc_t)>(row, Vectorized<index_t>::loadu(index.get() + i));
        };
        const Vec fraction = Vec::loadu(fraction_.get() + i);
        between(pixels(first_), pixels(second_), fraction).store(resized + i, n);
      }
    }
  }

 private:
  int64_t padded() const {
    return round_up(count_, Vectorized<acc_t>::size());
  }

  int64_t parts_, count_, part_source_, part_line_;
  Scratch<index_t> first_, second_;
  Scratch<acc_t> fraction_;
};

// One thread's lines.
template <bool kChannelsLast, typename scalar_t>
class Lines {
 public:
  using acc_t = accumulate_t<scalar_t>;

  static int64_t scratch(const LinePlan<kChannelsLast, acc_t>& plan) {
    return plan.source + 3 * plan.line;
  }

  // `memory`: `scratch` zeros.
  Lines(const UpsampleBilinear2d<scalar_t>& op, const LinePlan<kChannelsLast, acc_t>& plan, acc_t* memory)
      : op_(op),
        plan_(plan),
        lines_{memory, memory + plan.line},
        row_(memory + 2 * plan.line),
        source_(memory + 3 * plan.line) {
  }

  // Of `channels` channels from `channel` on: rows from `begin` to `end`.
  template <typename Store>
  void run(int64_t image, int64_t channel, int64_t channels, int64_t begin, int64_t end, const Store& store) {
    const int64_t distance = kChannelsLast ? plan_.channels : op_.columns;
    held_ = {-1, -1};
    const int64_t zeros = std::max(begin, std::min(end, op_.out_height));  // where they begin
    for (int64_t y = begin; y < zeros; ++y) {
      blend(image, channel, channels, row_taps(op_, y));
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
  // A row of the input, resized.  Two rows that are neighbours are both held.
  const acc_t* line(int64_t image, int64_t channel, int64_t channels, int64_t y) {
    acc_t* line = lines_[y % 2];
    if (held_[y % 2] != y) {
      held_[y % 2] = y;
      const View4d<scalar_t>& in = op_.input;
      const scalar_t* from = in.at(image, y, 0) + channel * in.channel;
      load_block(from, in.channel, in.column, source_, op_.width, channels, op_.width);
      plan_.resize(source_, line);
    }
    return line;
  }

  void blend(int64_t image, int64_t channel, int64_t channels, const LinearTaps<acc_t>& taps) {
    using Vec = Vectorized<acc_t>;
    constexpr int64_t kLanes = Vec::size();
    const acc_t* first = line(image, channel, channels, taps.first);
    const acc_t* second = line(image, channel, channels, taps.second);
    const Vec fraction(taps.fraction);
    for (int64_t i = 0; i < plan_.line; i += kLanes) {
      const int64_t n = std::min(kLanes, plan_.line - i);
      between(Vec::loadu(first + i, n), Vec::loadu(second + i, n), fraction).store(row_ + i, n);
    }
  }

  const UpsampleBilinear2d<scalar_t>& op_;
  const LinePlan<kChannelsLast, acc_t>& plan_;
  std::array<acc_t*, 2> lines_;
  std::array<int64_t, 2> held_;
  acc_t* row_;
  acc_t* source_;
};

template <bool kChannelsLast, typename scalar_t, typename Store>
inline void upsample_lines(const UpsampleBilinear2d<scalar_t>& op, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t kCached = 65536 / static_cast<int64_t>(sizeof(acc_t));  // elements, of all that a thread works on
  constexpr int64_t kBand = 32;  // rows that a thread does at a time: it resizes a line or two of its neighbour's
  const LinePlan<kChannelsLast, acc_t> plan(op, kCached);
  const int threads = omp_get_max_threads();
  const int64_t groups = divide_up(op.channels, plan.channels);
  const Tiling bands(op.rows, kBand, threads);
  const int64_t mine = round_up(Lines<kChannelsLast, scalar_t>::scratch(plan), kCacheLine);
  const Scratch<acc_t> scratch(threads * mine);
#pragma omp parallel num_threads(threads)
  {
    acc_t* memory = scratch.get() + omp_get_thread_num() * mine;
    std::fill_n(memory, mine, acc_t(0));
    Lines<kChannelsLast, scalar_t> lines(op, plan, memory);
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
template <typename scalar_t, typename Store>
inline void upsample_pixels(const UpsampleBilinear2d<scalar_t>& op, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  constexpr int64_t kLanes = Vec::size();
  constexpr int64_t kCached = 16384 / static_cast<int64_t>(sizeof(acc_t));  // elements
  const int64_t channels = op.channels;
  const int64_t pixels = std::max<int64_t>(1, std::min(op.columns, kCached / channels));
  const int threads = omp_get_max_threads();
  const int64_t mine = round_up(pixels * channels, kCacheLine);
  const Scratch<acc_t> scratch(threads * mine);
#pragma omp parallel num_threads(threads)
  {
    acc_t* sums = scratch.get() + omp_get_thread_num() * mine;
#pragma omp for
    for (int64_t row = 0; row < op.batch * op.rows; ++row) {
      const int64_t image = row / op.rows, y = row % op.rows;
      const LinearTaps<acc_t> rows = row_taps(op, std::min(y, op.out_height - 1));
      const Vec down(rows.fraction);
      for (int64_t begin = 0; begin < op.columns; begin += pixels) {
        const int64_t end = std::min(begin + pixels, op.columns);
        acc_t* out = sums;
        for (int64_t x = begin; x < end; ++x, out += channels) {
          if (y >= op.out_height || x >= op.out_width) {
            std::fill_n(out, channels, acc_t(0));
            continue;
          }
          const LinearTaps<acc_t> columns = column_taps(op, x);
          const Vec right(columns.fraction);
          const scalar_t* corners[2][2] = {
              {op.input.at(image, rows.first, columns.first), op.input.at(image, rows.first, columns.second)},
              {op.input.at(image, rows.second, columns.first), op.input.at(image, rows.second, columns.second)}};
          for (int64_t c = 0; c < channels; c += kLanes) {
            const int64_t count = std::min(kLanes, channels - c);
            const auto line = [&](int i) {
              return between(load_vector(corners[i][0] + c, count), load_vector(corners[i][1] + c, count), right);
            };
            between(line(0), line(1), down).store(out + c, count);
          }
        }
        store(OutputBlock{image, 0, channels, y, 1, begin, end - begin}, sums, channels);
      }
    }
  }
}

// `store`: for an output of that memory format, see OutputBlock.  The bits do not depend on it, nor on the input's.
template <bool kChannelsLast, typename scalar_t, typename Store>
inline void upsample_bilinear2d(const UpsampleBilinear2d<scalar_t>& op, const Store& store) {
  if (kChannelsLast && op.input.channel == 1 && op.channels >= Vectorized<accumulate_t<scalar_t>>::size()) {
    upsample_pixels(op, store);
  } else {
    upsample_lines<kChannelsLast>(op, store);
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_UPSAMPLE_BILINEAR2D_H
