// Masks of objects, each resized bilinearly to its box in an image of zeros.
//
//   N        masks, and images
//   side     the pixels from `begin` to `last` of an axis, that a mask is resized to; some may be outside of the image
//   line     the columns of the box that are in the image, of a row of the mask that was resized to them
//
//   out[n, 0, y, x] = (1 - f) * line[y0][x] + f * line[y1][x]        in the box, otherwise 0
//   line[y][x] = (1 - g) * mask[n, 0, y, x0] + g * mask[n, 0, y, x1]
//
// Most of an image is not in the box: rows of zeros are handed over many at a time.  Which pixels of the mask a column
// is between is found out once for a band of rows, and each row of the mask is resized once for it.
#ifndef INDUCTOR_VISION_PASTE_MASKS_H
#define INDUCTOR_VISION_PASTE_MASKS_H

#include "resampling.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

template <typename mask_t>
struct PasteMasks {
  Images<mask_t> masks;  // of one channel
  const int64_t* boxes;  // N rows (x1, y1, x2, y2), pixels that belong to the box
  int64_t box, side;     // distances in these
  int64_t height, width;
};

// Where a mask is along an axis of the image.
struct PastedSide {
  int64_t begin, size;  // the pixels that it is resized to
  int64_t first, end;   // those in the image

  PastedSide(int64_t from, int64_t to, int64_t length) {
    constexpr int64_t kFar = int64_t{1} << 40;  // sums of these are numbers still
    begin = std::min(std::max(from, -kFar), kFar);
    const int64_t last = std::min(std::max(to, -kFar), kFar);
    size = std::max<int64_t>(last - begin + 1, 1);
    first = std::min(std::max<int64_t>(begin, 0), length);
    end = std::min(std::max(last + 1, first), length);
  }
};

// One thread's memory, and what it does with it.
template <typename mask_t>
class MaskPasting {
 public:
  using acc_t = accumulate_t<mask_t>;
  using index_t = at::vec::int_same_size_t<acc_t>;
  using Vec = Vectorized<acc_t>;

  explicit MaskPasting(const PasteMasks<mask_t>& op, int64_t threads)
      : op_(op),
        length_(round_up(op.width, kLine)),
        source_(round_up(op.masks.width, kLine)),
        zeros_(std::max<int64_t>(1, std::min(op.height, kZeros / std::max<int64_t>(1, op.width)))),
        zero_(zeros_ * length_),
        taps_(threads * 2 * length_),
        numbers_(threads * (5 * length_ + source_)) {
    std::fill_n(zero_.get(), zeros_ * length_, acc_t(0));
    // Vectors are whole: what is behind the last column is read.
    std::fill_n(taps_.get(), threads * 2 * length_, index_t(0));
    std::fill_n(numbers_.get(), threads * (5 * length_ + source_), acc_t(0));
  }

  // Rows from `begin` to `end` of image `n`.
  template <typename Store>
  void run(int64_t n, int64_t begin, int64_t end, int64_t thread, const Store& store) const {
    const PastedSide x = side(n, 0, op_.width), y = side(n, 1, op_.height);
    const int64_t first = x.first < x.end ? std::min(std::max(y.first, begin), end) : end;
    const int64_t last = std::max(first, std::min(y.end, end));
    store_zeros(n, begin, first, store);
    if (first < last) {
      store_object(n, x, y, first, last, thread, store);
    }
    store_zeros(n, last, end, store);
  }

 private:
  static constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(acc_t));
  static constexpr int64_t kZeros = 16384 / static_cast<int64_t>(sizeof(acc_t));  // that stay in the nearest cache

  PastedSide side(int64_t n, int64_t axis, int64_t length) const {
    const int64_t* box = op_.boxes + n * op_.box;
    return {box[axis * op_.side], box[(axis + 2) * op_.side], length};
  }

  template <typename Store>
  void store_zeros(int64_t n, int64_t begin, int64_t end, const Store& store) const {
    for (int64_t row = begin; row < end; row += zeros_) {
      const int64_t rows = std::min(zeros_, end - row);
      store(OutputBlock{n, 0, 1, row, rows, 0, op_.width}, static_cast<const acc_t*>(zero_.get()), rows * op_.width);
    }
  }

  template <typename Store>
  void store_object(
      int64_t n, const PastedSide& x, const PastedSide& y, int64_t begin, int64_t end, int64_t thread,
      const Store& store) const {
    const Resampling columns{op_.masks.width, x.size, false, 0}, rows{op_.masks.height, y.size, false, 0};
    const int64_t count = x.end - x.first;
    index_t* index = taps_.get() + thread * 2 * length_;
    acc_t* weight = numbers_.get() + thread * (5 * length_ + source_);
    acc_t* lines = weight + 2 * length_;
    acc_t* row = lines + 2 * length_;
    acc_t* source = row + length_;
    for (int64_t i = 0; i < count; ++i) {
      const LinearTaps<acc_t> taps(columns, x.first + i - x.begin);
      for (int k = 0; k < 2; ++k) {
        index[k * length_ + i] = static_cast<index_t>(taps.index[k]);
        weight[k * length_ + i] = taps.weight[k];
      }
    }
    std::fill_n(row, op_.width, acc_t(0));

    std::array<int64_t, 2> held{-1, -1};  // rows of the mask: two that are neighbours are both held
    const auto line = [&](int64_t at) {
      acc_t* to = lines + at % 2 * length_;
      if (held[at % 2] != at) {
        held[at % 2] = at;
        const View4d<mask_t>& mask = op_.masks.view;
        load_block(mask.at(n, at, 0), mask.row, mask.column, source, source_, 1, op_.masks.width);
        for (int64_t i = 0; i < count; i += Vec::size()) {
          const auto weights = generate<2>([&](int k) { return Vec::loadu(weight + k * length_ + i); });
          const Vec sum = weighted(weights, [&](int k) {
            return at::vec::gather<sizeof(acc_t)>(source, Vectorized<index_t>::loadu(index + k * length_ + i));
          });
          sum.store(to + i);
        }
      }
      return to;
    };
    for (int64_t at = begin; at < end; ++at) {
      const LinearTaps<acc_t> taps(rows, at - y.begin);
      const auto pair = generate<2>([&](int j) { return line(taps.index[j]); });
      const auto weights = broadcast_weights(taps);
      for (int64_t i = 0; i < count; i += Vec::size()) {
        const Vec sum = weighted(weights, [&](int j) { return Vec::loadu(pair[j] + i); });
        sum.store(row + x.first + i, std::min<int64_t>(Vec::size(), count - i));
      }
      store(OutputBlock{n, 0, 1, at, 1, 0, op_.width}, static_cast<const acc_t*>(row), op_.width);
    }
  }

  const PasteMasks<mask_t>& op_;
  const int64_t length_, source_, zeros_;  // of a line, of a row of a mask; rows that are handed over together
  const Scratch<acc_t> zero_;
  const Scratch<index_t> taps_;
  const Scratch<acc_t> numbers_;
};

// `store`: for a contiguous output.
template <typename mask_t, typename Store>
inline void paste_masks(const PasteMasks<mask_t>& op, const Store& store) {
  constexpr int64_t kBand = 64;  // rows
  const int threads = omp_get_max_threads();
  const MaskPasting<mask_t> pasting(op, threads);
  const Tiling bands(op.height, kBand, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t unit = 0; unit < op.masks.count * bands.tiles; ++unit) {
    const int64_t n = unit / bands.tiles, band = unit % bands.tiles;
    pasting.run(n, bands.begin(band), bands.begin(band + 1), omp_get_thread_num(), store);
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_PASTE_MASKS_H
