// Calls of the kernels of depthwise-separable convolutions: shapes, layouts, activations and tensors.
#ifndef INDUCTOR_VISION_TEST_SEPARABLE_CONVOLUTIONS_H
#define INDUCTOR_VISION_TEST_SEPARABLE_CONVOLUTIONS_H

#include "depthwise_separable_conv2d.h"
#include "harness.h"

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

namespace harness {

using inductor_vision::accumulate_t;
using inductor_vision::DepthwiseSeparableConv2d;
using inductor_vision::kPanel;

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
inline const std::vector<Call> kCalls = {
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

inline Call random_call(Random& random) {
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

// An activation of activations.h: what it is of a double, and the gradient of that from the gradient of its result.
struct Function {
  const char* name;
  double (*of)(double x);
  double (*gradient)(double x, double grad);
  bool has_kinks;
};
template <typename Activation>
Function function_of();
#define FUNCTION(type, has_kinks, expression, gradient)        \
  template <>                                                  \
  inline Function function_of<type>() {                        \
    return {                                                   \
        #type, +[](double x) -> double { return expression; }, \
        +[](double x, double grad) -> double {                 \
          (void)x;                                             \
          return gradient;                                     \
        },                                                     \
        has_kinks};                                            \
  }
inline double clamp(double x, double high) {
  return x != x ? x : x < 0 ? 0 : x > high ? high : x;
}
inline double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}
using inductor_vision::Gelu;
using inductor_vision::GeluTanh;
using inductor_vision::Hardsigmoid;
using inductor_vision::Hardswish;
using inductor_vision::Identity;
using inductor_vision::Mish;
using inductor_vision::Prelu;
using inductor_vision::Relu;
using inductor_vision::Relu6;
using inductor_vision::Selu;
using inductor_vision::Sigmoid;
using inductor_vision::Silu;
using inductor_vision::Softsign;
using inductor_vision::Tanh;
struct Parameters {
  static constexpr double negative_slope() {
    return 0.3;
  }
  static constexpr double min_val() {
    return -0.5;
  }
  static constexpr double max_val() {
    return 2;
  }
  static constexpr double alpha() {
    return 0.7;
  }
  static constexpr double beta() {
    return 1.5;
  }
  static constexpr double threshold() {
    return 3;
  }
};
using LeakyRelu = inductor_vision::LeakyRelu<Parameters>;
using Hardtanh = inductor_vision::Hardtanh<Parameters>;
using Elu = inductor_vision::Elu<Parameters>;
using Celu = inductor_vision::Celu<Parameters>;
using Softplus = inductor_vision::Softplus<Parameters>;
const double kSeluAlpha = 1.6732632423543772848, kSeluScale = 1.0507009873554804934;
// With the parameters above.
template <typename Activation>
Activation make() {
  if constexpr (std::is_same_v<Activation, Prelu>) {
    return {Parameters::negative_slope()};
  } else {
    return {};
  }
}
inline double tanh_of_softplus(double x) {
  return std::tanh(std::log1p(std::exp(x)));
}
inline double tanh_of_cube(double x) {
  return std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x));
}
// Of the tangent.
inline double slope_of_cube(double x) {
  const double tangent = tanh_of_cube(x);
  return (1 - tangent * tangent) * std::sqrt(2 / std::acos(-1.0)) * (1 + 3 * 0.044715 * x * x);
}
FUNCTION(Identity, false, x, grad)
FUNCTION(Relu, true, clamp(x, kInf), x <= 0 ? 0 : grad)
FUNCTION(Relu6, true, clamp(x, 6), x <= 0 || x >= 6 ? 0 : grad)
FUNCTION(LeakyRelu, true, x > 0 ? x : 0.3 * x, x > 0 ? grad : 0.3 * grad)
FUNCTION(Prelu, true, x > 0 ? x : 0.3 * x, x > 0 ? grad : 0.3 * grad)
FUNCTION(Hardtanh, true, x != x ? x : std::clamp(x, -0.5, 2.0), x <= -0.5 || x >= 2 ? 0 : grad)
FUNCTION(Elu, true, x <= 0 ? 0.7 * std::expm1(x) : x, x <= 0 ? 0.7 * grad * std::exp(x) : grad)
FUNCTION(
    Selu, true, kSeluScale*(x <= 0 ? kSeluAlpha * std::expm1(x) : x),
    grad * kSeluScale * (x <= 0 ? kSeluAlpha * std::exp(x) : 1))
FUNCTION(Celu, false, x <= 0 ? 0.7 * std::expm1(x / 0.7) : x, x <= 0 ? grad * std::exp(x / 0.7) : grad)
FUNCTION(
    Softplus, true, 1.5 * x > 3 ? x : std::log1p(std::exp(1.5 * x)) / 1.5, 1.5 * x > 3 ? grad : grad * sigmoid(1.5 * x))
FUNCTION(Softsign, false, x / (1 + std::abs(x)), grad / ((1 + std::abs(x)) * (1 + std::abs(x))))
FUNCTION(Hardsigmoid, true, clamp(x + 3, 6) / 6, x > -3 && x < 3 ? grad / 6 : 0)
FUNCTION(Hardswish, true, x*(clamp(x + 3, 6) / 6), x <= -3 ? 0 : x < 3 ? grad * (x / 3 + 0.5) : grad)
FUNCTION(Sigmoid, false, sigmoid(x), grad* sigmoid(x) * (1 - sigmoid(x)))
FUNCTION(Tanh, false, std::tanh(x), grad * (1 - std::tanh(x) * std::tanh(x)))
FUNCTION(
    Mish, false, x* tanh_of_softplus(x),
    grad*(tanh_of_softplus(x) + x * (1 - tanh_of_softplus(x) * tanh_of_softplus(x)) * sigmoid(x)))
FUNCTION(Silu, false, x / (1 + std::exp(-x)), grad* sigmoid(x) * (1 + x * (1 - sigmoid(x))))
FUNCTION(
    Gelu, false, x * 0.5 * (1 + std::erf(x * std::sqrt(0.5))),
    grad * (0.5 * (1 + std::erf(x * std::sqrt(0.5))) + x * (std::exp(-0.5 * x * x) / std::sqrt(8 * std::atan(1)))))
FUNCTION(
    GeluTanh, false, x * 0.5 * (1 + tanh_of_cube(x)), grad * (0.5 * (1 + tanh_of_cube(x)) + 0.5 * x * slope_of_cube(x)))
#undef FUNCTION

template <typename scalar_t>
struct Tensors {
  Tensor<scalar_t> input;
  std::vector<scalar_t> depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias;  // as the operator's

  // `integers`: then sums are exact, and meet the kinks of activations.
  Tensors(const Call& call, uint64_t seed, bool integers = false)
      : input(call.batch, call.channels, call.height, call.width, call.input) {
    Random random(seed);
    const double bad[] = {kNaN, kInf, -kInf};
    const auto number = [&](double most) {
      return integers ? static_cast<double>(random.integer(-1, 1)) : random.uniform(-most, most);
    };
    input.fill([&](auto...) { return call.hostile && random.integer(0, 150) == 0 ? random.pick(bad) : number(3); });
    // One number of a weight is bad: then it shows which outputs it reaches.
    const auto numbers = [&](int64_t count, bool hostile) {
      std::vector<scalar_t> values(count);
      for (scalar_t& value : values) {
        value = from_double<scalar_t>(number(1.5));
      }
      if (hostile && count > 0) {
        values[random.integer(0, count - 1)] = from_double<scalar_t>(random.pick(bad));
      }
      return values;
    };
    depthwise_weight = numbers(call.hidden() * call.taps(), call.hostile && seed % 2 == 0);
    pointwise_weight = numbers(call.out_channels * call.hidden(), call.hostile && seed % 3 == 0);
    depthwise_bias = numbers(call.depthwise_bias ? call.hidden() : 0, false);
    pointwise_bias = numbers(call.pointwise_bias ? call.out_channels : 0, false);
  }
};

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

[[noreturn]] inline void fail(const Call& call, const std::string& kind, const std::string& what) {
  std::printf("%s: %s\n  in %s\n", kind.c_str(), what.c_str(), call.describe().c_str());
  std::exit(1);
}

// Whether the numbers are the same, or close.
inline bool right(double value, double expected, double allowed) {
  if (std::isfinite(expected)) {
    return std::abs(value - expected) <= allowed;
  }
  return std::isnan(expected) ? std::isnan(value) : value == expected;
}

using Check = void (*)(const Call&, const char* type, uint64_t seed, Figures&);

// The calls and some of random shape, each with the next of the checks, of which there is one for each activation.
inline void check_all(
    const std::vector<Check>& checks, const std::vector<Call>& calls, const char* type, uint64_t random_seed,
    int random_calls, Figures& figures) {
  uint64_t seed = 1;
  for (const Call& call : calls) {
    checks[seed % checks.size()](call, type, seed, figures);
    ++seed;
  }
  Random random(random_seed);
  for (int i = 0; i < random_calls; ++i, ++seed) {
    checks[seed % checks.size()](random_call(random), type, seed, figures);
  }
}

}  // namespace harness

#endif  // INDUCTOR_VISION_TEST_SEPARABLE_CONVOLUTIONS_H
