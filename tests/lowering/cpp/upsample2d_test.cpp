// Runs the kernel of upsample2d.h against a plain loop, to be built with sanitizers.
//
// Each call runs to both memory formats and on several numbers of threads, which must give the same bits.  All memory
// is allocated to the exact size, so that AddressSanitizer sees any access beyond it; gaps between the elements of
// strided tensors are NaN, so that a read of one shows in the result.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "upsample2d.h"

#include <cinttypes>
#include <cstdio>

#include "harness.h"

namespace {

using harness::Figures;
using harness::kInf;
using harness::kLayouts;
using harness::kNaN;
using harness::Layout;
using harness::Numbers;
using harness::Random;
using harness::Results;
using harness::Sink;
using harness::Tensor;
using inductor_vision::accumulate_t;
using inductor_vision::Upsample2d;

// Around those of vectors, and of what is done together: channels, and rows of a band.
constexpr int64_t kChannels[] = {1, 2, 3, 3, 3, 4, 7, 8, 9, 15, 16, 17, 33};
constexpr int64_t kLengths[] = {1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 40};
constexpr int64_t kOutLengths[] = {1, 2, 3, 7, 9, 16, 17, 31, 32, 33, 65};
constexpr int64_t kPaddings[] = {0, 0, 1, 5, 34};
constexpr double kScales[] = {0, 0, 0, 0.5, 2, 3.3, 0.01, 1e-310, 1e300, kInf};

struct Call {
  int64_t batch, channels, height, width, out_height, out_width, below, right;
  bool align_corners;
  double scale_height, scale_width;
  Layout layout;
  bool hostile;  // NaN and infinite, here and there
  bool cubic;

  std::string describe() const {
    char text[300];
    std::snprintf(
        text, sizeof text,
        "%" PRId64 " x %" PRId64 " channels, %" PRId64 " x %" PRId64 " to %" PRId64 " x %" PRId64 ", padding %" PRId64
        " and %" PRId64 ", align_corners %d, scales %g and %g, layout %d, hostile %d, cubic %d",
        batch, channels, height, width, out_height, out_width, below, right, align_corners, scale_height, scale_width,
        static_cast<int>(layout), hostile, cubic);
    return text;
  }
};

[[noreturn]] void fail(const char* type, const std::string& what, const Call& call) {
  std::printf("%s: %s\n  in %s\n", type, what.c_str(), call.describe().c_str());
  std::exit(1);
}

struct Tap {
  int64_t index;
  double weight;
};

// What a place is made of.  Where it is, is rounded once, to acc_t.
template <typename acc_t>
std::vector<Tap> taps(int64_t at, int64_t source, int64_t size, const Call& call, double scale) {
  double where = 0;
  if (call.align_corners) {
    const acc_t step = size > 1 ? static_cast<acc_t>(source - 1) / static_cast<acc_t>(size - 1) : acc_t(0);
    where = static_cast<double>(static_cast<acc_t>(at) * step);
  } else {
    const double ratio = static_cast<double>(
        scale > 0 ? static_cast<acc_t>(1 / scale) : static_cast<acc_t>(source) / static_cast<acc_t>(size));
    where = static_cast<double>(static_cast<acc_t>(std::fma(ratio, static_cast<double>(at) + 0.5, -0.5)));
  }
  const double last = static_cast<double>(source - 1);
  const auto pixel = [&](double index) { return static_cast<int64_t>(std::min(std::max(index, 0.0), last)); };
  if (!call.cubic) {
    where = std::min(std::max(where, 0.0), last);
    const double whole = std::floor(where), part = static_cast<double>(static_cast<acc_t>(where - whole));
    return {{pixel(whole), 1 - part}, {pixel(whole + 1), part}};
  }
  const double whole = std::min(std::floor(where), last);
  const double part = std::min(std::max(static_cast<double>(static_cast<acc_t>(where - whole)), 0.0), 1.0);
  std::vector<Tap> taps;
  for (int i = -1; i <= 2; ++i) {
    const double x = std::abs(part - i), a = -0.75;
    const double weight = x <= 1 ? (a + 2) * x * x * x - (a + 3) * x * x + 1 : a * (x * x * x - 5 * x * x + 8 * x - 4);
    taps.push_back({pixel(whole + i), weight});
  }
  return taps;
}

template <typename scalar_t>
Numbers plain_loop(const Call& call, const Tensor<scalar_t>& input) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t rows = call.out_height + call.below, columns = call.out_width + call.right;
  Numbers out(call.batch * call.channels * rows * columns);
  for (int64_t i = 0; i < static_cast<int64_t>(out.sum.size()); ++i) {
    const int64_t b = i / columns / rows / call.channels, c = i / columns / rows % call.channels;
    const int64_t y = i / columns % rows, x = i % columns;
    if (y >= call.out_height || x >= call.out_width) {
      continue;
    }
    for (const Tap& row : taps<acc_t>(y, call.height, call.out_height, call, call.scale_height)) {
      for (const Tap& column : taps<acc_t>(x, call.width, call.out_width, call, call.scale_width)) {
        const double value = input(b, c, row.index, column.index);
        // Weights that are nearly zero have been rounded as differences of numbers of about 1.
        out.add(
            i, row.weight * column.weight * value,
            (std::abs(row.weight) + 1) * (std::abs(column.weight) + 1) * std::abs(value));
      }
    }
  }
  return out;
}

template <bool kChannelsLast, typename scalar_t>
Results<accumulate_t<scalar_t>> run(const char* type, const Call& call, const Tensor<scalar_t>& input, int threads) {
  const int64_t rows = call.out_height + call.below, columns = call.out_width + call.right;
  Results<accumulate_t<scalar_t>> out(call.batch, call.channels, rows, columns);
  omp_set_num_threads(threads);
  const Upsample2d<scalar_t> op{input.view(), call.batch,         call.channels,     call.height,
                                call.width,   call.out_height,    call.out_width,    rows,
                                columns,      call.align_corners, call.scale_height, call.scale_width};
  const Sink<accumulate_t<scalar_t>> sink{&out, kChannelsLast};
  if (call.cubic) {
    inductor_vision::upsample2d<inductor_vision::CubicTaps, kChannelsLast>(op, sink);
  } else {
    inductor_vision::upsample2d<inductor_vision::LinearTaps, kChannelsLast>(op, sink);
  }
  std::string complaint;
  if (!out.written(1, &complaint)) {
    fail(type, complaint, call);
  }
  return out;
}

template <typename scalar_t>
void check(const char* type, const Call& call, Random& random, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  Tensor<scalar_t> input(call.batch, call.channels, call.height, call.width, call.layout);
  input.fill([&](int64_t, int64_t, int64_t, int64_t) {
    const double hostile[] = {kNaN, kInf, -kInf};
    return call.hostile && random.integer(0, 9) == 0 ? random.pick(hostile) : random.uniform(-1, 1);
  });
  ++figures.calls;
  const Results<acc_t> first = run<false>(type, call, input, 1);
  const std::string complaint = harness::complaint_of<acc_t>(first.values(), plain_loop(call, input), 5e-7, figures);
  if (!complaint.empty()) {
    fail(type, complaint, call);
  }
  for (const int threads : {1, 2, 3}) {
    figures.runs += 2;
    for (const Results<acc_t>& out : {run<false>(type, call, input, threads), run<true>(type, call, input, threads)}) {
      if (!harness::same_bits(out.values(), first.values())) {
        fail(type, "other bits on " + std::to_string(threads) + " threads, or in another format", call);
      }
    }
  }
}

template <typename scalar_t>
void check_type(const char* type, int calls, Figures& figures) {
  Random random(sizeof(scalar_t) + 16 * std::is_same_v<scalar_t, at::Half>);
  for (int i = 0; i < calls; ++i) {
    const Call call{random.integer(0, 3),      random.pick(kChannels),   random.pick(kLengths),  random.pick(kLengths),
                    random.pick(kOutLengths),  random.pick(kOutLengths), random.pick(kPaddings), random.pick(kPaddings),
                    random.integer(0, 2) == 0, random.pick(kScales),     random.pick(kScales),   random.pick(kLayouts),
                    random.integer(0, 3) == 0, random.integer(0, 1) == 0};
    check<scalar_t>(type, call, random, figures);
  }
  // Channels that are resized in groups, the last of which is a smaller one.
  for (const bool cubic : {false, true}) {
    const Call wide{1, 70, 2, 60, 3, 90, 1, 2, false, 0, 0, Layout::contiguous, false, cubic};
    check<scalar_t>(type, wide, random, figures);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 50;
  Figures figures;
  check_type<float>("float", calls, figures);
  check_type<double>("double", calls, figures);
  check_type<at::BFloat16>("bf16", calls, figures);
  check_type<at::Half>("fp16", calls, figures);
  figures.print();
  return 0;
}
