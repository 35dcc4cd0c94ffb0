// Runs the kernels of deform_conv2d.h against a plain loop in double, to be built with sanitizers.
//
// Each call runs for several blockings and numbers of threads, whose results must agree to the bit.  All memory is
// allocated to the exact size, so that AddressSanitizer sees any access beyond it; gaps between the elements of strided
// tensors are NaN, so that a read of one shows in the result; every output must be written exactly once.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "deform_conv2d.h"

#include "deform_convolutions.h"

namespace {

using harness::Call;
using harness::fail;
using harness::Figures;
using harness::kCalls;
using harness::kHuge;
using harness::Random;
using harness::Results;
using harness::Sink;
using harness::Tensors;
using inductor_vision::accumulate_t;
using inductor_vision::DeformBlocking;
using inductor_vision::DeformConv2d;
using inductor_vision::DeformKernel;

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
  const DeformConv2d<scalar_t> op = harness::operation(call, tensors);
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
    check_all_kernels<scalar_t>(harness::random_call(random), kind, seed++, figures);
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
