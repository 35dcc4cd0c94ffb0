// What the test programs of the kernels share: random numbers, strided tensors, and results that must be written once.
//
// All memory is allocated to the exact size, so that AddressSanitizer sees any access beyond it.
#ifndef INDUCTOR_VISION_TEST_HARNESS_H
#define INDUCTOR_VISION_TEST_HARNESS_H

#include "base.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace harness {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

constexpr int64_t kHuge = int64_t{1} << 40;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2862933555777941757u + 3037000493u) {
  }
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ >> 11;
  }
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  double uniform(double low, double high) {
    return low + (high - low) * static_cast<double>(next()) / 9007199254740992.0;
  }
  template <typename T, size_t n>
  T pick(const T (&values)[n]) {
    return values[next() % n];
  }

 private:
  uint64_t state_;
};

template <typename T>
inline T from_double(double value) {
  if constexpr (std::is_same_v<T, double> || std::is_integral_v<T>) {
    return static_cast<T>(value);
  } else {
    return static_cast<T>(static_cast<float>(value));
  }
}

// What lies between the elements of a tensor: a read of it shows in the result.
template <typename T>
inline T poison() {
  return std::is_integral_v<T> ? T(0) : from_double<T>(kNaN);
}

enum class Layout {
  contiguous,
  channels_last,
  sliced,                // columns are neighbours, rows and channels have gaps
  sliced_channels_last,  // channels are neighbours, pixels have gaps
  transposed,            // rows are neighbours
  images_in_rows,        // the images of a batch lie in the rows of one another
  expanded,              // one image for the whole batch
  constant,              // one number for all
};
constexpr Layout kLayouts[] = {
    Layout::contiguous, Layout::channels_last,  Layout::sliced,   Layout::sliced_channels_last,
    Layout::transposed, Layout::images_in_rows, Layout::expanded, Layout::constant};

// A [batch, channels, height, width] tensor on a buffer that ends with its last element.
template <typename scalar_t>
class Tensor {
 public:
  Tensor(int64_t batch, int64_t channels, int64_t height, int64_t width, Layout layout)
      : size_{batch, channels, height, width} {
    switch (layout) {
      case Layout::contiguous:
        view_ = {nullptr, channels * height * width, height * width, width, 1};
        break;
      case Layout::channels_last:
        view_ = {nullptr, channels * height * width, 1, width * channels, channels};
        break;
      case Layout::sliced:
        view_ = {nullptr, (channels + 1) * (height + 2) * (width + 3), (height + 2) * (width + 3), width + 3, 1};
        break;
      case Layout::sliced_channels_last:
        view_ = {nullptr, (channels + 3) * (height + 1) * (width + 2), 1, (width + 2) * (channels + 3), channels + 3};
        break;
      case Layout::transposed:
        view_ = {nullptr, channels * height * width, height * width, 1, height};
        break;
      case Layout::images_in_rows:
        view_ = {nullptr, width, height * batch * width, batch * width, 1};
        break;
      case Layout::expanded:
        view_ = {nullptr, 0, height * width, width, 1};
        break;
      case Layout::constant:
        view_ = {nullptr, 0, 0, 0, 0};
        break;
    }
    const bool empty = batch * channels * height * width == 0;
    const int64_t elements = empty ? 0 : at(batch - 1, channels - 1, height - 1, width - 1) + 1;
    data_.reset(new scalar_t[elements]);
    std::fill_n(data_.get(), elements, poison<scalar_t>());
    view_.data = data_.get();
  }
  template <typename Value>
  void fill(const Value& value) {
    for (int64_t b = 0; b < size_[0]; ++b) {
      for (int64_t c = 0; c < size_[1]; ++c) {
        for (int64_t y = 0; y < size_[2]; ++y) {
          for (int64_t x = 0; x < size_[3]; ++x) {
            data_[at(b, c, y, x)] = from_double<scalar_t>(value(b, c, y, x));
          }
        }
      }
    }
  }
  // All elements, in the order in which they are filled.
  std::vector<double> numbers() const {
    std::vector<double> numbers;
    for (int64_t b = 0; b < size_[0]; ++b) {
      for (int64_t c = 0; c < size_[1]; ++c) {
        for (int64_t y = 0; y < size_[2]; ++y) {
          for (int64_t x = 0; x < size_[3]; ++x) {
            numbers.push_back((*this)(b, c, y, x));
          }
        }
      }
    }
    return numbers;
  }
  double operator()(int64_t b, int64_t c, int64_t y, int64_t x) const {
    return static_cast<double>(data_[at(b, c, y, x)]);
  }
  const inductor_vision::View4d<scalar_t>& view() const {
    return view_;
  }

 private:
  int64_t at(int64_t b, int64_t c, int64_t y, int64_t x) const {
    return b * view_.image + c * view_.channel + y * view_.row + x * view_.column;
  }
  int64_t size_[4];
  inductor_vision::View4d<scalar_t> view_;
  std::unique_ptr<scalar_t[]> data_;
};

// What a kernel hands over, [batch, channels, height, width]; how often it has written each element is counted.
template <typename acc_t>
class Results {
 public:
  Results(int64_t batch, int64_t channels, int64_t height, int64_t width)
      : size_{batch, channels, height, width},
        values_(batch * channels * height * width, poison<acc_t>()),
        written_(values_.size(), 0) {
  }

  // As the `store` of a kernel, see OutputBlock.  Many threads may call it.
  void add(bool channels_last, const inductor_vision::OutputBlock& block, const acc_t* values, int64_t distance) {
    const bool whole_rows = block.rows == 1 || (block.column == 0 && block.columns == size_[3]);
    if (!whole_rows || !inside(block.image, 1, size_[0]) || !inside(block.channel, block.channels, size_[1]) ||
        !inside(block.row, block.rows, size_[2]) || !inside(block.column, block.columns, size_[3])) {
      __atomic_store_n(&outside_, true, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t c = 0; c < block.channels; ++c) {
      for (int64_t i = 0; i < block.rows * block.columns; ++i) {
        const int64_t row = block.row + i / block.columns, column = block.column + i % block.columns;
        const int64_t to = ((block.image * size_[1] + block.channel + c) * size_[2] + row) * size_[3] + column;
        // Not by assignment: the bits may be those of an integer.
        std::memcpy(&values_[to], values + (channels_last ? i * distance + c : c * distance + i), sizeof(acc_t));
        __atomic_fetch_add(&written_[to], 1, __ATOMIC_RELAXED);
      }
    }
  }

  const std::vector<acc_t>& values() const {
    return values_;
  }
  bool same_bits(const Results& other) const {
    return values_.empty() || std::memcmp(values_.data(), other.values_.data(), values_.size() * sizeof(acc_t)) == 0;
  }
  // Whether each element was written so often; if not, `complaint` says what happened.
  bool written(int times, std::string* complaint) const {
    if (outside_) {
      *complaint = "a block is not inside the output, or a part of several rows";
      return false;
    }
    for (size_t i = 0; i < written_.size(); ++i) {
      if (written_[i] != times) {
        *complaint = "output " + std::to_string(i) + " is written " + std::to_string(written_[i]) + " times";
        return false;
      }
    }
    return true;
  }

 private:
  static bool inside(int64_t begin, int64_t count, int64_t size) {
    return begin >= 0 && count >= 0 && count <= size - begin;
  }

  int64_t size_[4];
  std::vector<acc_t> values_;
  std::vector<int32_t> written_;
  bool outside_ = false;
};

// The `store` of a kernel.
template <typename acc_t>
struct Sink {
  Results<acc_t>* results;
  bool channels_last;

  void operator()(const inductor_vision::OutputBlock& block, const acc_t* values, int64_t distance) const {
    results->add(channels_last, block, values, distance);
  }
};

// Memory for a gradient, filled with what no gradient is: not NaN, which some are.
template <typename scalar_t>
class Output {
 public:
  explicit Output(int64_t count) : count_(count), data_(new scalar_t[count]) {
    std::memset(static_cast<void*>(data_.get()), kUnwritten, count * sizeof(scalar_t));
  }
  scalar_t* get() const {
    return data_.get();
  }
  // All elements; none, if one was not written.
  std::vector<scalar_t> numbers() const {
    for (int64_t i = 0; i < count_; ++i) {
      unsigned char bytes[sizeof(scalar_t)];
      std::memcpy(bytes, data_.get() + i, sizeof bytes);
      if (std::all_of(bytes, bytes + sizeof bytes, [](unsigned char byte) { return byte == kUnwritten; })) {
        return {};
      }
    }
    return {data_.get(), data_.get() + count_};
  }

 private:
  static constexpr unsigned char kUnwritten = 0x5a;
  int64_t count_;
  std::unique_ptr<scalar_t[]> data_;
};

// All NaN are the same: which operand's bits they have is the compiler's choice.
template <typename T>
inline bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](const T& x, const T& y) {
           return std::memcmp(&x, &y, sizeof x) == 0 || (x != x && y != y);
         });
}

struct Figures {
  int64_t calls = 0;
  int64_t runs = 0;
  int64_t rejected = 0;  // calls that were an error, as they should
  double error = 0;      // the largest, as a part of what is allowed

  // As the last line of a program that has nothing to add.
  void print() const {
    std::printf(
        "lanes=%d calls=%" PRId64 " runs=%" PRId64 " error=%.3g\n",
        static_cast<int>(at::vec::Vectorized<float>::size()), calls, runs, error);
  }
};

// Sums in double, and for each a bound of the magnitudes that were added.
struct Numbers {
  std::vector<double> sum, magnitude;

  explicit Numbers(int64_t count) : sum(count, 0), magnitude(count, 0) {
  }
  void add(int64_t at, double term) {
    add(at, term, std::abs(term));
  }
  void add(int64_t at, double term, double bound) {
    sum[at] += term;
    magnitude[at] += std::isfinite(bound) ? bound : 0;
  }
};

// What is wrong with numbers that a kernel summed in acc_t; empty: nothing.  `tolerance`: of float, relative to what
// was added.
template <typename acc_t, typename value_t>
std::string complaint_of(
    const std::vector<value_t>& numbers, const Numbers& expected, double tolerance, Figures& figures) {
  double rounding = 0, smallest = 0;
  if constexpr (!std::is_same_v<acc_t, value_t>) {
    rounding = static_cast<double>(std::numeric_limits<value_t>::epsilon()) / 2;
    smallest = static_cast<double>(std::numeric_limits<value_t>::denorm_min());
  }
  if (numbers.size() != expected.sum.size()) {
    return "there are " + std::to_string(numbers.size()) + " numbers";
  }
  for (size_t i = 0; i < numbers.size(); ++i) {
    const double number = static_cast<double>(numbers[i]), want = expected.sum[i];
    double error = 0, allowed = 1;
    bool good = number == want || (std::isnan(number) && std::isnan(want));
    if (!good && std::isfinite(want)) {
      error = std::abs(number - want);
      allowed = (std::is_same_v<acc_t, double> ? 1e-14 : tolerance) * expected.magnitude[i] +
                rounding * std::abs(want) + smallest;
      good = error <= allowed;
    }
    if (!good) {
      return "number " + std::to_string(i) + " is " + std::to_string(number) + ", expected " + std::to_string(want);
    }
    figures.error = std::max(figures.error, error / allowed);
  }
  return {};
}

}  // namespace harness

#endif  // INDUCTOR_VISION_TEST_HARNESS_H
