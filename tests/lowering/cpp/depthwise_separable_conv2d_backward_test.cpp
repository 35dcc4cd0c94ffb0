// Runs the kernel of depthwise_separable_conv2d_backward.h against plain loops in double, to be built with sanitizers.
//
// Each call runs for several sizes of what is in cache, memory formats of the input's gradient, numbers of threads and
// sets of wanted results, which must all agree to the bit.  All memory is allocated to the exact size, so that
// AddressSanitizer sees any access beyond it; gaps between the elements of strided tensors are NaN, so that a read of
// one shows in the result; every element of what is wanted must be written.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "depthwise_separable_conv2d_backward.h"

#include "harness.h"
#include "separable_convolutions.h"

namespace {

using namespace harness;
using inductor_vision::SeparableBackwardBlocking;
using inductor_vision::SeparableGradients;

// What the results are, in double, channels in the order of the operator, [C * M].
struct Expected {
  Numbers input, weight, bias, slope, hidden;

  template <typename scalar_t>
  Expected(
      const Call& call, const Function& activation, const Tensors<scalar_t>& tensors,
      const std::vector<accumulate_t<scalar_t>>& grad_hidden)
      : input(call.batch * call.channels * call.height * call.width),
        weight(call.hidden() * call.taps()),
        bias(call.hidden()),
        slope(1),
        hidden(call.batch * call.out_pixels() * call.hidden()) {
    for (int64_t b = 0; b < call.batch; ++b) {
      for (int64_t p = 0; p < call.out_pixels(); ++p) {
        for (int64_t k = 0; k < call.hidden(); ++k) {
          add(call, activation, tensors, grad_hidden, b, p, k);
        }
      }
    }
  }

 private:
  template <typename scalar_t>
  void add(
      const Call& call, const Function& activation, const Tensors<scalar_t>& tensors,
      const std::vector<accumulate_t<scalar_t>>& grad_hidden, int64_t b, int64_t p, int64_t k) {
    const int64_t c = k / call.multiplier;
    // Calls f(tap, row, column) for those in the image.
    const auto for_taps = [&](const auto& f) {
      for (int64_t tap = 0; tap < call.taps(); ++tap) {
        const int64_t y = p / call.out(1) * call.stride[0] - call.padding[0] + tap / call.kernel[1] * call.dilation[0];
        const int64_t x = p % call.out(1) * call.stride[1] - call.padding[1] + tap % call.kernel[1] * call.dilation[1];
        if (y >= 0 && y < call.height && x >= 0 && x < call.width) {
          f(k * call.taps() + tap, y, x);
        }
      }
    };
    double sum = call.depthwise_bias ? static_cast<double>(tensors.depthwise_bias[k]) : 0, bound = std::abs(sum);
    for_taps([&](int64_t tap, int64_t y, int64_t x) {
      const double term = tensors.input(b, c, y, x) * static_cast<double>(tensors.depthwise_weight[tap]);
      sum += term;
      bound += std::abs(term);
    });
    const int64_t at = (b * call.out_pixels() + p) * call.hidden() + k;
    const double grad_of_hidden = static_cast<double>(grad_hidden[at]);
    const double grad = activation.gradient(sum, grad_of_hidden);
    // The error of `sum` is a part of it, and no second derivative is larger than 1.
    const double of_sum = std::abs(grad_of_hidden) * (1 + (std::isfinite(bound) ? bound : 0));
    const double grad_bound = std::abs(grad) + of_sum;
    hidden.add(at, activation.of(sum), 1 + bound);
    bias.add(k, grad, grad_bound);
    slope.add(0, sum > 0 ? 0 : grad_of_hidden * sum, of_sum);
    for_taps([&](int64_t tap, int64_t y, int64_t x) {
      const double w = static_cast<double>(tensors.depthwise_weight[tap]), value = tensors.input(b, c, y, x);
      weight.add(tap, grad * value, grad_bound * std::abs(value));
      const int64_t pixel = ((b * call.channels + c) * call.height + y) * call.width + x;
      input.add(pixel, grad * w, grad_bound * std::abs(w));
    });
  }
};

// How a call runs: the results must not depend on it.
struct Setting {
  int64_t bytes;  // of SeparableBackwardBlocking
  int threads;
  bool channels_last;                // memory format of the gradient of the input
  bool input, weight, bias, hidden;  // which results are wanted; the slope's with the bias's, of prelu
};
const Setting kSettings[] = {
    {1 << 18, 1, true, true, true, true, true},    {1 << 18, 2, false, true, true, true, true},
    {1, 3, true, true, false, true, false},        {5000, 5, false, true, true, false, true},
    {kHuge, 2, true, false, true, true, false},    {5000, 3, true, false, false, true, true},
    {1 << 14, 2, false, true, false, false, true}, {1, 2, true, false, false, false, true},
};

// Results in the order of the operator; empty where they are not wanted.
template <typename scalar_t>
struct Gradients {
  using acc_t = accumulate_t<scalar_t>;
  std::vector<scalar_t> input;
  std::vector<acc_t> weight, bias, slope, hidden;
};

// Of [..., M, C], [..., C, M].
template <typename T>
std::vector<T> by_channel(const Call& call, const std::vector<T>& values) {
  std::vector<T> result(values.size());
  for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
    const int64_t k = i % call.hidden();
    result[i - k + k % call.channels * call.multiplier + k / call.channels] = values[i];
  }
  return result;
}

template <typename Activation, typename scalar_t>
Gradients<scalar_t> run(
    const Call& call, const std::string& kind, const DepthwiseSeparableConv2d<scalar_t>& op,
    const std::vector<accumulate_t<scalar_t>>& grad_hidden, const Setting& setting) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t pixels = call.height * call.width;
  const Output<scalar_t> input(call.batch * call.channels * pixels);
  const Output<acc_t> weight(call.taps() * call.hidden()), bias(call.hidden()), slope(1);
  const Output<acc_t> hidden(call.batch * call.out_pixels() * call.hidden());
  const bool differentiates = setting.input || setting.weight || setting.bias;
  const bool has_slope = setting.bias && std::is_same_v<Activation, Prelu>;
  const SeparableGradients<scalar_t> gradients{
      differentiates ? grad_hidden.data() : nullptr, setting.channels_last,
      setting.input ? input.get() : nullptr,         setting.weight ? weight.get() : nullptr,
      setting.bias ? bias.get() : nullptr,           has_slope ? slope.get() : nullptr,
      setting.hidden ? hidden.get() : nullptr,
  };
  omp_set_num_threads(setting.threads);
  inductor_vision::depthwise_separable_conv2d_backward(
      op, make<Activation>(), gradients, SeparableBackwardBlocking{setting.bytes});

  Gradients<scalar_t> results;
  const auto taken = [&](const char* name, bool wanted, const auto& output, int64_t count) {
    auto numbers = wanted ? output.numbers() : std::decay_t<decltype(output.numbers())>();
    if (wanted && static_cast<int64_t>(numbers.size()) != count) {
      fail(call, kind, std::string("not all of ") + name + " is written");
    }
    return numbers;
  };
  results.input = taken("the gradient of the input", setting.input, input, call.batch * call.channels * pixels);
  if (setting.channels_last) {
    const std::vector<scalar_t> values = results.input;
    for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
      const int64_t c = i % call.channels, pixel = i / call.channels % pixels, b = i / call.channels / pixels;
      results.input[(b * call.channels + c) * pixels + pixel] = values[i];
    }
  }
  results.bias = by_channel(call, taken("the gradient of the bias", setting.bias, bias, call.hidden()));
  results.slope = taken("the gradient of the slope", has_slope, slope, 1);
  const int64_t count = call.batch * call.out_pixels() * call.hidden();
  results.hidden = by_channel(call, taken("hidden", setting.hidden, hidden, count));
  const auto by_tap =
      by_channel(call, taken("the gradient of the weight", setting.weight, weight, call.taps() * call.hidden()));
  results.weight.resize(by_tap.size());
  for (int64_t i = 0; i < static_cast<int64_t>(by_tap.size()); ++i) {
    results.weight[i % call.hidden() * call.taps() + i / call.hidden()] = by_tap[i];
  }
  return results;
}

template <typename acc_t, typename value_t>
void compare(
    const Call& call, const std::string& kind, const std::vector<value_t>& numbers, const Numbers& expected,
    Figures& figures) {
  const std::string complaint = harness::complaint_of<acc_t>(numbers, expected, 4e-6, figures);
  if (!complaint.empty()) {
    fail(call, kind, complaint);
  }
}

// One call against the plain loops and against itself.
template <typename Activation, typename scalar_t>
void check(const Call& call, const char* type, uint64_t seed, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  const Function activation = function_of<Activation>();
  const std::string kind = std::string(type) + " " + activation.name;
  const Tensors<scalar_t> tensors(call, seed, activation.has_kinks);
  const Packed<acc_t> packed(call, tensors);
  const DepthwiseSeparableConv2d<scalar_t> op = operation(call, tensors, packed);
  // In the order of the kernel, and in that of the operator.
  Random random(seed + 1);
  std::vector<acc_t> grad_hidden(call.batch * call.out_pixels() * call.hidden());
  const double bad[] = {kNaN, kInf, -kInf};
  for (acc_t& value : grad_hidden) {
    const bool spoiled = call.hostile && random.integer(0, 300) == 0;
    value = static_cast<acc_t>(spoiled ? random.pick(bad) : random.uniform(-2, 2));
  }
  const Expected expected(call, activation, tensors, by_channel(call, grad_hidden));

  const Gradients<scalar_t> first = run<Activation>(call, kind, op, grad_hidden, kSettings[0]);
  compare<acc_t>(call, kind + ", gradient of the input", first.input, expected.input, figures);
  compare<acc_t>(call, kind + ", gradient of the weight", first.weight, expected.weight, figures);
  compare<acc_t>(call, kind + ", gradient of the bias", first.bias, expected.bias, figures);
  if (std::is_same_v<Activation, Prelu>) {
    compare<acc_t>(call, kind + ", gradient of the slope", first.slope, expected.slope, figures);
  }
  compare<acc_t>(call, kind + ", hidden", first.hidden, expected.hidden, figures);
  ++figures.calls;
  for (const Setting& setting : kSettings) {
    ++figures.runs;
    const Gradients<scalar_t> other = run<Activation>(call, kind, op, grad_hidden, setting);
    if ((setting.input && !same_bits(other.input, first.input)) ||
        (setting.weight && !same_bits(other.weight, first.weight)) ||
        (setting.bias && !(same_bits(other.bias, first.bias) && same_bits(other.slope, first.slope))) ||
        (setting.hidden && !same_bits(other.hidden, first.hidden))) {
      fail(
          call, kind,
          "the bits depend on memory format, blocks, threads or what else is wanted (setting " +
              std::to_string(&setting - kSettings) + ")");
    }
  }
}

// Several bands, and several images in a chunk.
const Call kLargeCalls[] = {
    {1, 5, 1, 1, 45, 70, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, false, Layout::channels_last, false},
    {1, 40, 2, 1, 50, 7, {3, 5}, {2, 2}, {1, 2}, {1, 1}, true, false, Layout::contiguous, true},
    {1, 20, 1, 1, 70, 9, {3, 3}, {1, 1}, {4, 1}, {3, 1}, true, false, Layout::transposed, true},
    {1, 18, 1, 1, 90, 66, {2, 2}, {5, 4}, {1, 0}, {1, 1}, false, false, Layout::sliced, true},
    {75, 3, 2, 1, 5, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, false, Layout::contiguous, false},
    {70, 17, 1, 1, 3, 4, {2, 2}, {1, 1}, {0, 1}, {1, 1}, true, false, Layout::sliced, true},
    {2, 20, 1, 1, 6, 7, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, false, Layout::transposed, true},
};

template <typename scalar_t, typename... Activations>
void check_type(const char* type, int random_calls, Figures& figures) {
  std::vector<Call> calls = kCalls;
  calls.insert(calls.end(), std::begin(kLargeCalls), std::end(kLargeCalls));
  check_all({check<Activations, scalar_t>...}, calls, type, sizeof(scalar_t), random_calls, figures);
}

}  // namespace

int main(int argc, char** argv) {
  const int random_calls = argc > 1 ? std::atoi(argv[1]) : 40;
  Figures figures;
  // Of each type few, because each is a kernel to compile.
  check_type<float, Identity, Relu, Relu6, Prelu, Hardsigmoid, Hardswish, Silu, Gelu>("float", random_calls, figures);
  check_type<double, Silu>("double", random_calls, figures);
  check_type<at::BFloat16, Silu>("bf16", random_calls, figures);
  check_type<at::Half, Identity>("fp16", random_calls, figures);
  figures.print();
  return 0;
}
