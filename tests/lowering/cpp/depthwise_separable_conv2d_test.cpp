// Runs the kernel of depthwise_separable_conv2d.h against a plain loop in double, to be built with sanitizers.
//
// Each call runs for several tile sizes, memory formats of the result and numbers of threads, whose results must agree
// to the bit.  All memory is allocated to the exact size, so that AddressSanitizer sees any access beyond it; gaps
// between the elements of strided tensors are NaN, so that a read of one shows in the result; every output must be
// written exactly once.  Some run with an expansion, whose image has the layout of the call's input.
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
using inductor_vision::Expansion;
using inductor_vision::NoExpansion;
using inductor_vision::SeparableBlocking;

// What an expansion takes, and what it makes of it in double, with a bound of the magnitudes that were added.
template <typename scalar_t>
struct Image {
  using acc_t = accumulate_t<scalar_t>;
  int64_t channels;
  Tensor<scalar_t> pixels;
  std::vector<acc_t> weight, bias;                // [E][channels], [E]
  std::vector<acc_t> packed_weight, packed_bias;  // whole panels
  const Function& activation;

  Image(const Call& call, const Function& activation, uint64_t seed)
      : channels(1 + static_cast<int64_t>(seed % 19)),
        pixels(call.batch, channels, call.height, call.width, call.input),
        weight(call.channels * channels),
        bias(call.channels),
        packed_weight(inductor_vision::round_up(call.channels, kPanel<acc_t>) * channels, acc_t(0)),
        packed_bias(inductor_vision::round_up(call.channels, kPanel<acc_t>), acc_t(0)),
        activation(activation) {
    Random random(seed);
    pixels.fill([&](auto...) { return call.hostile && random.integer(0, 150) == 0 ? kNaN : random.uniform(-3, 3); });
    for (int64_t c = 0; c < call.channels; ++c) {
      packed_bias[c] = bias[c] = static_cast<acc_t>(random.uniform(-1, 1));
      for (int64_t i = 0; i < channels; ++i) {
        const int64_t at = (c / kPanel<acc_t> * channels + i) * kPanel<acc_t> + c % kPanel<acc_t>;
        packed_weight[at] = weight[c * channels + i] = static_cast<acc_t>(random.uniform(-1, 1));
      }
    }
  }
  double sum(int64_t b, int64_t c, int64_t y, int64_t x, double* terms) const {
    double sum = static_cast<double>(bias[c]);
    *terms = 1 + std::abs(sum);
    for (int64_t i = 0; i < channels; ++i) {
      const double term = static_cast<double>(weight[c * channels + i]) * pixels(b, i, y, x);
      sum += term;
      *terms += std::isfinite(term) ? std::abs(term) : 0;
    }
    return activation.of(sum);
  }
};

// What the operator is, in double; out[b][o][y][x], and for each a bound of the magnitudes that were added.
// `read(b, c, y, x, terms)` is what the depthwise convolution reads, and the magnitudes that are in it.
template <typename scalar_t, typename Read>
void plain_loop(
    const Call& call, const Function& activation, const Tensors<scalar_t>& tensors, const Read& read,
    std::vector<double>& out, std::vector<double>& magnitude) {
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
            double magnitude_read = 0;
            const double weight = static_cast<double>(tensors.depthwise_weight[k * call.taps() + tap]);
            sum += weight * read(b, k / call.multiplier, y, x, &magnitude_read);
            terms += std::abs(weight) * magnitude_read;
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
template <typename Activation, typename scalar_t, typename Expansion>
Results<accumulate_t<scalar_t>> run(
    const Call& call, const std::string& kind, const DepthwiseSeparableConv2d<scalar_t>& op, const Expansion& expansion,
    const Setting& setting) {
  Results<accumulate_t<scalar_t>> out(call.batch, call.out_channels, call.out(0), call.out(1));
  omp_set_num_threads(setting.threads);
  const SeparableBlocking blocking{setting.pixels};
  const bool channels_last = setting.channels_last || !std::is_same_v<Activation, Identity>;
  const Sink<accumulate_t<scalar_t>> store{&out, channels_last};
  if (channels_last) {
    inductor_vision::depthwise_separable_conv2d<true>(op, expansion, make<Activation>(), blocking, store);
  } else if constexpr (std::is_same_v<Activation, Identity>) {
    inductor_vision::depthwise_separable_conv2d<false>(op, expansion, make<Activation>(), blocking, store);
  }
  std::string complaint;
  if (!out.written(1, &complaint)) {
    fail(call, kind, complaint);
  }
  return out;
}

// Runs it once with the store that lets it write the output itself; whether it writes the results of `first`.
template <bool kChannelsLast, typename Activation, typename scalar_t, typename Expansion, typename acc_t>
bool same_in_place(
    const Call& call, const DepthwiseSeparableConv2d<scalar_t>& op, const Expansion& expansion, const Setting& setting,
    const Results<acc_t>& first) {
  const int64_t channels = call.out_channels, pixels = call.out_pixels();
  Results<acc_t> out(call.batch, channels, call.out(0), call.out(1));
  std::vector<acc_t> written(call.batch * pixels * channels, harness::poison<acc_t>());
  omp_set_num_threads(setting.threads);
  const DenseStore<kChannelsLast, acc_t> store{written.data(), channels, call.out(0), call.out(1)};
  const SeparableBlocking blocking{setting.pixels};
  inductor_vision::depthwise_separable_conv2d<kChannelsLast>(op, expansion, make<Activation>(), blocking, store);
  for (int64_t b = 0; b < call.batch; ++b) {
    const inductor_vision::OutputBlock image{b, 0, channels, 0, call.out(0), 0, call.out(1)};
    out.add(kChannelsLast, image, written.data() + b * pixels * channels, store.distance());
  }
  return out.same_bits(first);
}

// One call against the plain loop and against itself.
template <typename Activation, typename scalar_t, typename Expansion, typename Read>
void check_one(
    const Call& call, const std::string& kind, const Tensors<scalar_t>& tensors,
    const DepthwiseSeparableConv2d<scalar_t>& op, const Expansion& expansion, const Read& read, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  const double tolerance = std::is_same_v<acc_t, double> ? 1e-14 : 4e-6;
  std::vector<double> expected, magnitude;
  plain_loop(call, function_of<Activation>(), tensors, read, expected, magnitude);
  const Results<acc_t> first = run<Activation>(call, kind, op, expansion, kSettings[0]);
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
    bool same = run<Activation>(call, kind, op, expansion, setting).same_bits(first) &&
                same_in_place<true, Activation>(call, op, expansion, setting, first);
    if constexpr (std::is_same_v<Activation, Identity>) {  // each format is a kernel to compile
      same = same && same_in_place<false, Activation>(call, op, expansion, setting, first);
    }
    if (!same) {
      fail(
          call, kind,
          "the bits depend on memory format, tiles or threads (" + std::to_string(setting.pixels) + " pixels, " +
              std::to_string(setting.threads) + " threads)");
    }
  }
}

template <typename Activation, typename scalar_t>
void check(const Call& call, const char* type, uint64_t seed, Figures& figures) {
  const Tensors<scalar_t> tensors(call, seed);
  const Packed<accumulate_t<scalar_t>> packed(call, tensors);
  const std::string kind = std::string(type) + " " + function_of<Activation>().name;
  const auto read = [&](int64_t b, int64_t c, int64_t y, int64_t x, double* terms) {
    const double value = tensors.input(b, c, y, x);
    *terms = std::abs(value);
    return value;
  };
  check_one<Activation>(call, kind, tensors, operation(call, tensors, packed), NoExpansion{}, read, figures);
}

// With an expansion that has the same activation.
template <typename Activation, typename scalar_t>
void check_expanded(const Call& call, const char* type, uint64_t seed, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  const Tensors<scalar_t> tensors(call, seed);
  const Packed<acc_t> packed(call, tensors);
  const Function activation = function_of<Activation>();
  const Image<scalar_t> image(call, activation, seed);
  DepthwiseSeparableConv2d<scalar_t> op = operation(call, tensors, packed);
  op.input = image.pixels.view();
  const Expansion<acc_t, Activation> expansion{
      image.packed_weight.data(), image.packed_bias.data(), image.channels, make<Activation>()};
  const auto read = [&](auto... place) { return image.sum(place...); };
  const std::string kind = std::string(type) + " " + activation.name + ", expanded";
  check_one<Activation>(call, kind, tensors, op, expansion, read, figures);
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
  check_all(
      {check_expanded<Relu6, float>, check_expanded<Identity, float>, check_expanded<Hardswish, float>}, kCalls,
      "float", 1, random_calls, figures);
  check_all({check_expanded<Relu, double>}, kCalls, "double", 2, random_calls / 4, figures);
  check_all({check_expanded<Silu, at::BFloat16>}, kCalls, "bf16", 3, random_calls / 4, figures);
  check_type<double, Identity, Gelu>("double", random_calls, figures);
  check_type<at::BFloat16, Identity, Silu>("bf16", random_calls, figures);
  check_type<at::Half, Identity>("fp16", random_calls, figures);
  figures.print();
  return 0;
}
