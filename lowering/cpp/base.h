// What every kernel needs: aligned scratch, row-major transposition, the split of work into tiles.
//
// The kernels are plain C++17 on at::vec::Vectorized and OpenMP, so one source serves AVX2, AVX-512, NEON, SVE and a
// compiler that vectorizes nothing.  They know nothing of Inductor.
#ifndef INDUCTOR_VISION_BASE_H
#define INDUCTOR_VISION_BASE_H

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/Unroll.h>
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

namespace [[gnu::visibility("hidden")]] inductor_vision {

using at::vec::Vectorized;
using c10::ForcedUnroll;

constexpr int64_t kCacheLine = 64;  // bytes; also the row of a weight panel (gemm.h)

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

inline int64_t round_down(int64_t a, int64_t b) {
  return a / b * b;
}

// The type that sums are kept in: float for float, bf16 and fp16, double for double (accumulate_dtype,
// ops/registry.py).
template <typename scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename F, int... n>
inline auto generate(const F& f, std::integer_sequence<int, n...>) {
  return std::array<decltype(f(0)), sizeof...(n)>{f(n)...};
}

// {f(0), ..., f(kCount - 1)}.  For arrays that are to be kept in registers: they must be read and written at constant
// places only (ForcedUnroll), from the very beginning; the constructor of Vec[kCount] is a loop.
template <int kCount, typename F>
inline auto generate(const F& f) {
  return generate(f, std::make_integer_sequence<int, kCount>{});
}

// Uninitialized memory, aligned to a cache line, released at the end of the scope.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(allocate(count)) {
  }
  T* get() const {
    return data_.get();
  }
  T& operator[](int64_t i) const {
    return data_.get()[i];
  }

 private:
  struct Free {
    void operator()(void* p) const {
      std::free(p);
    }
  };
  static T* allocate(int64_t count) {
    const int64_t bytes = round_up(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)), kCacheLine);
    void* p = std::aligned_alloc(kCacheLine, static_cast<size_t>(bytes));
    if (p == nullptr) {
      throw std::bad_alloc();
    }
    return static_cast<T*>(p);
  }
  std::unique_ptr<T, Free> data_;
};

// To be called on a large output before it is written.  It may be memory that the allocator has just got from the
// system, again and again, and faulting that in by pages of 4 KB takes several times as long as writing it: asks for
// large pages instead, where the system has them.
inline void prepare_output(const void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kOftenKept = int64_t{8} << 20;  // when freed: it is mostly there already
  constexpr int64_t kLargePage = int64_t{2} << 20;
  if (bytes > kOftenKept) {
    const int64_t begin = round_up(reinterpret_cast<int64_t>(data), kLargePage);
    const int64_t end = round_down(reinterpret_cast<int64_t>(data) + bytes, kLargePage);
    madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);  // advice: may be ignored
  }
#else
  (void)data, (void)bytes;
#endif
}

// Has memory on its way into cache that is read, or written, soon: `rows` rows of `columns` elements, `distance` apart.
// For more streams at once than the hardware follows.
template <bool kWrite = false, typename T>
inline void prefetch(const T* p, int64_t distance, int64_t rows, int64_t columns) {
  constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(T));
  for (int64_t m = 0; m < rows; ++m, p += distance) {
    for (int64_t n = 0; n < columns; n += kLine) {
      __builtin_prefetch(p + n, kWrite);
    }
  }
}

// Vectorized<accumulate_t> from `count` consecutive elements of any floating type; the other lanes are zero.
template <typename scalar_t>
inline Vectorized<accumulate_t<scalar_t>> load_vector(
    const scalar_t* p, int64_t count = Vectorized<accumulate_t<scalar_t>>::size()) {
  using acc_t = accumulate_t<scalar_t>;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    return Vectorized<acc_t>::loadu(p, count);
  } else {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    // at::vec loads half of a vector by a masked load of a whole one, which may cross a cache line, or through memory.
    if (count == Vectorized<acc_t>::size()) {
#if defined(CPU_CAPABILITY_AVX512)
      __m512 value;
      at::vec::cvt_to_fp32<scalar_t>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), value);
#else
      __m256 value;
      at::vec::cvt_to_fp32<scalar_t>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), value);
#endif
      return value;
    }
#endif
    return at::vec::convert<acc_t>(Vectorized<scalar_t>::loadu(p, count));
  }
}

// The reverse, to any floating type.
template <typename acc_t, typename value_t>
inline void store_vector(const Vectorized<acc_t>& value, value_t* p, int64_t count = Vectorized<acc_t>::size()) {
  if constexpr (std::is_same_v<value_t, acc_t>) {
    value.store(p, count);
  } else {
    at::vec::convert<value_t>(value).store(p, count);
  }
}

// How many neighbouring channels are done at once: their sums stay in registers, their results in the first-level
// cache.
template <typename acc_t>
constexpr int64_t kChunk = 4 * Vectorized<acc_t>::size();

// use(U, first, count) for the channels [first, first + count) of 0 <= n: U whole vectors of them, at most kChunk, or
// one that may be a part.
template <typename acc_t, typename Use>
inline void for_vectors(int64_t n, const Use& use) {
  constexpr int64_t kLanes = Vectorized<acc_t>::size();
  int64_t first = 0;
  for (; first + 4 * kLanes <= n; first += 4 * kLanes) {
    use(std::integral_constant<int, 4>(), first, 4 * kLanes);
  }
  if (first + 2 * kLanes <= n) {
    use(std::integral_constant<int, 2>(), first, 2 * kLanes);
    first += 2 * kLanes;
  }
  for (; first < n; first += kLanes) {
    use(std::integral_constant<int, 1>(), first, std::min(kLanes, n - first));
  }
}

// total[i] += part[i] for i < count.
template <typename acc_t>
inline void add_to(acc_t* total, const acc_t* part, int64_t count) {
  constexpr int64_t kLanes = Vectorized<acc_t>::size();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    (Vectorized<acc_t>::loadu(total + i) + Vectorized<acc_t>::loadu(part + i)).store(total + i);
  }
  for (; i < count; ++i) {
    total[i] += part[i];
  }
}

// dst[m * ld_dst + n] = src[m * ld_src + n] for m < rows, n < columns, converted.
template <typename acc_t, typename value_t>
inline void store_block(const acc_t* src, int64_t ld_src, value_t* dst, int64_t ld_dst, int64_t rows, int64_t columns) {
  constexpr int64_t kLanes = Vectorized<acc_t>::size();
  if (ld_src == columns && ld_dst == columns) {  // one long row
    columns *= rows;
    rows = 1;
  }
  for (int64_t m = 0; m < rows; ++m, src += ld_src, dst += ld_dst) {
    int64_t n = 0;
    if constexpr (sizeof(value_t) < sizeof(acc_t)) {  // at::vec stores half of a vector by a masked store of a whole
                                                      // one
      for (; n + 2 * kLanes <= columns; n += 2 * kLanes) {
        at::vec::convert_from_float<value_t>(
            Vectorized<acc_t>::loadu(src + n), Vectorized<acc_t>::loadu(src + n + kLanes))
            .store(dst + n);
      }
    }
    for (; n + kLanes <= columns; n += kLanes) {
      store_vector(Vectorized<acc_t>::loadu(src + n), dst + n);
    }
    for (; n < columns; ++n) {
      dst[n] = static_cast<value_t>(src[n]);
    }
  }
}

// dst[n * ld_dst + m] = src[m * ld_src + n] for m < rows, n < columns.
//
// at::vec transposes blocks in registers: of any size up to a limit for AVX-512, of one size for AVX2, floats only.
template <typename T>
inline void transpose(const T* src, int64_t ld_src, T* dst, int64_t ld_dst, int64_t rows, int64_t columns) {
#if defined(CPU_CAPABILITY_AVX512)
  constexpr bool kWhole = !std::is_same_v<T, double>, kParts = kWhole;
  constexpr int64_t kBlock = kCacheLine / static_cast<int64_t>(sizeof(T));
#elif defined(CPU_CAPABILITY_AVX2)
  constexpr bool kWhole = std::is_same_v<T, float>, kParts = false;
  constexpr int64_t kBlock = 8;
#else
  constexpr bool kWhole = false, kParts = false;
  constexpr int64_t kBlock = 8;
#endif
  for (int64_t m = 0; m < rows; m += kBlock) {
    const int64_t m_count = std::min(kBlock, rows - m);
    for (int64_t n = 0; n < columns; n += kBlock) {
      const int64_t n_count = std::min(kBlock, columns - n);
      const T* from = src + m * ld_src + n;
      T* to = dst + n * ld_dst + m;
      for (int64_t i = 0; i < m_count; ++i) {  // so many short streams are too many for the hardware
        __builtin_prefetch(from + i * ld_src + 2 * kBlock);
      }
      if constexpr (kWhole) {
        if (m_count == kBlock && n_count == kBlock) {
          at::vec::transpose_mxn<T, kBlock, kBlock>(from, ld_src, to, ld_dst);
          continue;
        }
      }
      if constexpr (kParts) {
        at::vec::transpose_mxn<T>(from, ld_src, to, ld_dst, static_cast<int>(m_count), static_cast<int>(n_count));
        continue;
      }
      for (int64_t i = 0; i < m_count; ++i) {
        for (int64_t j = 0; j < n_count; ++j) {
          to[j * ld_dst + i] = from[i * ld_src + j];
        }
      }
    }
  }
}

// dst[m * ld_dst + n] = src[m * row + n * column] for m < rows, n < columns, converted; any strides.
template <typename value_t, typename acc_t>
inline void load_block(
    const value_t* src, int64_t row, int64_t column, acc_t* dst, int64_t ld_dst, int64_t rows, int64_t columns) {
  constexpr int64_t kLanes = Vectorized<acc_t>::size();
  if (column == 1) {
    for (int64_t m = 0; m < rows; ++m, src += row, dst += ld_dst) {
      int64_t n = 0;
      for (; n + kLanes <= columns; n += kLanes) {
        load_vector(src + n).store(dst + n);
      }
      if (n < columns) {
        load_vector(src + n, columns - n).store(dst + n, columns - n);
      }
    }
  } else if (row == 1) {
    if constexpr (std::is_same_v<value_t, acc_t>) {
      transpose(src, column, dst, ld_dst, columns, rows);
    } else {
      constexpr int64_t kBlock = 16, kLength = 64;
      alignas(kCacheLine) acc_t converted[kBlock * kLength];
      for (int64_t n = 0; n < columns; n += kBlock) {
        for (int64_t m = 0; m < rows; m += kLength) {
          const int64_t n_count = std::min(kBlock, columns - n), m_count = std::min(kLength, rows - m);
          load_block(src + n * column + m, column, 1, converted, kLength, n_count, m_count);
          transpose(converted, kLength, dst + m * ld_dst + n, ld_dst, n_count, m_count);
        }
      }
    }
  } else {
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t n = 0; n < columns; ++n) {
        dst[m * ld_dst + n] = static_cast<acc_t>(src[m * row + n * column]);
      }
    }
  }
}

// A [B, channels, height, width] tensor with any strides, in elements.
template <typename scalar_t>
struct View4d {
  const scalar_t* data;
  int64_t image, channel, row, column;

  // A pixel's first channel.
  const scalar_t* at(int64_t b, int64_t y, int64_t x) const {
    return data + (b * image + y * row + x * column);
  }
};

// A [B, channels, height, width] tensor that is written.
template <typename scalar_t>
struct Output4d {
  scalar_t* data;
  int64_t image, channel, row, column;

  scalar_t* at(int64_t b, int64_t c, int64_t y, int64_t x) const {
    return data + (b * image + c * channel + y * row + x * column);
  }
};

// values[i * distance + c] to pixel i of a row and channel c, from column `x` and channel `c` on: `pixels` pixels of a
// few channels.
template <typename acc_t, typename scalar_t>
inline void store_pixels(
    const acc_t* values, int64_t distance, const Output4d<scalar_t>& out, int64_t b, int64_t c, int64_t y, int64_t x,
    int64_t pixels, int64_t channels) {
  if (out.channel == 1) {
    store_block(values, distance, out.at(b, c, y, x), out.column, pixels, channels);
    return;
  }
  constexpr int64_t kChannels = kCacheLine / static_cast<int64_t>(sizeof(acc_t)), kLength = 64;
  alignas(kCacheLine) acc_t by_channel[kChannels * kLength];
  for (int64_t m = 0; m < channels; m += kChannels) {
    for (int64_t i = 0; i < pixels; i += kLength) {
      const int64_t rows = std::min(kChannels, channels - m), count = std::min(kLength, pixels - i);
      transpose(values + i * distance + m, distance, by_channel, kLength, count, rows);
      store_block(by_channel, kLength, out.at(b, c + m, y, x + i), out.channel, rows, count);
    }
  }
}

template <typename scalar_t>
struct Images {
  View4d<scalar_t> view;
  int64_t count, channels, height, width;
};

// Images copied to channels_last in strips of pixels: transposed if their columns are neighbours; if their channels
// are, some of these brought together.
template <typename scalar_t>
class ImageTransposition {
 public:
  // `strip`: pixels.
  ImageTransposition(const Images<scalar_t>& in, const View4d<scalar_t>& out, int64_t strip)
      : in_(in),
        out_(out),
        strip_(strip) {
    const bool flat = in.view.row == in.width * in.view.column;  // rows follow each other
    rows_ = flat ? 1 : in.height;
    width_ = flat ? in.height * in.width : in.width;
    strips_ = divide_up(width_, strip_);
  }

  int64_t strips() const {
    return in_.count * rows_ * strips_;
  }
  // The strip that a pixel of the first image is in.
  int64_t strip_of(int64_t row, int64_t column) const {
    return rows_ == 1 ? (row * in_.width + column) / strip_ : row * strips_ + column / strip_;
  }
  void transpose_strip(int64_t strip) const {
    const int64_t image = strip / (rows_ * strips_), row = strip / strips_ % rows_, column = strip % strips_ * strip_;
    const View4d<scalar_t>& view = in_.view;
    const int64_t pixels = std::min(strip_, width_ - column);
    const scalar_t* from = view.data + (image * view.image + row * view.row + column * view.column);
    scalar_t* to = const_cast<scalar_t*>(out_.data) + ((image * rows_ + row) * width_ + column) * out_.column;
    if (in_.channels > 1 && view.channel != 1) {
      transpose(from, view.channel, to, out_.column, in_.channels, pixels);
      return;
    }
    for (int64_t i = 0; i < pixels; ++i) {
      std::memcpy(to + i * out_.column, from + i * view.column, in_.channels * sizeof(scalar_t));
    }
  }

 private:
  const Images<scalar_t> in_;
  const View4d<scalar_t> out_;
  int64_t strip_, rows_, width_, strips_;
};

// A part of an output [B, channels, height, width], of one image; rows are whole, unless there is only one.
//
// Kernels hand their results over with store(block, values, distance).  For a channels_last output channel c of pixel
// i, counted from those of the block, is values[i * distance + c], otherwise values[c * distance + i].
struct OutputBlock {
  int64_t image;
  int64_t channel, channels;
  int64_t row, rows;
  int64_t column, columns;
};

// A store that keeps results as they are.
//
// A kernel whose results are of this type may as well write them where they go, which saves a copy.
template <bool kChannelsLast, typename value_t>
struct DenseStore {
  value_t* out;
  int64_t channels, height, width;

  // Elements between neighbouring pixels of a channels_last output, neighbouring channels of another.
  int64_t distance() const {
    return kChannelsLast ? channels : height * width;
  }
  value_t* at(const OutputBlock& block) const {
    const int64_t pixel = block.row * width + block.column;
    return out + block.image * channels * height * width +
           (kChannelsLast ? pixel * channels + block.channel : block.channel * height * width + pixel);
  }
  template <typename acc_t>
  void operator()(const OutputBlock& block, const acc_t* values, int64_t values_distance) const {
    const int64_t pixels = block.rows * block.columns;
    const int64_t rows = kChannelsLast ? pixels : block.channels, columns = kChannelsLast ? block.channels : pixels;
    store_block(values, values_distance, at(block), distance(), rows, columns);
  }
};

// How `count` units are cut into tiles of at most `limit`, evenly, with as many tiles as keep all threads busy.
// The cut depends on the number of threads; what is computed for a unit must not depend on the cut.
struct Tiling {
  int64_t count;
  int64_t tiles;

  Tiling(int64_t count, int64_t limit, int64_t threads) : count(count), tiles(divide_up(count, limit)) {
    tiles = std::min(count, round_up(tiles, threads));
  }
  int64_t begin(int64_t tile) const {
    return count * tile / tiles;
  }
};

// Carries an exception out of a parallel region, which none may leave by itself: it would end the process.  For what
// cannot be allocated before the region.
class ParallelExceptions {
 public:
  // Does nothing once something was thrown: there will be no result.
  template <typename Task>
  void run(const Task& task) {
    if (thrown_) {
      return;
    }
    try {
      task();
    } catch (...) {
      if (!thrown_.exchange(true)) {
        first_ = std::current_exception();
      }
    }
  }
  // To be called behind the region.
  void rethrow() const {
    if (first_ != nullptr) {
      std::rethrow_exception(first_);
    }
  }

 private:
  std::atomic<bool> thrown_{false};
  std::exception_ptr first_;
};

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_BASE_H
