// A register-blocked matrix product on packed weights: C[rows, 16 * panels] += A[rows, K] * B[panels, K, 16].
//
//   A      K may be cut in `runs` of `run` elements each (a run: the channels of one group at one tap).
//          Rows: row-major, kRow elements between rows, runs `run_stride` apart;
//          StridedRows: rows any distance apart;
//          TransposedRows: its transpose, likewise;
//          ListedRows: runs wherever a list says
//   B      packed: a panel holds kPanel output columns, one cache line for each k; panels lie `panel_stride` apart
//   C      row-major sums; read, added to and written back, or begun with other numbers than what is there
//
// Each element of C is one chain of fused multiply-adds over k, in order of k, whatever the block it falls in: the
// result does not depend on how rows are cut into tiles.
#ifndef INDUCTOR_VISION_GEMM_H
#define INDUCTOR_VISION_GEMM_H

#include <cstring>

#include "base.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// Output columns in a panel: 16 floats or 8 doubles.
template <typename acc_t>
constexpr int64_t kPanel = kCacheLine / static_cast<int64_t>(sizeof(acc_t));

// Rows and panels of C that one call of the micro-kernel keeps in registers.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kMicroRows = 12;  // 12 x 2 accumulators of 32 registers
constexpr int kMicroPanels = 2;
#else
constexpr int kMicroRows = 6;  // 6 x 2 accumulators of 16 registers (AVX2), 6 x 4 of 32 (NEON)
constexpr int kMicroPanels = 1;
#endif
constexpr int kRowStep = kMicroRows / 3;  // tiles are padded to a multiple of this many rows

// A row of A holds at most so many elements, and rows lie a little further apart: a constant, so that one register
// addresses all rows, and not a power of two, whose rows would share cache sets.
constexpr int64_t kMaxDepth = 256;
constexpr int64_t kRowDistance = kMaxDepth + 16;

// A[row, k0 : k0 + K] of one matrix product, K cut in runs.
template <typename value_t, int64_t kRow_ = kRowDistance>
struct Rows {
  static constexpr int64_t kRow = kRow_, kDepth = 1;  // elements between neighbouring rows, neighbouring k
  const value_t* data;
  int64_t runs;
  int64_t run;
  int64_t run_stride;

  static constexpr int64_t row_distance() {
    return kRow;
  }
  // Where a run begins in the first row, and which k of B that is.
  const value_t* begin(int64_t r) const {
    return data + r * run_stride;
  }
  int64_t depth(int64_t r) const {
    return r * run;
  }
};

// The same with rows that lie where they are.
template <typename value_t>
struct StridedRows {
  static constexpr int64_t kDepth = 1;
  const value_t* data;
  int64_t row;  // elements between neighbouring rows
  int64_t runs;
  int64_t run;
  int64_t run_stride;

  int64_t row_distance() const {
    return row;
  }
  const value_t* begin(int64_t r) const {
    return data + r * run_stride;
  }
  int64_t depth(int64_t r) const {
    return r * run;
  }
};

// The same of an A that is stored as its transpose; runs are so many rows of that.
template <typename value_t>
struct TransposedRows : Rows<value_t> {
  static constexpr int64_t kRow = 1, kDepth = kRowDistance;

  static constexpr int64_t row_distance() {
    return kRow;
  }
};

// A place in A, and what of B it is multiplied with, in units of ListedRows.
struct Run {
  int64_t source;
  int64_t depth;
};

// Runs from a list, which does not know how many k they have.
template <typename value_t, int64_t kRow_, int64_t kDepth_>
struct ListedRows {
  static constexpr int64_t kRow = kRow_, kDepth = kDepth_;
  const value_t* data;
  const Run* list;
  int64_t runs;
  int64_t run;
  int64_t origin;    // the source that is at `data`
  int64_t distance;  // between two sources
  int64_t unit;      // k of B between two depths

  static constexpr int64_t row_distance() {
    return kRow;
  }
  const value_t* begin(int64_t r) const {
    return data + (list[r].source - origin) * distance;
  }
  int64_t depth(int64_t r) const {
    return list[r].depth * unit;
  }
};

// B: K x kPanel elements a panel.
template <typename value_t>
struct Panels {
  const value_t* data;
  int64_t panel_stride;
};

// Sums are stored as they are; what is stored of them otherwise are functions of activations.h.
struct AsTheyAre {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& sum) {
    return sum;
  }
};

// C, and what its sums begin with: with what is in it, or with `begin`.
template <typename acc_t, typename Function = AsTheyAre>
struct Sums {
  acc_t* data;
  int64_t row;  // elements between neighbouring rows
  const acc_t* begin;
  int64_t begin_row;  // likewise; 0: all rows begin alike
  Function function;  // of the sums, is stored

  Sums(acc_t* data, int64_t row) : Sums(data, row, data, row) {
  }
  Sums(acc_t* data, int64_t row, const acc_t* begin, int64_t begin_row, const Function& function = {})
      : data(data),
        row(row),
        begin(begin),
        begin_row(begin_row),
        function(function) {
  }
  Sums at(int64_t i, int64_t column) const {
    return {data + i * row + column, row, begin + i * begin_row + column, begin_row, function};
  }
};

// How many lines of a panel are read ahead: a block of panels does not fit the first-level cache.
constexpr int64_t kAhead = 16;

template <typename acc_t, int kRows, int kPanels, typename A, typename Function>
inline void micro_kernel(const A& a, const Panels<acc_t>& b, const Sums<acc_t, Function>& c) {
  using Vec = Vectorized<acc_t>;
  constexpr int kVec = static_cast<int>(kPanel<acc_t> / Vec::size());  // vectors in a panel's row
  constexpr int kColumns = kPanels * kVec;
  const int64_t distance = a.row_distance();
  auto sum = generate<kRows * kColumns>(
      [&](int n) { return Vec::loadu(c.begin + n / kColumns * c.begin_row + n % kColumns * Vec::size()); });
  for (int64_t r = 0; r < a.runs; ++r) {
    const acc_t* row = a.begin(r);
    const acc_t* panel = b.data + a.depth(r) * kPanel<acc_t>;
    for (int64_t k = 0; k < a.run; ++k) {
      const auto column = generate<kColumns>([&](int j) {
        const acc_t* from = panel + (j / kVec) * b.panel_stride + (j % kVec) * Vec::size();
        if (j % kVec == 0) {
          __builtin_prefetch(from + kAhead * kPanel<acc_t>);
        }
        return Vec::loadu(from);
      });
      ForcedUnroll<kRows>{}([&](auto i) {
        const Vec value(row[i * distance + k * A::kDepth]);
        ForcedUnroll<kColumns>{}(
            [&](auto j) { sum[i * kColumns + j] = at::vec::fmadd(value, column[j], sum[i * kColumns + j]); });
      });
      panel += kPanel<acc_t>;
    }
  }
  ForcedUnroll<kRows * kColumns>{}(
      [&](auto n) { c.function.apply(sum[n]).store(c.data + n / kColumns * c.row + n % kColumns * Vec::size()); });
}

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
#define INDUCTOR_VISION_BF16_DOT 1
// bf16 A and B, fp32 C: k runs over pairs, B holds [K / 2][kPanel][2].
template <typename acc_t, int kRows, int kPanels>
inline void micro_kernel(const Rows<at::BFloat16>& a, const Panels<at::BFloat16>& b, const Sums<float>& c) {
  auto sum = generate<kRows * kPanels>(
      [&](int n) { return _mm512_loadu_ps(c.begin + n / kPanels * c.begin_row + n % kPanels * kPanel<float>); });
  for (int64_t r = 0; r < a.runs; ++r) {
    const at::BFloat16* row = a.begin(r);
    const at::BFloat16* panel = b.data + a.depth(r) * kPanel<float>;
    for (int64_t k = 0; k < a.run; k += 2) {
      const auto column = generate<kPanels>([&](int j) {
        const at::BFloat16* from = panel + j * b.panel_stride;
        __builtin_prefetch(from + 2 * kAhead * kPanel<float>);
        return (__m512bh)_mm512_loadu_si512(from);
      });
      ForcedUnroll<kRows>{}([&](auto i) {
        int32_t pair;
        std::memcpy(&pair, row + i * kRowDistance + k, sizeof(pair));
        const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
        ForcedUnroll<kPanels>{}(
            [&](auto j) { sum[i * kPanels + j] = _mm512_dpbf16_ps(sum[i * kPanels + j], value, column[j]); });
      });
      panel += 2 * kPanel<float>;
    }
  }
  ForcedUnroll<kRows * kPanels>{}(
      [&](auto n) { _mm512_storeu_ps(c.data + n / kPanels * c.row + n % kPanels * kPanel<float>, sum[n]); });
}
#else
#define INDUCTOR_VISION_BF16_DOT 0
#endif

// One column of micro-tiles: all rows, kPanels panels.  `rows` is a multiple of kRowStep.
template <typename acc_t, int kPanels, typename A, typename value_t>
inline void gemm_panels(A a, const Panels<value_t>& b, const Sums<acc_t>& c, int64_t rows) {
  int64_t i = 0;
  const value_t* first = a.data;
  for (; i + kMicroRows <= rows; i += kMicroRows) {
    a.data = first + i * A::kRow;
    micro_kernel<acc_t, kMicroRows, kPanels>(a, b, c.at(i, 0));
  }
  a.data = first + i * A::kRow;
  if (rows - i == 2 * kRowStep) {
    micro_kernel<acc_t, 2 * kRowStep, kPanels>(a, b, c.at(i, 0));
  } else if (rows - i == kRowStep) {
    micro_kernel<acc_t, kRowStep, kPanels>(a, b, c.at(i, 0));
  }
}

// C[rows, panels * kPanel] += A * B.  `rows` is a multiple of kRowStep.
template <typename acc_t, typename A, typename value_t>
inline void gemm(const A& a, Panels<value_t> b, int64_t panels, const Sums<acc_t>& c, int64_t rows) {
  int64_t p = 0;
  const value_t* first = b.data;
  for (; p + kMicroPanels <= panels; p += kMicroPanels) {
    b.data = first + p * b.panel_stride;
    gemm_panels<acc_t, kMicroPanels>(a, b, c.at(0, p * kPanel<acc_t>), rows);
  }
  if constexpr (kMicroPanels > 1) {
    for (; p < panels; ++p) {
      b.data = first + p * b.panel_stride;
      gemm_panels<acc_t, 1>(a, b, c.at(0, p * kPanel<acc_t>), rows);
    }
  }
}

// Rows of a matrix product that are pixels, where they lie, multiplied at once: as many as registers take, and what is
// left.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kPixelRows = 14;  // 14 x 2 accumulators of 32 registers; maps are mostly 7, 14, 28, ... wide
constexpr int kPixelPanels = 2;
#else
constexpr int kPixelRows = 6;  // as kMicroRows
constexpr int kPixelPanels = 1;
#endif
constexpr int kSinglePanels = 4 * kPixelPanels;  // of a single row: a chain of additions needs others beside it

// C[rows, panels * kPanel] = begin + A * B for any number of rows; none beyond them is read.
template <int kPanels, typename acc_t, typename Function>
inline void multiply_rows(StridedRows<acc_t> a, const Panels<acc_t>& b, const Sums<acc_t, Function>& c, int64_t rows) {
  const acc_t* first = a.data;
  int64_t i = 0;
  const auto blocks = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    for (; i + kRows <= rows; i += kRows) {
      a.data = first + i * a.row;
      micro_kernel<acc_t, kRows, kPanels>(a, b, c.at(i, 0));
    }
  };
  blocks(std::integral_constant<int, kPixelRows>());
  blocks(std::integral_constant<int, kPixelRows / 2>());
  if constexpr (kPixelRows / 2 > 4) {
    blocks(std::integral_constant<int, 4>());
  }
  blocks(std::integral_constant<int, 2>());
  blocks(std::integral_constant<int, 1>());
}

template <typename acc_t, typename Function>
inline void multiply_pixels(
    const StridedRows<acc_t>& a, Panels<acc_t> b, int64_t panels, const Sums<acc_t, Function>& c, int64_t rows) {
  const acc_t* first = b.data;
  int64_t p = 0;
  const auto columns = [&](auto count, const auto& multiply) {
    constexpr int kPanels = decltype(count)::value;
    for (; p + kPanels <= panels; p += kPanels) {
      b.data = first + p * b.panel_stride;
      multiply(count, c.at(0, p * kPanel<acc_t>));
    }
  };
  const auto all_rows = [&](auto count, const auto& sums) { multiply_rows<decltype(count)::value>(a, b, sums, rows); };
  if (rows == 1) {
    columns(std::integral_constant<int, kSinglePanels>(), [&](auto count, const auto& sums) {
      micro_kernel<acc_t, 1, decltype(count)::value>(a, b, sums);
    });
  }
  columns(std::integral_constant<int, kPixelPanels>(), all_rows);
  if constexpr (kPixelPanels > 1) {
    columns(std::integral_constant<int, 1>(), all_rows);
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_GEMM_H
