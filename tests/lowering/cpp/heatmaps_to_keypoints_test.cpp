// Runs the kernel of heatmaps_to_keypoints.h against a plain loop over all pixels, to be built with sanitizers.
//
// Each call runs on several numbers of threads, which must give the same bits.  All memory is allocated to the exact
// size, so that AddressSanitizer sees any access beyond it; gaps between the elements of strided tensors are NaN, so
// that a read of one shows in the result.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "heatmaps_to_keypoints.h"

#include <cinttypes>
#include <cstdio>

#include "harness.h"

namespace {

using harness::Figures;
using harness::kInf;
using harness::kLayouts;
using harness::kNaN;
using harness::Layout;
using harness::Random;
using harness::Tensor;
using inductor_vision::accumulate_t;
using inductor_vision::HeatmapBoxes;
using inductor_vision::Images;

enum class Kind {
  plain,
  same,     // all of a map
  nan,      // in some maps, here and there
  hostile,  // NaN, infinite, the largest and the least: only that a keypoint is in its box is checked
};
constexpr Kind kKinds[] = {Kind::plain, Kind::plain, Kind::same, Kind::nan, Kind::hostile};

constexpr Layout kBoxLayouts[] = {Layout::contiguous, Layout::sliced, Layout::sliced_channels_last, Layout::transposed};

// Pixels of a side: around those of vectors and of the kernel's stretches of columns, and a box without area.
constexpr int64_t kSides[] = {-3, 0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64};
constexpr int64_t kLongSides[] = {255, 256, 257, 511, 512, 513, 600};

struct Call {
  int64_t count, keypoints, height, width;
  Kind kind;
  Layout layout, box_layout;

  std::string describe() const {
    char text[200];
    std::snprintf(
        text, sizeof text,
        "%" PRId64 " x %" PRId64 " maps of %" PRId64 " x %" PRId64 ", kind %d, layouts of maps %d, boxes %d", count,
        keypoints, height, width, static_cast<int>(kind), static_cast<int>(layout), static_cast<int>(box_layout));
    return text;
  }
};

[[noreturn]] void fail(const char* types, const std::string& what, const Call& call) {
  std::printf("%s: %s\n  in %s\n", types, what.c_str(), call.describe().c_str());
  std::exit(1);
}

// One side of a box, in the precision that it is computed in.
template <typename acc_t>
struct Side {
  acc_t begin, length;
  int64_t pixels;

  Side(double from, double to)
      : begin(static_cast<acc_t>(from)),
        length(std::max(static_cast<acc_t>(to) - begin, acc_t(1))),
        pixels(static_cast<int64_t>(std::ceil(length))) {
  }
  // Which pixel the place is in the middle of, or -1.
  int64_t pixel(float place) const {
    const double size = static_cast<double>(length) / static_cast<double>(pixels);
    const double at = (static_cast<double>(place) - static_cast<double>(begin)) / size - 0.5;
    const double nearest = std::round(at);
    const bool inside = nearest >= 0 && nearest < static_cast<double>(pixels) && std::abs(at - nearest) < 1e-2;
    return inside ? static_cast<int64_t>(nearest) : -1;
  }
};

// Keys' cubic convolution, a = -0.75.
double cubic(double x) {
  const double a = -0.75;
  x = std::abs(x);
  return x <= 1 ? (a + 2) * x * x * x - (a + 3) * x * x + 1 : x < 2 ? a * (x * x * x - 5 * x * x + 8 * x - 4) : 0;
}

// The plain loop: pixel (row, column) of a map resized to rows x columns.
template <typename map_t>
double heat(
    const Tensor<map_t>& maps, const Call& call, int64_t k, int64_t n, int64_t row, int64_t rows, int64_t column,
    int64_t columns) {
  const auto middle = [](int64_t i, int64_t from, int64_t to) {
    return (static_cast<double>(i) + 0.5) * static_cast<double>(from) / static_cast<double>(to) - 0.5;
  };
  const double y = middle(row, call.height, rows), x = middle(column, call.width, columns);
  const int64_t top = static_cast<int64_t>(std::floor(y)) - 1, left = static_cast<int64_t>(std::floor(x)) - 1;
  double sum = 0;
  for (int64_t r = top; r < top + 4; ++r) {
    for (int64_t c = left; c < left + 4; ++c) {
      const int64_t in_row = std::min(std::max<int64_t>(r, 0), call.height - 1);
      const int64_t in_column = std::min(std::max<int64_t>(c, 0), call.width - 1);
      sum += maps(k, n, in_row, in_column) * cubic(y - static_cast<double>(r)) * cubic(x - static_cast<double>(c));
    }
  }
  return sum;
}

template <typename map_t, typename box_t>
class Check {
  using acc_t = accumulate_t<map_t>;
  using side_t = Side<accumulate_t<box_t>>;

 public:
  Check(const char* types, const Call& call, Random& random, Figures& figures)
      : types_(types),
        call_(call),
        figures_(figures),
        maps_(call.count, call.keypoints, call.height, call.width, call.layout),
        boxes_(1, 1, call.count, 4, call.box_layout) {
    std::vector<double> numbers;
    for (int64_t k = 0; k < call.count; ++k) {
      const bool wide = random.integer(0, 3) == 0;  // and not both sides: the plain loop is slow
      const double x = random.uniform(-50, 50), y = random.uniform(-50, 50), part = random.uniform(0, 1);
      const double width = static_cast<double>(wide ? random.pick(kLongSides) : random.pick(kSides));
      const double height = static_cast<double>(random.pick(kSides));
      numbers.insert(numbers.end(), {x, y, x + width - part, y + height - part * part});
    }
    boxes_.fill([&](int64_t, int64_t, int64_t k, int64_t i) { return numbers[k * 4 + i]; });
    const double common = static_cast<double>(random.integer(-2, 2));
    maps_.fill([&](int64_t, int64_t, int64_t, int64_t) {
      const double hostile[] = {kNaN, kInf, -kInf, 3e38, -3e38, 1e-45, 0, -0.0};
      const double value = call.kind == Kind::same ? common : random.uniform(-1, 1);
      const bool nan = call.kind == Kind::nan && random.integer(0, 29) == 0;
      return call.kind == Kind::hostile ? random.pick(hostile) : nan ? kNaN : value;
    });
  }

  void run() {
    ++figures_.calls;
    std::vector<float> expected;
    for (const int threads : {1, 2, 3}) {
      omp_set_num_threads(threads);
      ++figures_.runs;
      const std::vector<float> out = keypoints();
      if (threads == 1) {
        expected = out;
        verify(out);
      } else if (!out.empty() && std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)) != 0) {
        fail(types_, "other bits on " + std::to_string(threads) + " threads", call_);
      }
    }
  }

  // A box that is none, instead of one of the others, is an error that names it.
  void reject(const std::array<double, 4>& wrong, int64_t which) {
    boxes_.fill([&](int64_t, int64_t, int64_t k, int64_t i) { return k == which ? wrong[i] : boxes_(0, 0, k, i); });
    try {
      keypoints();
    } catch (const std::runtime_error& error) {
      if (std::string(error.what()).find("rois[" + std::to_string(which) + "] is not") != std::string::npos) {
        ++figures_.rejected;
        return;
      }
    }
    fail(types_, "no error for a box that is none, or another", call_);
  }

 private:
  std::vector<float> keypoints() const {
    const int64_t size = call_.count * call_.keypoints * 3;
    const std::unique_ptr<float[]> out(new float[size]);
    std::fill_n(out.get(), size, -7.0f);
    const Images<map_t> maps{maps_.view(), call_.count, call_.keypoints, call_.height, call_.width};
    const auto& boxes = boxes_.view();
    const HeatmapBoxes<box_t> by_row{boxes.data, boxes.row, boxes.column};
    inductor_vision::heatmaps_to_keypoints(maps, by_row, out.get());
    return {out.get(), out.get() + size};
  }

  void verify(const std::vector<float>& out) {
    const float* to = out.data();
    for (int64_t k = 0; k < call_.count; ++k) {
      const side_t x(boxes_(0, 0, k, 0), boxes_(0, 0, k, 2)), y(boxes_(0, 0, k, 1), boxes_(0, 0, k, 3));
      for (int64_t n = 0; n < call_.keypoints; ++n, to += 3) {
        const int64_t column = x.pixel(to[0]), row = y.pixel(to[1]);
        if (column < 0 || row < 0) {
          fail(types_, "a keypoint outside of box " + std::to_string(k), call_);
        }
        if (call_.kind != Kind::hostile) {
          verify_maximum(k, n, row, y.pixels, column, x.pixels, static_cast<double>(to[2]));
        }
      }
    }
  }

  void verify_maximum(int64_t k, int64_t n, int64_t row, int64_t rows, int64_t column, int64_t columns, double value) {
    const auto at = [&](int64_t r, int64_t c) { return heat(maps_, call_, k, n, r, rows, c, columns); };
    double greatest = -kInf;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        const double here = at(r, c);
        if (std::isnan(here)) {
          if (r != row || c != column || !std::isnan(value)) {
            fail(types_, "not the first NaN of keypoint " + std::to_string(n) + " of box " + std::to_string(k), call_);
          }
          return;
        }
        greatest = std::max(greatest, here);
      }
    }
    const double in_float = std::abs(value - greatest) / 1e-5;
    const double in_place = (greatest - at(row, column)) / (std::is_same_v<acc_t, double> ? 1e-12 : 1e-5);
    const double error = std::max(in_float, in_place);
    if (!(error <= 1)) {
      fail(
          types_,
          "keypoint " + std::to_string(n) + " of box " + std::to_string(k) + " is " + std::to_string(value) +
              ", the greatest value is " + std::to_string(greatest),
          call_);
    }
    figures_.error = std::max(figures_.error, error);
  }

  const char* types_;
  const Call call_;
  Figures& figures_;
  Tensor<map_t> maps_;
  Tensor<box_t> boxes_;
};

template <typename map_t, typename box_t>
void check_types(const char* types, int calls, Figures& figures) {
  Random random(sizeof(map_t) + 16 * sizeof(box_t) + 256 * std::is_same_v<map_t, at::Half>);
  for (int i = 0; i < calls; ++i) {
    const Call call{random.integer(0, 4), random.integer(0, 3),  random.integer(1, 9),    random.integer(1, 20),
                    random.pick(kKinds),  random.pick(kLayouts), random.pick(kBoxLayouts)};
    Check<map_t, box_t>(types, call, random, figures).run();
  }
  const Call call{3, 2, 4, 5, Kind::plain, Layout::contiguous, Layout::sliced};
  const double largest = static_cast<double>(std::numeric_limits<box_t>::max());
  for (const double value : {kNaN, kInf, -kInf}) {
    for (int64_t i = 0; i < 4; ++i) {
      std::array<double, 4> box = {1, 2, 10, 20};
      box[i] = value;
      Check<map_t, box_t>(types, call, random, figures).reject(box, i % 3);
    }
  }
  if (largest > 0x1p31) {
    Check<map_t, box_t>(types, call, random, figures).reject({-largest, 0, largest, 1}, 0);
    Check<map_t, box_t>(types, call, random, figures).reject({0, 0, 1, largest}, 1);
  }
  Check<map_t, box_t>(types, call, random, figures).reject({0, 0, 0x1p16 - 32, 0x1p16 - 32}, 2);
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 50;
  Figures figures;
  check_types<float, float>("float", calls, figures);
  check_types<double, double>("double", calls, figures);
  check_types<double, float>("double, float boxes", calls, figures);
  check_types<at::BFloat16, float>("bf16, float boxes", calls, figures);
  check_types<at::BFloat16, at::BFloat16>("bf16", calls, figures);
  check_types<at::Half, at::Half>("fp16", calls, figures);
  check_types<float, double>("float, double boxes", calls, figures);
  std::printf(
      "lanes=%d calls=%" PRId64 " runs=%" PRId64 " rejected=%" PRId64 " error=%.3g\n",
      static_cast<int>(at::vec::Vectorized<float>::size()), figures.calls, figures.runs, figures.rejected,
      figures.error);
  return 0;
}
