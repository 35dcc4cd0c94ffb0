// Runs the kernels of grid_sampler_2d.h and its gradients against plain loops, to be built with sanitizers.
//
// Each call runs to both memory formats and on several numbers of threads, which must give the same bits.  All memory
// is allocated to the exact size, so that AddressSanitizer sees any access beyond it; gaps between the elements of
// strided tensors are NaN, so that a read of one shows in the result.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "grid_sampler_2d.h"
#include "grid_sampler_2d_backward.h"

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
using harness::Output;
using harness::Random;
using harness::Results;
using harness::Sink;
using harness::Tensor;
using inductor_vision::accumulate_t;
using inductor_vision::GridInterpolation;
using inductor_vision::GridPadding;
using inductor_vision::GridSampler2d;
using inductor_vision::GridSampler2dGradients;
using inductor_vision::Output4d;

// Around those of vectors, of slabs, and of tiles.
constexpr int64_t kChannels[] = {1, 1, 2, 3, 3, 7, 8, 9, 15, 16, 17, 33};
constexpr int64_t kLengths[] = {1, 2, 3, 7, 9, 17, 40};
constexpr int64_t kOutLengths[] = {0, 1, 2, 3, 9, 16, 17, 65, 130};
constexpr GridPadding kPaddings[] = {GridPadding::zeros, GridPadding::border, GridPadding::reflection};

struct Call {
  int64_t batch, channels, height, width, out_height, out_width;
  GridPadding padding;
  bool align_corners;
  Layout layout, grid_layout;
  double reach;  // of the grid, beyond 1
  bool hostile;  // NaN and infinite, here and there

  std::string describe() const {
    char text[300];
    std::snprintf(
        text, sizeof text,
        "%" PRId64 " x %" PRId64 " channels, %" PRId64 " x %" PRId64 " at %" PRId64 " x %" PRId64
        ", padding %d, align_corners %d, layouts %d and %d, reach %g, hostile %d",
        batch, channels, height, width, out_height, out_width, static_cast<int>(padding), align_corners,
        static_cast<int>(layout), static_cast<int>(grid_layout), reach, hostile);
    return text;
  }
};

[[noreturn]] void fail(const char* type, GridInterpolation mode, const std::string& what, const Call& call) {
  std::printf("%s, mode %d: %s\n  in %s\n", type, static_cast<int>(mode), what.c_str(), call.describe().c_str());
  std::exit(1);
}

// A tap along an axis: where, whether it is outside of the image, its weight, and how that changes with the coordinate.
struct Tap {
  int64_t at;
  bool outside;
  double weight, slope;
};

// The place in the padded image, and the derivative of that; NaN is the first pixel.
template <typename acc_t>
std::pair<acc_t, double> padded(acc_t place, int64_t size, const Call& call) {
  double slope = 1;
  const acc_t last = static_cast<acc_t>(size - 1);
  if (call.padding == GridPadding::zeros) {
    return {place, slope};
  }
  if (call.padding == GridPadding::reflection) {
    const acc_t low = call.align_corners ? acc_t(0) : acc_t(-0.5);
    const acc_t span = static_cast<acc_t>(2 * (call.align_corners ? size - 1 : size));
    if (span == 0) {
      return {acc_t(0), 0};
    }
    slope = place < low ? -1 : 1;
    const acc_t distance = std::abs(place - low);
    const acc_t extra = distance - std::trunc(distance / span) * span, back = span - extra;
    slope *= extra > back ? -1 : 1;
    place = std::isnan(extra) ? extra : std::min(extra, back) + low;
  }
  if (!(place > 0 && place < last)) {
    slope = 0;
  }
  return {std::isnan(place) ? acc_t(0) : std::min(std::max(place, acc_t(0)), last), slope};
}

double cubic(double distance) {
  const double a = -0.75, x = std::abs(distance);
  return x <= 1 ? ((a + 2) * x - (a + 3)) * x * x + 1 : ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
}

double cubic_slope(double distance) {
  const double a = -0.75, x = std::abs(distance), sign = distance < 0 ? -1 : 1;
  return sign * (x <= 1 ? (3 * (a + 2) * x - 2 * (a + 3)) * x : (3 * a * x - 10 * a) * x + 8 * a);
}

template <typename acc_t>
Tap tap_at(acc_t place, int64_t size, double weight, double slope) {
  const bool outside = !(place > acc_t(-1) && place < static_cast<acc_t>(size));
  return {outside ? 0 : static_cast<int64_t>(place), outside, weight, slope};
}

template <typename acc_t>
std::vector<Tap> taps(acc_t coordinate, int64_t size, GridInterpolation mode, const Call& call) {
  const acc_t scale = static_cast<acc_t>(call.align_corners ? size - 1 : size) / 2;
  const acc_t place = (coordinate + 1) * scale - (call.align_corners ? acc_t(0) : acc_t(0.5));
  const auto [inside, slope] = padded(place, size, call);
  if (mode == GridInterpolation::nearest) {
    return {tap_at(std::nearbyint(inside), size, 1, 0)};
  }
  if (mode == GridInterpolation::bilinear) {
    const acc_t first = std::floor(inside), fraction = inside - first;
    const double by_coordinate = slope * scale;
    return {tap_at(first, size, acc_t(1) - fraction, -by_coordinate), tap_at(first + 1, size, fraction, by_coordinate)};
  }
  const acc_t first = std::floor(place);
  const double fraction = place - first;
  std::vector<Tap> taps;
  for (int i = 0; i < 4; ++i) {
    const acc_t at = padded(first + static_cast<acc_t>(i - 1), size, call).first;
    const double distance = fraction + 1 - i;
    taps.push_back(tap_at(at, size, cubic(distance), cubic_slope(distance) * scale));
  }
  return taps;
}

template <typename scalar_t>
struct Sample {
  Tensor<scalar_t> input, grid, grad;
};

struct Expected {
  Numbers out, grad_input, grad_grid;
};

template <typename scalar_t>
Expected plain_loop(const Call& call, GridInterpolation mode, const Sample<scalar_t>& sample) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t out_pixels = call.out_height * call.out_width;
  Expected expected{
      Numbers(call.batch * call.channels * out_pixels), Numbers(call.batch * call.channels * call.height * call.width),
      Numbers(call.batch * 2 * out_pixels)};
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t i = 0; i < out_pixels; ++i) {
      const int64_t y = i / call.out_width, x = i % call.out_width;
      const auto rows = taps(static_cast<acc_t>(sample.grid(b, 1, y, x)), call.height, mode, call);
      const auto columns = taps(static_cast<acc_t>(sample.grid(b, 0, y, x)), call.width, mode, call);
      for (const Tap& row : rows) {
        for (const Tap& column : columns) {
          const bool outside = row.outside || column.outside;
          for (int64_t c = 0; c < call.channels; ++c) {
            const double pixel = outside ? 0 : sample.input(b, c, row.at, column.at), g = sample.grad(b, c, y, x);
            const int64_t plane = b * call.channels + c;
            const bool weighted = mode != GridInterpolation::nearest;
            // Cubic weights are small differences of large numbers: errors are those of a weight of 1.
            const auto add = [&](Numbers& numbers, int64_t at, double weight, double scale, double value) {
              const bool cubic = mode == GridInterpolation::bicubic;
              numbers.add(at, weight * value, std::abs((cubic ? scale : weight) * value));
            };
            add(expected.out, plane * out_pixels + i, weighted ? row.weight * column.weight : 1, 1, pixel);
            if (!outside) {
              const int64_t at = (plane * call.height + row.at) * call.width + column.at;
              add(expected.grad_input, at, row.weight * column.weight, 1, g);
            }
            if (weighted) {
              const double by_column = row.weight * column.slope, by_row = row.slope * column.weight;
              const double columns = static_cast<double>(call.width), rows = static_cast<double>(call.height);
              add(expected.grad_grid, b * 2 * out_pixels + i, by_column, columns, pixel * g);
              add(expected.grad_grid, (b * 2 + 1) * out_pixels + i, by_row, rows, pixel * g);
            }
          }
        }
      }
    }
  }
  return expected;
}

template <typename scalar_t>
GridSampler2d<scalar_t> operation(const Call& call, const Sample<scalar_t>& sample) {
  return {sample.input.view(), sample.grid.view(), call.batch,     call.channels, call.height,
          call.width,          call.out_height,    call.out_width, call.padding,  call.align_corners};
}

template <GridInterpolation kMode, bool kChannelsLast, typename scalar_t>
Results<accumulate_t<scalar_t>> run(const char* type, const Call& call, const Sample<scalar_t>& sample, int threads) {
  Results<accumulate_t<scalar_t>> out(call.batch, call.channels, call.out_height, call.out_width);
  omp_set_num_threads(threads);
  inductor_vision::grid_sampler_2d<kMode, kChannelsLast>(
      operation(call, sample), Sink<accumulate_t<scalar_t>>{&out, kChannelsLast});
  std::string complaint;
  if (!out.written(1, &complaint)) {
    fail(type, kMode, complaint, call);
  }
  return out;
}

template <typename scalar_t>
Output4d<scalar_t> written(const Output<scalar_t>& out, int64_t channels, int64_t height, int64_t width, bool last) {
  const int64_t image = channels * height * width;
  return last ? Output4d<scalar_t>{out.get(), image, 1, width * channels, channels}
              : Output4d<scalar_t>{out.get(), image, height * width, width, 1};
}

// The gradients by the images, contiguous or channels_last, and by the grid.
template <GridInterpolation kMode, typename scalar_t>
std::array<std::vector<scalar_t>, 2> run_backward(
    const Call& call, const Sample<scalar_t>& sample, bool channels_last, int threads) {
  const Output<scalar_t> input(call.batch * call.channels * call.height * call.width);
  const Output<scalar_t> grid(call.batch * 2 * call.out_height * call.out_width);
  omp_set_num_threads(threads);
  inductor_vision::grid_sampler_2d_backward<kMode>(
      operation(call, sample),
      GridSampler2dGradients<scalar_t>{
          sample.grad.view(), written(input, call.channels, call.height, call.width, channels_last),
          written(grid, 2, call.out_height, call.out_width, false)});
  std::vector<scalar_t> numbers = input.numbers();
  if (channels_last) {  // as contiguous
    const std::vector<scalar_t> lying = numbers;
    const int64_t pixels = call.height * call.width;
    for (size_t i = 0; i < lying.size(); ++i) {
      const int64_t image = i / (pixels * call.channels), pixel = i / call.channels % pixels, c = i % call.channels;
      numbers[(image * call.channels + c) * pixels + pixel] = lying[i];
    }
  }
  return {numbers, grid.numbers()};
}

template <GridInterpolation kMode, typename scalar_t>
void check(const char* type, const Call& call, Random& random, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  const double hostile[] = {kNaN, kInf, -kInf, 1e30, -1e30};
  const auto number = [&](double reach) {
    return call.hostile && random.integer(0, 19) == 0 ? random.pick(hostile) : random.uniform(-reach, reach);
  };
  Sample<scalar_t> sample{
      {call.batch, call.channels, call.height, call.width, call.layout},
      {call.batch, 2, call.out_height, call.out_width, call.grid_layout},
      {call.batch, call.channels, call.out_height, call.out_width, call.grid_layout}};
  sample.input.fill([&](int64_t, int64_t, int64_t, int64_t) { return number(1); });
  const double whole[] = {-1, 0, 1};
  sample.grid.fill([&](int64_t, int64_t, int64_t, int64_t) {
    return random.integer(0, 9) == 0 ? random.pick(whole) : number(1 + call.reach);
  });
  sample.grad.fill([&](int64_t, int64_t, int64_t, int64_t) { return random.uniform(-1, 1); });
  ++figures.calls;
  const Expected expected = plain_loop(call, kMode, sample);
  const auto agree = [&](const auto& numbers, const Numbers& want, double tolerance, const char* what) {
    const std::string complaint = harness::complaint_of<acc_t>(numbers, want, tolerance, figures);
    if (!complaint.empty()) {
      fail(type, kMode, what + complaint, call);
    }
  };
  const Results<acc_t> first = run<kMode, false>(type, call, sample, 1);
  agree(first.values(), expected.out, 5e-6, "");
  const auto gradients = run_backward<kMode>(call, sample, false, 1);
  // Sums of up to all of the samples, one after the other.
  agree(gradients[0], expected.grad_input, 3e-5, "gradient of the input: ");
  agree(gradients[1], expected.grad_grid, 3e-5, "gradient of the grid: ");
  for (const int threads : {1, 2, 3}) {
    figures.runs += 2;
    for (const Results<acc_t>& out :
         {run<kMode, false>(type, call, sample, threads), run<kMode, true>(type, call, sample, threads)}) {
      if (!harness::same_bits(out.values(), first.values())) {
        fail(type, kMode, "other bits on " + std::to_string(threads) + " threads, or in another format", call);
      }
    }
    const auto again = run_backward<kMode>(call, sample, threads == 2, threads);
    if (!harness::same_bits(again[0], gradients[0]) || !harness::same_bits(again[1], gradients[1])) {
      fail(type, kMode, "other bits of a gradient on " + std::to_string(threads) + " threads", call);
    }
  }
}

template <GridInterpolation kMode, typename scalar_t>
void check_type(const char* type, int calls, Figures& figures) {
  Random random(sizeof(scalar_t) + 16 * static_cast<int>(kMode));
  for (int i = 0; i < calls; ++i) {
    const Call call{random.integer(0, 3),   random.pick(kChannels),    random.pick(kLengths),
                    random.pick(kLengths),  random.pick(kOutLengths),  random.pick(kOutLengths),
                    random.pick(kPaddings), random.integer(0, 1) == 0, random.pick(kLayouts),
                    random.pick(kLayouts),  random.uniform(0, 3),      random.integer(0, 3) == 0};
    check<kMode, scalar_t>(type, call, random, figures);
  }
  // More channels than a block or a copy of the image has, more rows than a band.
  const Call large{1,   37,   90, 120, 20, 33, GridPadding::zeros, false, Layout::contiguous, Layout::contiguous,
                   0.2, false};
  check<kMode, scalar_t>(type, large, random, figures);
}

}  // namespace

// Each dtype and each mode of interpolation, but not all pairs, which would take long to compile.
int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 50;
  Figures figures;
  check_type<GridInterpolation::bilinear, float>("float", calls, figures);
  check_type<GridInterpolation::bicubic, float>("float", calls, figures);
  check_type<GridInterpolation::bilinear, double>("double", calls, figures);
  check_type<GridInterpolation::bilinear, at::BFloat16>("bf16", calls, figures);
  check_type<GridInterpolation::nearest, at::Half>("fp16", calls, figures);
  figures.print();
  return 0;
}
