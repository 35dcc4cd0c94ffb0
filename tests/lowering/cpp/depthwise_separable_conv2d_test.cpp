// Runs the kernel of depthwise_separable_conv2d.h against a plain loop in double, to be built with sanitizers.
//
// Each call runs for several tile sizes, memory formats of the result and numbers of threads, whose results must agree
// to the bit.  All memory is allocated to the exact size, so that AddressSanitizer sees any access beyond it; gaps
// between the elements of strided tensors are NaN, so that a read of one shows in the result; every output must be
// written exactly once.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "depthwise_separable_conv2d.h"

#include "harness.h"
#include "separable_convolutions.h"

#include <cinttypes>
#include <cmath>
#include <cstdio>

namespace {

using namespace harness;
using inductor_vision::DenseStore;
using inductor_vision::SeparableBlocking;

// What the operator is, in double; out[b][o][y][x], and for each a bound of the magnitudes that were added.
template <typename scalar_t>
void plain_loop(
    const Call& call, const Function& activation, const Tensors<scalar_t>& tensors, std::vector<double>& out,
    std::vector<double>& magnitude) {
  out.assign(call.batch * call.out_channels * call.out_pixels(), 0);
  magnitude.assign(out.size(), 0);
  std::vector<double> hidden(call.hidden()), bound(call.hidden());
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t p = 0; p < call.out_pixels(); ++p) {
      for (int64_t k = 0; k < call.hidden(); ++k) {
        double sum = call.depthwise_bias ? static_cast<double>(tensors.depthwise_bias[k]) : 0, terms = std::abs(sum);
        for (int64_t tap = 0; tap < call.taps(); ++tap) {
          const int64_t y =
              p / call.out(1) * call.stride[0] - call.padding[0] + tap / call.kernel[1] * call.dilation[0];
          const int64_t x =
              p % call.out(1) * call.stride[1] - call.padding[1] + tap % call.kernel[1] * call.dilation[1];
          if (y >= 0 && y < call.height && x >= 0 && x < call.width) {
            const double term = tensors.input(b, k / call.multiplier, y, x) *
                                static_cast<double>(tensors.depthwise_weight[k * call.taps() + tap]);
            sum += term;
            terms += std::abs(term);
          }
        }
        hidden[k] = activation.of(sum);
        bound[k] = 1 + (std::isfinite(terms) ? terms : 0);  // what is made of an infinite number is exact
      }
      for (int64_t o = 0; o < call.out_channels; ++o) {
        double sum = call.pointwise_bias ? static_cast<double>(tensors.pointwise_bias[o]) : 0, terms = std::abs(sum);
        for (int64_t k = 0; k < call.hidden(); ++k) {
          const double weight = static_cast<double>(tensors.pointwise_weight[o * call.hidden() + k]);
          sum += weight * hidden[k];
          terms += std::abs(weight) * bound[k];
        }
        const int64_t at = (b * call.out_channels + o) * call.out_pixels() + p;
        out[at] = sum;
        magnitude[at] = terms;
      }
    }
  }
}

// How a call runs: the result must not depend on it.
struct Setting {
  int64_t pixels;  // of SeparableBlocking
  int threads;
  bool channels_last;  // memory format of the result, if there is no activation: each is a kernel to compile
};
const Setting kSettings[] = {{96, 1, true}, {96, 2, false}, {1, 3, true}, {13, 5, false}, {kHuge, 3, false}};

// Runs the kernel once.
template <typename Activation, typename scalar_t>
Results<accumulate_t<scalar_t>> run(
    const Call& call, const std::string& kind, const DepthwiseSeparableConv2d<scalar_t>& op, const Setting& setting) {
  Results<accumulate_t<scalar_t>> out(call.batch, call.out_channels, call.out(0), call.out(1));
  omp_set_num_threads(setting.threads);
  const SeparableBlocking blocking{setting.pixels};
  const bool channels_last = setting.channels_last || !std::is_same_v<Activation, Identity>;
  const Sink<accumulate_t<scalar_t>> store{&out, channels_last};
  if (channels_last) {
    inductor_vision::depthwise_separable_conv2d<true>(op, NoExpansion{}, make<Activation>(), blocking, store);
  } else if constexpr (std::is_same_v<Activation, Identity>) {
    inductor_vision::depthwise_separable_conv2d<false>(op, NoExpansion{}, make<Activation>(), blocking, store);
  }
  std::string complaint;
  if (!out.written(1, &complaint)) {
    fail(call, kind, complaint);
  }
  return out;
}

// Runs it once with the store that lets it write the output itself; whether it writes the results of `first`.
template <bool kChannelsLast, typename Activation, typename scalar_t, typename acc_t>
bool same_in_place(
    const Call& call, const DepthwiseSeparableConv2d<scalar_t>& op, const Setting& setting,
    const Results<acc_t>& first) {
  const int64_t channels = call.out_channels, pixels = call.out_pixels();
  Results<acc_t> out(call.batch, channels, call.out(0), call.out(1));
  std::vector<acc_t> written(call.batch * pixels * channels, harness::poison<acc_t>());
  omp_set_num_threads(setting.threads);
  const DenseStore<kChannelsLast, acc_t> store{written.data(), channels, call.out(0), call.out(1)};
  const SeparableBlocking blocking{setting.pixels};
  inductor_vision::depthwise_separable_conv2d<kChannelsLast>(op, NoExpansion{}, make<Activation>(), blocking, store);
  for (int64_t b = 0; b < call.batch; ++b) {
    const inductor_vision::OutputBlock image{b, 0, channels, 0, call.out(0), 0, call.out(1)};
    out.add(kChannelsLast, image, written.data() + b * pixels * channels, store.distance());
  }
  return out.same_bits(first);
}

// One call against the plain loop and against itself.
template <typename Activation, typename scalar_t>
void check(const Call& call, const char* type, uint64_t seed, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  const Function activation = function_of<Activation>();
  const std::string kind = std::string(type) + " " + activation.name;
  const double tolerance = std::is_same_v<acc_t, double> ? 1e-14 : 4e-6;
  const Tensors<scalar_t> tensors(call, seed);
  const Packed<acc_t> packed(call, tensors);
  const DepthwiseSeparableConv2d<scalar_t> op = operation(call, tensors, packed);
  std::vector<double> expected, magnitude;
  plain_loop(call, activation, tensors, expected, magnitude);
  const Results<acc_t> first = run<Activation>(call, kind, op, kSettings[0]);
  for (size_t i = 0; i < expected.size(); ++i) {
    const double value = static_cast<double>(first.values()[i]), allowed = tolerance * (magnitude[i] + 1);
    if (!right(value, expected[i], allowed)) {
      fail(
          call, kind,
          "output " + std::to_string(i) + " is " + std::to_string(value) + ", expected " + std::to_string(expected[i]));
    }
    if (std::isfinite(expected[i])) {
      figures.error = std::max(figures.error, std::abs(value - expected[i]) / allowed);
    }
  }
  ++figures.calls;
  for (const Setting& setting : kSettings) {
    figures.runs += 2;
    bool same = run<Activation>(call, kind, op, setting).same_bits(first) &&
                same_in_place<true, Activation>(call, op, setting, first);
    if constexpr (std::is_same_v<Activation, Identity>) {  // each format is a kernel to compile
      same = same && same_in_place<false, Activation>(call, op, setting, first);
    }
    if (!same) {
      fail(
          call, kind,
          "the bits depend on memory format, tiles or threads (" + std::to_string(setting.pixels) + " pixels, " +
              std::to_string(setting.threads) + " threads)");
    }
  }
}

template <typename scalar_t, typename... Activations>
void check_type(const char* type, int random_calls, Figures& figures) {
  check_all({check<Activations, scalar_t>...}, kCalls, type, sizeof(scalar_t), random_calls, figures);
}

}  // namespace

int main(int argc, char** argv) {
  const int random_calls = argc > 1 ? std::atoi(argv[1]) : 40;
  Figures figures;
  // Of each type few, because each is a kernel to compile.
  check_type<float, Identity, Relu, Relu6, Identity, Prelu, Hardsigmoid, Identity, Hardswish, Silu, Identity, Gelu>(
      "float", random_calls, figures);
  check_type<double, Identity, Gelu>("double", random_calls, figures);
  check_type<at::BFloat16, Identity, Silu>("bf16", random_calls, figures);
  check_type<at::Half, Identity>("fp16", random_calls, figures);
  std::printf(
      "lanes=%d calls=%" PRId64 " runs=%" PRId64 " error=%.2g\n", static_cast<int>(at::vec::Vectorized<float>::size()),
      figures.calls, figures.runs, figures.error);
  return 0;
}
