// Runs the kernel of upsample_bilinear2d.h against a plain loop, to be built with sanitizers.
//
// Each call runs to both memory formats and on several numbers of threads, which must give the same bits.  All memory
// is allocated to the exact size, so that AddressSanitizer sees any access beyond it; gaps between the elements of
// strided tensors are NaN, so that a read of one shows in the result.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "upsample_bilinear2d.h"

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
using inductor_vision::UpsampleBilinear2d;

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

  std::string describe() const {
    char text[300];
    std::snprintf(
        text, sizeof text,
        "%" PRId64 " x %" PRId64 " channels, %" PRId64 " x %" PRId64 " to %" PRId64 " x %" PRId64 ", padding %" PRId64
        " and %" PRId64 ", align_corners %d, scales %g and %g, layout %d, hostile %d",
        batch, channels, height, width, out_height, out_width, below, right, align_corners, scale_height, scale_width,
        static_cast<int>(layout), hostile);
    return text;
  }
};

[[noreturn]] void fail(const char* type, const std::string& what, const Call& call) {
  std::printf("%s: %s\n  in %s\n", type, what.c_str(), call.describe().c_str());
  std::exit(1);
}

// Where a place is among the pixels of the input: its whole part, and its fraction.  Rounded once, to acc_t.
template <typename acc_t>
std::pair<int64_t, double> place(int64_t at, int64_t source, int64_t size, bool align_corners, double scale) {
  double where = 0;
  if (align_corners) {
    const acc_t step = size > 1 ? static_cast<acc_t>(source - 1) / static_cast<acc_t>(size - 1) : acc_t(0);
    where = static_cast<double>(static_cast<acc_t>(at) * step);
  } else {
    const double ratio = static_cast<double>(
        scale > 0 ? static_cast<acc_t>(1 / scale) : static_cast<acc_t>(source) / static_cast<acc_t>(size));
    where = static_cast<double>(static_cast<acc_t>(std::fma(ratio, static_cast<double>(at) + 0.5, -0.5)));
  }
  where = std::min(std::max(where, 0.0), static_cast<double>(source - 1));
  const double whole = std::floor(where);
  return {static_cast<int64_t>(whole), static_cast<double>(static_cast<acc_t>(where - whole))};
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
    const auto [row, down] = place<acc_t>(y, call.height, call.out_height, call.align_corners, call.scale_height);
    const auto [column, right] = place<acc_t>(x, call.width, call.out_width, call.align_corners, call.scale_width);
    for (int corner = 0; corner < 4; ++corner) {
      const double weight = (corner / 2 == 0 ? 1 - down : down) * (corner % 2 == 0 ? 1 - right : right);
      const int64_t at_row = std::min(row + corner / 2, call.height - 1);
      const int64_t at_column = std::min(column + corner % 2, call.width - 1);
      out.add(i, weight * input(b, c, at_row, at_column));
    }
  }
  return out;
}

template <bool kChannelsLast, typename scalar_t>
Results<accumulate_t<scalar_t>> run(const char* type, const Call& call, const Tensor<scalar_t>& input, int threads) {
  const int64_t rows = call.out_height + call.below, columns = call.out_width + call.right;
  Results<accumulate_t<scalar_t>> out(call.batch, call.channels, rows, columns);
  omp_set_num_threads(threads);
  const UpsampleBilinear2d<scalar_t> op{input.view(), call.batch,         call.channels,     call.height,
                                        call.width,   call.out_height,    call.out_width,    rows,
                                        columns,      call.align_corners, call.scale_height, call.scale_width};
  inductor_vision::upsample_bilinear2d<kChannelsLast>(op, Sink<accumulate_t<scalar_t>>{&out, kChannelsLast});
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
                    random.integer(0, 3) == 0};
    check<scalar_t>(type, call, random, figures);
  }
  // Channels that are resized in groups, the last of which is a smaller one.
  const Call wide{1, 70, 2, 60, 3, 90, 1, 2, false, 0, 0, Layout::contiguous, false};
  check<scalar_t>(type, wide, random, figures);
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 50;
  Figures figures;
  check_type<float>("float", calls, figures);
  check_type<double>("double", calls, figures);
  check_type<at::BFloat16>("bf16", calls, figures);
  check_type<at::Half>("fp16", calls, figures);
  std::printf(
      "lanes=%d calls=%" PRId64 " runs=%" PRId64 " error=%.3g\n", static_cast<int>(at::vec::Vectorized<float>::size()),
      figures.calls, figures.runs, figures.error);
  return 0;
}
