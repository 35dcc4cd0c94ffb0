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

#include <cinttypes>
#include <cmath>
#include <cstdio>

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
using inductor_vision::DenseStore;
using inductor_vision::DepthwiseSeparableConv2d;
using inductor_vision::kPanel;
using inductor_vision::SeparableBlocking;

struct Call {
  int64_t batch, channels, multiplier, out_channels, height, width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  bool depthwise_bias, pointwise_bias;
  Layout input;
  bool hostile;  // some numbers are NaN or infinite

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
  int64_t hidden() const {
    return channels * multiplier;
  }
  int64_t out_pixels() const {
    return out(0) * out(1);
  }
  std::string describe() const {
    char text[400];
    std::snprintf(
        text, sizeof text,
        "batch %" PRId64 ", channels %" PRId64 " x %" PRId64 " -> %" PRId64 ", size %" PRId64 "x%" PRId64
        ", kernel %" PRId64 "x%" PRId64 ", stride %" PRId64 "x%" PRId64 ", padding %" PRId64 "x%" PRId64
        ", dilation %" PRId64 "x%" PRId64 ", biases %d and %d, input layout %d, hostile %d",
        batch, channels, multiplier, out_channels, height, width, kernel[0], kernel[1], stride[0], stride[1],
        padding[0], padding[1], dilation[0], dilation[1], depthwise_bias, pointwise_bias, static_cast<int>(input),
        hostile);
    return text;
  }
};

// Calls whose shapes sit at the edges of blocks of depth, panels, vectors and tiles.
const Call kCalls[] = {
    {2, 64, 1, 40, 6, 7, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, true, Layout::contiguous, false},
    {1, 300, 1, 8, 4, 5, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, true, Layout::channels_last, false},
    {1, 257, 2, 3, 3, 3, {2, 2}, {1, 1}, {0, 1}, {1, 1}, true, false, Layout::contiguous, false},
    {2, 17, 3, 33, 5, 6, {3, 3}, {2, 1}, {1, 2}, {1, 1}, false, true, Layout::sliced_channels_last, true},
    {1, 1, 8, 5, 7, 9, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, true, Layout::transposed, false},
    {1, 5, 1, 6, 3, 130, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, true, Layout::sliced, true},
    {1, 3, 1, 4, 2, 260, {1, 5}, {1, 2}, {0, 2}, {1, 1}, false, false, Layout::channels_last, false},
    {1, 4, 1, 6, 40, 1, {5, 5}, {1, 1}, {2, 2}, {1, 1}, true, false, Layout::contiguous, false},
    {0, 8, 1, 8, 4, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, true, Layout::contiguous, false},
    {1, 1, 1, 1, 1, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false, false, Layout::contiguous, true},
    {1, 6, 1, 5, 1, 1, {3, 3}, {1, 1}, {7, 6}, {1, 1}, true, true, Layout::channels_last, true},  // taps far outside
    {1, 3, 1, 4, 23, 6, {2, 2}, {5, 4}, {1, 0}, {1, 1}, true, true, Layout::contiguous, false},   // rows without taps
    {2, 20, 1, 18, 9, 8, {3, 2}, {1, 1}, {4, 3}, {3, 4}, true, true, Layout::contiguous, true},
    {4, 8, 1, 6, 4, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, true, Layout::expanded, false},
    {3, 34, 1, 16, 6, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, true, Layout::images_in_rows, false},
};

Call random_call(Random& random) {
  const int64_t most[] = {3, 3, 20, 70};
  const int64_t multipliers[] = {1, 1, 1, 2, 3};
  const int64_t longest[] = {3, 9, 9, 40};
  const Layout layouts[] = {Layout::contiguous,           Layout::channels_last,  Layout::sliced,
                            Layout::sliced_channels_last, Layout::images_in_rows, Layout::expanded};
  Call call{};
  do {
    call.batch = random.integer(1, 3);
    call.channels = random.integer(1, random.pick(most));
    call.multiplier = random.pick(multipliers);
    call.out_channels = random.integer(1, random.pick(most));
    if (random.integer(0, 2) == 0) {
      call.out_channels = 16 * random.integer(1, 3);  // whole panels
    }
    call.height = random.integer(1, random.pick(longest));
    call.width = random.integer(1, random.pick(longest));
    for (int axis = 0; axis < 2; ++axis) {
      call.kernel[axis] = random.integer(1, 5);
      call.stride[axis] = random.integer(1, 4);
      call.padding[axis] = random.integer(0, 6);
      call.dilation[axis] = random.integer(1, 3);
    }
    call.depthwise_bias = random.integer(0, 2) != 0;
    call.pointwise_bias = random.integer(0, 2) != 0;
    call.input = random.pick(layouts);
    call.hostile = random.integer(0, 2) == 0;
  } while (!call.fits() || call.out_pixels() > 400);
  return call;
}

// An activation of activations.h, and what it is of a double.
struct Function {
  const char* name;
  double (*of)(double);
};
template <typename Activation>
Function function_of();
#define FUNCTION(type, expression)                                  \
  template <>                                                       \
  Function function_of<type>() {                                    \
    return {#type, +[](double x) -> double { return expression; }}; \
  }
double clamp(double x, double high) {
  return x != x ? x : x < 0 ? 0 : x > high ? high : x;
}
using inductor_vision::Gelu;
using inductor_vision::Hardsigmoid;
using inductor_vision::Hardswish;
using inductor_vision::Identity;
using inductor_vision::LeakyRelu;
using inductor_vision::Relu;
using inductor_vision::Relu6;
using inductor_vision::Silu;
FUNCTION(Identity, x)
FUNCTION(Relu, clamp(x, kInf))
FUNCTION(Relu6, clamp(x, 6))
FUNCTION(LeakyRelu, x > 0 ? x : 0.01 * x)
FUNCTION(Hardsigmoid, clamp(x + 3, 6) / 6)
FUNCTION(Hardswish, x*(clamp(x + 3, 6) / 6))
FUNCTION(Silu, x / (1 + std::exp(-x)))
FUNCTION(Gelu, x * 0.5 * (1 + std::erf(x * std::sqrt(0.5))))
#undef FUNCTION

template <typename scalar_t>
struct Tensors {
  Tensor<scalar_t> input;
  std::vector<scalar_t> depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias;  // as the operator's

  Tensors(const Call& call, uint64_t seed) : input(call.batch, call.channels, call.height, call.width, call.input) {
    Random random(seed);
    const double bad[] = {kNaN, kInf, -kInf};
    input.fill([&](auto...) {
      return call.hostile && random.integer(0, 150) == 0 ? random.pick(bad) : random.uniform(-3, 3);
    });
    // One number of a weight is bad: then it shows which outputs it reaches.
    const auto numbers = [&](int64_t count, bool hostile) {
      std::vector<scalar_t> values(count);
      for (scalar_t& value : values) {
        value = harness::from_double<scalar_t>(random.uniform(-1.5, 1.5));
      }
      if (hostile && count > 0) {
        values[random.integer(0, count - 1)] = harness::from_double<scalar_t>(random.pick(bad));
      }
      return values;
    };
    depthwise_weight = numbers(call.hidden() * call.taps(), call.hostile && seed % 2 == 0);
    pointwise_weight = numbers(call.out_channels * call.hidden(), call.hostile && seed % 3 == 0);
    depthwise_bias = numbers(call.depthwise_bias ? call.hidden() : 0, false);
    pointwise_bias = numbers(call.pointwise_bias ? call.out_channels : 0, false);
  }
};

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

// Weights as the kernel wants them: hidden channels in the order [M][C].
template <typename acc_t>
struct Packed {
  std::vector<acc_t> depthwise_weight, depthwise_bias, pointwise_weight;

  template <typename scalar_t>
  Packed(const Call& call, const Tensors<scalar_t>& tensors)
      : depthwise_weight(call.taps() * call.hidden()),
        depthwise_bias(call.depthwise_bias ? call.hidden() : 0),
        pointwise_weight(inductor_vision::round_up(call.out_channels, kPanel<acc_t>) * call.hidden(), acc_t(0)) {
    for (int64_t k = 0; k < call.hidden(); ++k) {
      const int64_t to = k % call.multiplier * call.channels + k / call.multiplier;
      for (int64_t tap = 0; tap < call.taps(); ++tap) {
        depthwise_weight[tap * call.hidden() + to] =
            static_cast<acc_t>(tensors.depthwise_weight[k * call.taps() + tap]);
      }
      if (call.depthwise_bias) {
        depthwise_bias[to] = static_cast<acc_t>(tensors.depthwise_bias[k]);
      }
      for (int64_t o = 0; o < call.out_channels; ++o) {
        const int64_t panel = o / kPanel<acc_t>, lane = o % kPanel<acc_t>;
        pointwise_weight[(panel * call.hidden() + to) * kPanel<acc_t> + lane] =
            static_cast<acc_t>(tensors.pointwise_weight[o * call.hidden() + k]);
      }
    }
  }
};

template <typename scalar_t>
DepthwiseSeparableConv2d<scalar_t> operation(
    const Call& call, const Tensors<scalar_t>& tensors, const Packed<accumulate_t<scalar_t>>& packed) {
  return {
      tensors.input.view(),
      packed.depthwise_weight.data(),
      call.depthwise_bias ? packed.depthwise_bias.data() : nullptr,
      packed.pointwise_weight.data(),
      call.pointwise_bias ? tensors.pointwise_bias.data() : nullptr,
      call.batch,
      call.channels,
      call.height,
      call.width,
      call.multiplier,
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
  };
}

// How a call runs: the result must not depend on it.
struct Setting {
  int64_t pixels;  // of SeparableBlocking
  int threads;
  bool channels_last;  // memory format of the result, if there is no activation: each is a kernel to compile
};
const Setting kSettings[] = {{96, 1, true}, {96, 2, false}, {1, 3, true}, {13, 5, false}, {kHuge, 3, false}};

[[noreturn]] void fail(const Call& call, const std::string& kind, const std::string& what) {
  std::printf("%s: %s\n  in %s\n", kind.c_str(), what.c_str(), call.describe().c_str());
  std::exit(1);
}

// Whether the numbers are the same, or close.
bool right(double value, double expected, double allowed) {
  if (std::isfinite(expected)) {
    return std::abs(value - expected) <= allowed;
  }
  return std::isnan(expected) ? std::isnan(value) : value == expected;
}

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
    inductor_vision::depthwise_separable_conv2d<true, Activation>(op, blocking, store);
  } else if constexpr (std::is_same_v<Activation, Identity>) {
    inductor_vision::depthwise_separable_conv2d<false, Activation>(op, blocking, store);
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
  inductor_vision::depthwise_separable_conv2d<kChannelsLast, Activation>(op, SeparableBlocking{setting.pixels}, store);
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

// All calls, each with the next of the activations.
template <typename scalar_t, typename... Activations>
void check_type(const char* type, int random_calls, Figures& figures) {
  using Check = void (*)(const Call&, const char*, uint64_t, Figures&);
  const Check checks[] = {check<Activations, scalar_t>...};
  constexpr size_t kChecks = sizeof...(Activations);
  uint64_t seed = 1;
  for (const Call& call : kCalls) {
    checks[seed % kChecks](call, type, seed, figures);
    ++seed;
  }
  Random random(sizeof(scalar_t));
  for (int i = 0; i < random_calls; ++i, ++seed) {
    checks[seed % kChecks](random_call(random), type, seed, figures);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int random_calls = argc > 1 ? std::atoi(argv[1]) : 40;
  Figures figures;
  // Of each type few, because each is a kernel to compile.
  check_type<float, Identity, Relu, Relu6, Identity, LeakyRelu, Hardsigmoid, Identity, Hardswish, Silu, Identity, Gelu>(
      "float", random_calls, figures);
  check_type<double, Identity, Gelu>("double", random_calls, figures);
  check_type<at::BFloat16, Identity, Silu>("bf16", random_calls, figures);
  check_type<at::Half, Identity>("fp16", random_calls, figures);
  std::printf(
      "lanes=%d calls=%" PRId64 " runs=%" PRId64 " error=%.2g\n", static_cast<int>(at::vec::Vectorized<float>::size()),
      figures.calls, figures.runs, figures.error);
  return 0;
}
