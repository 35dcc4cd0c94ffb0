// Runs the kernels of deform_conv2d.h against a plain loop in double, to be built with sanitizers.
//
// Each call runs for several blockings and numbers of threads, whose results must agree to the bit.  All memory is
// allocated to the exact size, so that AddressSanitizer sees any access beyond it; gaps between the elements of strided
// tensors are NaN, so that a read of one shows in the result; every output must be written exactly once.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "deform_conv2d.h"

#include <cinttypes>
#include <cstdio>
#include <string>
#include <vector>

#include "harness.h"

namespace {

using harness::Figures;
using harness::kHuge;
using harness::kInf;
using harness::kNaN;
using harness::Layout;
using harness::Random;
using harness::Results;
using harness::Sink;
using harness::Tensor;
using inductor_vision::accumulate_t;
using inductor_vision::DeformBlocking;
using inductor_vision::DeformConv2d;
using inductor_vision::DeformKernel;
using inductor_vision::View4d;

// How a call runs, apart from the depth of its blocks: the result must not depend on it.
struct Setting {
  int64_t pixels, bytes;  // of DeformBlocking
  int threads;
  bool channels_last;  // memory format of the result
};
const Setting kSettings[] = {
    {96, int64_t{4} << 20, 1, false}, {96, int64_t{4} << 20, 2, true}, {1, 1, 3, false}, {13, 1500, 2, true},
    {kHuge, kHuge, 3, false},
};
// Each depth has an order of summation of its own.
const int64_t kDepths[] = {256, 40, 1, kHuge};

struct Call {
  int64_t batch, channels, height, width, out_channels;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t groups, offset_groups;
  bool mask, bias;
  Layout input, offset;
  bool hostile;

  int64_t out(int axis) const {
    const int64_t size = axis == 0 ? height : width;
    return (size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }
  bool fits() const {
    return height + 2 * padding[0] > dilation[0] * (kernel[0] - 1) &&
           width + 2 * padding[1] > dilation[1] * (kernel[1] - 1);
  }
  int64_t taps() const {
    return kernel[0] * kernel[1];
  }
  std::string describe() const {
    char text[400];
    std::snprintf(
        text, sizeof text,
        "batch %" PRId64 ", channels %" PRId64 " -> %" PRId64 ", size %" PRId64 "x%" PRId64 ", kernel %" PRId64
        "x%" PRId64 ", stride %" PRId64 "x%" PRId64 ", padding %" PRId64 "x%" PRId64 ", dilation %" PRId64 "x%" PRId64
        ", groups %" PRId64 ", offset groups %" PRId64
        ", mask %d, bias %d, input layout %d, offset layout %d, hostile %d",
        batch, channels, out_channels, height, width, kernel[0], kernel[1], stride[0], stride[1], padding[0],
        padding[1], dilation[0], dilation[1], groups, offset_groups, mask, bias, static_cast<int>(input),
        static_cast<int>(offset), hostile);
    return text;
  }
};

// The tensors of a call.
template <typename scalar_t>
struct Tensors {
  Tensor<scalar_t> input, offset, mask;
  std::vector<scalar_t> weight;  // [O, Cg, kH, kW]
  std::vector<scalar_t> bias;

  Tensors(const Call& call, bool shared, uint64_t seed)
      : input(call.batch, call.channels, call.height, call.width, call.input),
        offset(call.batch, 2 * call.offset_groups * call.taps(), call.out(0), call.out(1), call.offset),
        mask(call.batch, call.mask ? call.offset_groups * call.taps() : 0, call.out(0), call.out(1), call.offset),
        weight(call.out_channels * (call.channels / call.groups) * call.taps()),
        bias(call.bias ? call.out_channels : 0) {
    Random random(seed);
    input.fill([&](auto...) { return random.uniform(-1, 1); });
    mask.fill([&](auto...) { return random.uniform(0, 2); });
    offset.fill([&](int64_t, int64_t c, int64_t y, int64_t x) {
      const int axis = c % 2;
      const int64_t tap = c / 2 % call.taps(), size = axis == 0 ? call.height : call.width;
      const int64_t i = axis == 0 ? tap / call.kernel[1] : tap % call.kernel[1], p = axis == 0 ? y : x;
      const double here = static_cast<double>(p * call.stride[axis] - call.padding[axis] + i * call.dilation[axis]);
      const double border[] = {-2.0, -1.0, -0.75, 0.0, size - 1.0, size - 0.25, size + 0.0, size + 1.0};
      const double hostile[] = {kNaN, kInf, -kInf, 1e30, -1e30, 3e9, -3e9, 1e19, -1e19};
      switch (random.integer(0, 3)) {
        case 0:
          return random.pick(border) - here;
        case 1:
          return call.hostile ? random.pick(hostile) : random.uniform(-9, 9);
        default:
          return random.uniform(-2, 2);
      }
    });
    for (scalar_t& w : weight) {
      w = static_cast<scalar_t>(static_cast<float>(random.uniform(-1, 1)));
    }
    for (size_t i = call.taps(); shared && i < weight.size(); ++i) {
      weight[i] = weight[i - call.taps()];
    }
    for (scalar_t& b : bias) {
      b = static_cast<scalar_t>(static_cast<float>(random.uniform(-1, 1)));
    }
  }
};

// What the operator is, in double; out[b][o][y][x], and for each the sum of the magnitudes that were added.
template <typename scalar_t>
void plain_loop(
    const Call& call, const Tensors<scalar_t>& tensors, std::vector<double>& out, std::vector<double>& magnitude) {
  const int64_t group_channels = call.channels / call.groups, group_outputs = call.out_channels / call.groups;
  const int64_t out_pixels = call.out(0) * call.out(1);
  out.assign(call.batch * call.out_channels * out_pixels, 0);
  magnitude.assign(out.size(), 0);
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t p = 0; p < out_pixels; ++p) {
      const int64_t py = p / call.out(1), px = p % call.out(1);
      for (int64_t c = 0; c < call.channels; ++c) {
        for (int64_t tap = 0; tap < call.taps(); ++tap) {
          const int64_t at = c / (call.channels / call.offset_groups) * call.taps() + tap;
          const double y =
              static_cast<double>(py * call.stride[0] - call.padding[0] + tap / call.kernel[1] * call.dilation[0]) +
              tensors.offset(b, 2 * at, py, px);
          const double x =
              static_cast<double>(px * call.stride[1] - call.padding[1] + tap % call.kernel[1] * call.dilation[1]) +
              tensors.offset(b, 2 * at + 1, py, px);
          double value = 0;
          if (y > -1 && y < call.height && x > -1 && x < call.width) {
            for (int corner = 0; corner < 4; ++corner) {
              const int64_t row = static_cast<int64_t>(std::floor(y)) + corner / 2;
              const int64_t column = static_cast<int64_t>(std::floor(x)) + corner % 2;
              if (row >= 0 && row < call.height && column >= 0 && column < call.width) {
                value += (1 - std::abs(y - row)) * (1 - std::abs(x - column)) * tensors.input(b, c, row, column);
              }
            }
          }
          if (call.mask) {
            value *= tensors.mask(b, at, py, px);
          }
          const int64_t group = c / group_channels;
          for (int64_t o = group * group_outputs; o < (group + 1) * group_outputs; ++o) {
            const double term =
                value *
                static_cast<double>(tensors.weight[(o * group_channels + c % group_channels) * call.taps() + tap]);
            out[(b * call.out_channels + o) * out_pixels + p] += term;
            magnitude[(b * call.out_channels + o) * out_pixels + p] += std::abs(term);
          }
        }
      }
      for (int64_t o = 0; call.bias && o < call.out_channels; ++o) {
        out[(b * call.out_channels + o) * out_pixels + p] += static_cast<double>(tensors.bias[o]);
        magnitude[(b * call.out_channels + o) * out_pixels + p] += 1;
      }
    }
  }
}

// The weight as the kernel wants it, see DeformKernel.
template <DeformKernel kKernel, typename weight_t, typename scalar_t>
std::vector<weight_t> pack(const Call& call, const std::vector<scalar_t>& weight) {
  const int64_t taps = call.taps();
  if constexpr (kKernel == DeformKernel::shared) {
    return std::vector<weight_t>(weight.begin(), weight.begin() + taps);
  } else if constexpr (kKernel == DeformKernel::depthwise) {
    std::vector<weight_t> packed(taps * call.channels);
    for (int64_t c = 0; c < call.channels; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        packed[tap * call.channels + c] = static_cast<weight_t>(weight[c * taps + tap]);
      }
    }
    return packed;
  } else {
    constexpr int64_t lanes = inductor_vision::kPanel<accumulate_t<scalar_t>>;
    constexpr int64_t pair = std::is_same_v<weight_t, at::BFloat16> ? 2 : 1;
    const int64_t inputs = call.channels / call.groups, outputs = call.out_channels / call.groups;
    const int64_t panels = inductor_vision::divide_up(outputs, lanes);
    std::vector<weight_t> packed(call.groups * panels * taps * inputs * lanes, weight_t(0));
    for (int64_t o = 0; o < call.out_channels; ++o) {
      const int64_t group = o / outputs, panel = o % outputs / lanes, lane = o % outputs % lanes;
      for (int64_t c = 0; c < inputs; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t depth = ((group * panels + panel) * taps + tap) * inputs + c / pair * pair;
          packed[depth * lanes + lane * pair + c % pair] = static_cast<weight_t>(weight[(o * inputs + c) * taps + tap]);
        }
      }
    }
    return packed;
  }
}

template <typename scalar_t>
DeformConv2d<scalar_t> operation(const Call& call, const Tensors<scalar_t>& tensors) {
  return {
      tensors.input.view(),
      tensors.offset.view(),
      call.mask ? tensors.mask.view() : View4d<scalar_t>{nullptr, 0, 0, 0, 0},
      call.bias ? tensors.bias.data() : nullptr,
      call.batch,
      call.channels,
      call.height,
      call.width,
      call.out_channels,
      call.out(0),
      call.out(1),
      call.kernel[0],
      call.kernel[1],
      call.stride[0],
      call.stride[1],
      call.padding[0],
      call.padding[1],
      call.dilation[0],
      call.dilation[1],
      call.groups,
      call.offset_groups,
  };
}

[[noreturn]] void fail(const Call& call, const char* kind, const std::string& what) {
  std::printf("%s: %s\n  in %s\n", kind, what.c_str(), call.describe().c_str());
  std::exit(1);
}

// Runs the kernel once.
template <DeformKernel kKernel, bool kChannelsLast, typename scalar_t, typename weight_t>
Results<accumulate_t<scalar_t>> run(
    const Call& call, const char* kind, const DeformConv2d<scalar_t>& op, const std::vector<weight_t>& weight,
    const Setting& setting, int64_t depth) {
  Results<accumulate_t<scalar_t>> out(call.batch, call.out_channels, call.out(0), call.out(1));
  omp_set_num_threads(setting.threads);
  const DeformBlocking blocking{setting.pixels, depth, setting.bytes};
  const Sink<accumulate_t<scalar_t>> store{&out, kChannelsLast};
  inductor_vision::deform_conv2d<kChannelsLast, kKernel>(op, weight.data(), blocking, store);
  std::string complaint;
  if (!out.written(1, &complaint)) {
    fail(call, kind, complaint);
  }
  return out;
}

// One call, by one kernel, against the plain loop and against itself.
template <DeformKernel kKernel, typename scalar_t, typename weight_t>
void check(const Call& call, const char* kind, double tolerance, uint64_t seed, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  const Tensors<scalar_t> tensors(call, kKernel == DeformKernel::shared, seed);
  const std::vector<weight_t> weight = pack<kKernel, weight_t>(call, tensors.weight);
  const DeformConv2d<scalar_t> op = operation(call, tensors);
  std::vector<double> expected, magnitude;
  plain_loop(call, tensors, expected, magnitude);
  ++figures.calls;
  for (int64_t depth : kDepths) {
    const Results<acc_t> first = run<kKernel, false>(call, kind, op, weight, kSettings[0], depth);
    for (size_t i = 0; i < expected.size(); ++i) {
      const double error = std::abs(static_cast<double>(first.values()[i]) - expected[i]);
      const double allowed = tolerance * (magnitude[i] + 1);
      if (!(error <= allowed)) {
        fail(
            call, kind,
            "output " + std::to_string(i) + " is " + std::to_string(first.values()[i]) + ", expected " +
                std::to_string(expected[i]));
      }
      figures.error = std::max(figures.error, error / allowed);
    }
    ++figures.runs;
    for (const Setting& setting : kSettings) {
      if (&setting == kSettings) {
        continue;
      }
      const Results<acc_t> out = setting.channels_last ? run<kKernel, true>(call, kind, op, weight, setting, depth)
                                                       : run<kKernel, false>(call, kind, op, weight, setting, depth);
      ++figures.runs;
      if (!out.same_bits(first)) {
        fail(
            call, kind,
            "the bits depend on memory format, tiles or threads (" + std::to_string(setting.pixels) + " pixels, " +
                std::to_string(setting.threads) + " threads)");
      }
    }
    if (kKernel != DeformKernel::gemm) {
      break;  // no blocks of depth
    }
  }
}

// Calls whose shapes sit at the edges of blocks, panels, vectors and micro-tiles.
const Call kCalls[] = {
    {2, 64, 5, 6, 40, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1, true, true, Layout::contiguous, Layout::contiguous, false},
    {1,
     37,
     7,
     9,
     19,
     {3, 3},
     {1, 1},
     {1, 1},
     {1, 1},
     1,
     1,
     true,
     true,
     Layout::channels_last,
     Layout::contiguous,
     true},
    {2, 520, 3, 4, 5, {2, 2}, {1, 1}, {0, 1}, {1, 1}, 1, 4, true, false, Layout::contiguous, Layout::contiguous, false},
    {1, 600, 3, 4, 8, {1, 2}, {1, 1}, {0, 0}, {1, 1}, 4, 1, false, true, Layout::sliced, Layout::contiguous, false},
    {2, 256, 3, 3, 34, {3, 1}, {1, 1}, {1, 0}, {1, 1}, 2, 2, true, true, Layout::channels_last, Layout::sliced, false},
    {1, 1, 1, 1, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1, 1, false, false, Layout::contiguous, Layout::contiguous, true},
    {3, 3, 1, 1, 16, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1, true, true, Layout::contiguous, Layout::contiguous, true},
    {0, 8, 4, 4, 8, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1, true, true, Layout::contiguous, Layout::contiguous, false},
    {1, 4, 9, 200, 6, {1, 3}, {2, 1}, {0, 1}, {1, 2}, 2, 2, true, true, Layout::sliced, Layout::channels_last, true},
    {2, 8, 4, 4, 6, {2, 2}, {1, 1}, {1, 1}, {2, 2}, 1, 1, true, true, Layout::contiguous, Layout::transposed, false},
    {2, 8, 4, 2, 6, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1, 1, true, true, Layout::contiguous, Layout::transposed, false},
    {2,
     8,
     2,
     4,
     6,
     {3, 3},
     {1, 1},
     {1, 1},
     {1, 1},
     1,
     1,
     true,
     true,
     Layout::contiguous,
     Layout::images_in_rows,
     false},
    {2,
     8,
     2,
     2,
     6,
     {3, 3},
     {1, 1},
     {1, 1},
     {1, 1},
     1,
     1,
     true,
     true,
     Layout::images_in_rows,
     Layout::images_in_rows,
     false},
    {4, 8, 4, 4, 6, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1, true, true, Layout::expanded, Layout::expanded, false},
};

Call random_call(Random& random) {
  const int64_t few[] = {1, 1, 1, 2, 3, 4, 8};
  const int64_t most[] = {3, 3, 3, 40};
  const Layout layouts[] = {Layout::contiguous,           Layout::channels_last,  Layout::sliced,
                            Layout::sliced_channels_last, Layout::images_in_rows, Layout::expanded};
  const Layout offset_layouts[] = {
      Layout::contiguous, Layout::channels_last,  Layout::sliced,  Layout::sliced_channels_last,
      Layout::transposed, Layout::images_in_rows, Layout::expanded};
  Call call{};
  do {
    call.batch = random.integer(1, 4);
    call.groups = random.pick(few);
    call.offset_groups = random.pick(few);
    call.channels = call.groups * call.offset_groups * random.integer(1, random.pick(most));
    call.out_channels = call.groups * random.integer(1, random.pick(most));
    call.height = random.integer(1, 9);
    call.width = random.integer(1, 9);
    for (int axis = 0; axis < 2; ++axis) {
      call.kernel[axis] = random.integer(1, 3);
      call.stride[axis] = random.integer(1, 3);
      call.padding[axis] = random.integer(0, 3);
      call.dilation[axis] = random.integer(1, 3);
    }
    call.mask = random.integer(0, 2) != 0;
    call.bias = random.integer(0, 2) != 0;
    call.input = random.pick(layouts);
    call.offset = random.pick(offset_layouts);
    call.hostile = random.integer(0, 1) == 0;
  } while (!call.fits() || call.channels > 300);
  return call;
}

// A call and, with the same tensors' sizes, the depthwise ones.
template <typename scalar_t>
void check_all_kernels(Call call, const char* kind, uint64_t seed, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  const double tolerance = std::is_same_v<acc_t, double> ? 1e-13 : 2e-5;
  check<DeformKernel::gemm, scalar_t, acc_t>(call, kind, tolerance, seed, figures);
#if INDUCTOR_VISION_BF16_DOT
  if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
    if (call.channels / call.groups % 2 == 0) {
      check<DeformKernel::gemm, scalar_t, at::BFloat16>(call, "bf16 dot products", 8e-3, seed, figures);
    }
  }
#endif
  call.groups = call.out_channels = call.channels;
  check<DeformKernel::depthwise, scalar_t, acc_t>(call, kind, tolerance, seed, figures);
  check<DeformKernel::shared, scalar_t, acc_t>(call, kind, tolerance, seed, figures);
}

template <typename scalar_t>
void check_type(const char* kind, int random_calls, Figures& figures) {
  uint64_t seed = 1;
  for (const Call& call : kCalls) {
    check_all_kernels<scalar_t>(call, kind, seed++, figures);
  }
  Random random(sizeof(scalar_t));
  for (int i = 0; i < random_calls; ++i) {
    check_all_kernels<scalar_t>(random_call(random), kind, seed++, figures);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int random_calls = argc > 1 ? std::atoi(argv[1]) : 20;
  Figures figures;
  check_type<float>("float", random_calls, figures);
  check_type<double>("double", random_calls, figures);
  check_type<at::BFloat16>("bf16", random_calls, figures);
  check_type<at::Half>("fp16", random_calls, figures);
  std::printf(
      "lanes=%d bf16_dot=%d calls=%" PRId64 " runs=%" PRId64 " error=%.2g\n",
      static_cast<int>(at::vec::Vectorized<float>::size()), INDUCTOR_VISION_BF16_DOT, figures.calls, figures.runs,
      figures.error);
  return 0;
}
