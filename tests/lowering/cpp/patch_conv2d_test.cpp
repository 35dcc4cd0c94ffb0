// Runs the kernels of patch_conv2d.h and patch_conv2d_backward.h against plain loops in double, to be built with
// sanitizers.
//
// Each call is run for several sizes of blocks, numbers of threads and memory orders of the result, whose bits must
// agree.  All memory is allocated to the exact size, so that AddressSanitizer sees any access beyond it; gaps between
// the elements of strided tensors are NaN, so that a read of one shows in the result; every output must be written
// exactly once, or, where memory is written, at all.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "patch_conv2d_backward.h"

#include "harness.h"

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

namespace {

using harness::Figures;
using harness::from_double;
using harness::kHuge;
using harness::kInf;
using harness::kNaN;
using harness::Numbers;
using harness::Output;
using harness::poison;
using harness::Random;
using harness::Results;
using harness::same_bits;
using harness::Sink;
using inductor_vision::accumulate_t;
using inductor_vision::PatchBlocking;
using inductor_vision::PatchConv2d;
using inductor_vision::PatchGradients;
using inductor_vision::PatchOrder;
using inductor_vision::PatchView;

// How much of a group is in cache: all of it, single rows of 16 channels (8 of double), something between.
const int64_t kBytes[] = {kHuge, 1, 6000};

// How a run may differ from another without a bit of the result changing.
struct Setting {
  int threads;
  PatchOrder order;
};
const Setting kFirst{1, PatchOrder::patches_first};
const Setting kOthers[] = {
    {2, PatchOrder::channels_last}, {3, PatchOrder::channels_first}, {5, PatchOrder::patches_first}};

// Dimensions in the order in which they are in memory, slowest first, with gaps or without.
struct Layout {
  const char* name;
  int order[5];
  bool gaps;
};
const Layout kLayouts[] = {
    {"patches_first", {0, 1, 2, 3, 4}, false},
    {"channels_first", {0, 2, 1, 3, 4}, false},
    {"channels_last", {0, 1, 3, 4, 2}, false},
    {"transposed", {0, 1, 2, 4, 3}, false},
    {"patches_last", {0, 2, 3, 4, 1}, false},
    {"images_inside", {1, 0, 2, 3, 4}, false},
    {"sliced", {0, 1, 2, 3, 4}, true},
    {"sliced_channels_first", {0, 2, 1, 3, 4}, true},
    {"sliced_channels_last", {0, 1, 3, 4, 2}, true},
};
constexpr int kExpanded = std::size(kLayouts);  // one patch for all

struct Call {
  int64_t batch, patches, channels, height, width, out_channels;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t groups;
  bool bias;
  int input, grad;  // layouts
  bool wild;        // some numbers of the input and of the gradient are infinite or NaN

  int64_t out(int axis) const {
    const int64_t size = axis == 0 ? height : width;
    return (size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }
  int64_t out_pixels() const {
    return out(0) * out(1);
  }
  bool fits() const {
    return height + 2 * padding[0] > dilation[0] * (kernel[0] - 1) &&
           width + 2 * padding[1] > dilation[1] * (kernel[1] - 1);
  }
  int64_t taps() const {
    return kernel[0] * kernel[1];
  }
  std::string describe() const {
    const auto name = [](int layout) { return layout == kExpanded ? "expanded" : kLayouts[layout].name; };
    char text[400];
    std::snprintf(
        text, sizeof text,
        "batch %" PRId64 " of %" PRId64 ", channels %" PRId64 " -> %" PRId64 ", size %" PRId64 "x%" PRId64
        ", kernel %" PRId64 "x%" PRId64 ", stride %" PRId64 "x%" PRId64 ", padding %" PRId64 "x%" PRId64
        ", dilation %" PRId64 "x%" PRId64 ", groups %" PRId64 ", bias %d, input %s, gradient %s, wild %d",
        batch, patches, channels, out_channels, height, width, kernel[0], kernel[1], stride[0], stride[1], padding[0],
        padding[1], dilation[0], dilation[1], groups, bias, name(input), name(grad), wild);
    return text;
  }
};

[[noreturn]] void fail(const Call& call, const std::string& kind, const std::string& what) {
  std::printf("%s: %s\n  in %s\n", kind.c_str(), what.c_str(), call.describe().c_str());
  std::exit(1);
}

// A [batch, patches, channels, height, width] tensor on a buffer that ends with its last element.
template <typename scalar_t>
class Patches {
 public:
  template <typename Value>
  Patches(const std::array<int64_t, 5>& size, int layout, const Value& value) : strides_{} {
    if (layout != kExpanded) {
      int64_t stride = 1;
      for (int i = 4; i >= 0; --i) {
        const int d = kLayouts[layout].order[i];
        stride += kLayouts[layout].gaps && i == 4 ? 1 : 0;
        strides_[d] = stride;
        stride *= size[d] + (kLayouts[layout].gaps ? i % 3 : 0);
      }
    } else {
      strides_ = {0, 0, size[3] * size[4], size[4], 1};
    }
    int64_t elements = 1;
    for (int d = 0; d < 5; ++d) {
      elements = size[d] == 0 ? 0 : elements + (elements > 0 ? (size[d] - 1) * strides_[d] : 0);
    }
    data_.reset(new scalar_t[elements]);
    std::fill_n(data_.get(), elements, poison<scalar_t>());
    for (int64_t b = 0; b < size[0]; ++b) {
      for (int64_t n = 0; n < size[1]; ++n) {
        for (int64_t i = 0; i < size[2] * size[3] * size[4]; ++i) {
          data_[at(b, n, i / (size[3] * size[4]), i / size[4] % size[3], i % size[4])] = from_double<scalar_t>(value());
        }
      }
    }
  }
  double operator()(int64_t b, int64_t n, int64_t c, int64_t y, int64_t x) const {
    return static_cast<double>(data_[at(b, n, c, y, x)]);
  }
  PatchView<scalar_t> view() const {
    return {data_.get(), strides_[0], strides_[1], strides_[2], strides_[3], strides_[4]};
  }

 private:
  int64_t at(int64_t b, int64_t n, int64_t c, int64_t y, int64_t x) const {
    return b * strides_[0] + n * strides_[1] + c * strides_[2] + y * strides_[3] + x * strides_[4];
  }
  std::array<int64_t, 5> strides_;
  std::unique_ptr<scalar_t[]> data_;
};

template <typename scalar_t>
struct Tensors {
  Random random;
  Patches<scalar_t> input, grad;
  std::vector<scalar_t> weight;  // [O, Cg, kH, kW]
  std::vector<scalar_t> bias;

  Tensors(const Call& call, uint64_t seed)
      : random(seed),
        input(
            {call.batch, call.patches, call.channels, call.height, call.width}, call.input,
            [&] { return number(call.wild, call.channels * call.height * call.width); }),
        grad(
            {call.batch, call.patches, call.out_channels, call.out(0), call.out(1)}, call.grad,
            [&] { return number(call.wild, call.out_channels * call.out_pixels()); }),
        weight(call.out_channels * (call.channels / call.groups) * call.taps()),
        bias(call.bias ? call.out_channels : 0) {
    for (auto* values : {&weight, &bias}) {
      for (scalar_t& value : *values) {
        value = from_double<scalar_t>(random.uniform(-1, 1));
      }
    }
  }

 private:
  double number(bool wild, int64_t rare) {
    const double numbers[] = {kNaN, kInf, -kInf};
    return wild && random.integer(1, rare) == 1 ? random.pick(numbers) : random.uniform(-1, 1);
  }
};

// The results and the gradients: out[b][n][o][y][x], likewise the others.
struct Expected {
  Numbers out, input, weight, bias;

  template <typename scalar_t>
  Expected(const Call& call, const Tensors<scalar_t>& tensors)
      : out(call.batch * call.patches * call.out_channels * call.out_pixels()),
        input(call.batch * call.patches * call.channels * call.height * call.width),
        weight(call.out_channels * (call.channels / call.groups) * call.taps()),
        bias(call.out_channels) {
    const int64_t inputs = call.channels / call.groups, outputs = call.out_channels / call.groups;
    for (int64_t i = 0; i < static_cast<int64_t>(out.sum.size()); ++i) {
      const int64_t x = i % call.out(1), y = i / call.out(1) % call.out(0);
      const int64_t o = i / call.out_pixels() % call.out_channels, patch = i / call.out_pixels() / call.out_channels;
      const int64_t b = patch / call.patches, n = patch % call.patches;
      const double grad = tensors.grad(b, n, o, y, x);
      if (call.bias) {
        out.add(i, static_cast<double>(tensors.bias[o]));
      }
      bias.add(o, grad);
      for (int64_t c = o / outputs * inputs; c < (o / outputs + 1) * inputs; ++c) {
        for (int64_t tap = 0; tap < call.taps(); ++tap) {
          const int64_t row = y * call.stride[0] - call.padding[0] + tap / call.kernel[1] * call.dilation[0];
          const int64_t column = x * call.stride[1] - call.padding[1] + tap % call.kernel[1] * call.dilation[1];
          if (row < 0 || row >= call.height || column < 0 || column >= call.width) {
            continue;
          }
          const int64_t at_weight = (o * inputs + c % inputs) * call.taps() + tap;
          const double w = static_cast<double>(tensors.weight[at_weight]), value = tensors.input(b, n, c, row, column);
          out.add(i, w * value);
          input.add(((patch * call.channels + c) * call.height + row) * call.width + column, w * grad);
          weight.add(at_weight, grad * value);
        }
      }
    }
  }
};

template <typename scalar_t>
PatchConv2d<scalar_t> operation(const Call& call, const Tensors<scalar_t>& tensors, bool transposed) {
  return {
      transposed ? tensors.grad.view() : tensors.input.view(),
      call.bias && !transposed ? tensors.bias.data() : nullptr,
      call.batch,
      call.patches,
      transposed ? call.out_channels : call.channels,
      transposed ? call.out(0) : call.height,
      transposed ? call.out(1) : call.width,
      transposed ? call.channels : call.out_channels,
      transposed ? call.height : call.out(0),
      transposed ? call.width : call.out(1),
      call.kernel[0],
      call.kernel[1],
      call.stride[0],
      call.stride[1],
      call.padding[0],
      call.padding[1],
      call.dilation[0],
      call.dilation[1],
      call.groups,
  };
}

// The weight as the kernel wants it: [groups][panels][taps][inputs][kPanel].
template <typename scalar_t>
std::vector<accumulate_t<scalar_t>> pack(const Call& call, const std::vector<scalar_t>& weight, bool transposed) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t lanes = inductor_vision::kPanel<acc_t>;
  const int64_t rows = call.channels / call.groups, columns = call.out_channels / call.groups;
  const int64_t inputs = transposed ? columns : rows, outputs = transposed ? rows : columns;
  const int64_t panels = inductor_vision::divide_up(outputs, lanes);
  std::vector<acc_t> packed(call.groups * panels * call.taps() * inputs * lanes, acc_t(0));
  for (int64_t i = 0; i < static_cast<int64_t>(weight.size()); ++i) {
    const int64_t tap = i % call.taps(), c = i / call.taps() % rows, group = i / (call.taps() * rows * columns);
    const int64_t o = i / (call.taps() * rows) % columns;
    const int64_t in = transposed ? o : c, out = transposed ? c : o;
    const int64_t line = ((group * panels + out / lanes) * call.taps() + tap) * inputs + in;
    packed[line * lanes + out % lanes] = static_cast<acc_t>(weight[i]);
  }
  return packed;
}

std::string describe(int64_t bytes, const Setting& setting) {
  return std::to_string(bytes) + " bytes, " + std::to_string(setting.threads) + " threads, order " +
         std::to_string(static_cast<int>(setting.order));
}

// Runs the kernel once: the results in the order of [B, N, O, Ho, Wo].
template <PatchOrder kOrder, bool kTransposed, typename scalar_t>
std::vector<accumulate_t<scalar_t>> run(
    const Call& call, const std::string& kind, const PatchConv2d<scalar_t>& op,
    const std::vector<accumulate_t<scalar_t>>& weight, int64_t bytes, int threads) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr bool kByChannel = kOrder == PatchOrder::channels_first;
  const int64_t pixels = op.out_pixels(), all = op.batch * op.patches;
  Results<acc_t> out(kByChannel ? op.batch : all, op.out_channels, 1, kByChannel ? op.patches * pixels : pixels);
  omp_set_num_threads(threads);
  inductor_vision::patch_conv2d<kOrder, kTransposed>(
      op, weight.data(), PatchBlocking{bytes}, Sink<acc_t>{&out, kOrder == PatchOrder::channels_last});
  std::string complaint;
  if (!out.written(1, &complaint)) {
    fail(call, kind, complaint + ", " + describe(bytes, {threads, kOrder}));
  }
  if (!kByChannel) {
    return out.values();
  }
  std::vector<acc_t> values;
  for (int64_t i = 0; i < all * op.out_channels; ++i) {
    const int64_t o = i % op.out_channels, b = i / op.out_channels / op.patches, n = i / op.out_channels % op.patches;
    const acc_t* from = out.values().data() + ((b * op.out_channels + o) * op.patches + n) * pixels;
    values.insert(values.end(), from, from + pixels);
  }
  return values;
}

template <bool kTransposed, typename scalar_t, typename... Arguments>
std::vector<accumulate_t<scalar_t>> run_in_order(
    PatchOrder order, const Call& call, const std::string& kind, const PatchConv2d<scalar_t>& op,
    const Arguments&... arguments) {
  if constexpr (std::is_same_v<scalar_t, at::Half>) {  // differs from bf16 in nothing but how numbers are loaded
    return run<PatchOrder::patches_first, kTransposed>(call, kind, op, arguments...);
  }
  switch (order) {
    case PatchOrder::patches_first:
      return run<PatchOrder::patches_first, kTransposed>(call, kind, op, arguments...);
    case PatchOrder::channels_first:
      return run<PatchOrder::channels_first, kTransposed>(call, kind, op, arguments...);
    default:
      return run<PatchOrder::channels_last, kTransposed>(call, kind, op, arguments...);
  }
}

template <typename acc_t, typename value_t>
void compare(
    const Call& call, const std::string& kind, const std::vector<value_t>& numbers, const Numbers& expected,
    Figures& figures) {
  const std::string complaint = harness::complaint_of<acc_t>(numbers, expected, 2e-6, figures);
  if (!complaint.empty()) {
    fail(call, kind, complaint);
  }
}

// The results of a call, or the gradient of its input.
template <bool kTransposed, typename scalar_t>
void check_results(
    const Call& call, const std::string& kind, const Tensors<scalar_t>& tensors, const Numbers& expected,
    Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  const auto op = operation(call, tensors, kTransposed);
  const auto weight = pack(call, tensors.weight, kTransposed);
  for (int64_t bytes : kBytes) {
    const auto first = run_in_order<kTransposed>(kFirst.order, call, kind, op, weight, bytes, kFirst.threads);
    compare<acc_t>(call, kind + ", " + describe(bytes, kFirst), first, expected, figures);
    ++figures.runs;
    for (const Setting& setting : kOthers) {
      if (!same_bits(run_in_order<kTransposed>(setting.order, call, kind, op, weight, bytes, setting.threads), first)) {
        fail(call, kind, "the bits depend on threads or memory order, " + describe(bytes, setting));
      }
      ++figures.runs;
    }
  }
}

// The gradients of weight and bias.
template <typename scalar_t>
void check_sums(
    const Call& call, const std::string& kind, const Tensors<scalar_t>& tensors, const Expected& expected,
    Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  const auto op = operation(call, tensors, false);
  std::vector<scalar_t> first_weight, first_bias;
  const int threads[] = {1, 2, 3, 5};
  for (size_t i = 0; i < std::size(kBytes) * std::size(threads); ++i) {
    const int64_t bytes = kBytes[i / std::size(threads)];
    const bool with_weight = i % 4 != 1, with_bias = i % 4 != 2;  // both to begin with
    const Output<scalar_t> weight(expected.weight.sum.size()), bias(call.out_channels);
    omp_set_num_threads(threads[i % std::size(threads)]);
    const PatchGradients<scalar_t> gradients{
        tensors.grad.view(), with_weight ? weight.get() : nullptr, with_bias ? bias.get() : nullptr};
    inductor_vision::patch_conv2d_backward(op, gradients, PatchBlocking{bytes});
    ++figures.runs;
    if (i == 0) {
      first_weight = weight.numbers();
      first_bias = bias.numbers();
      compare<acc_t>(call, kind + ", gradient of weight", first_weight, expected.weight, figures);
      compare<acc_t>(call, kind + ", gradient of bias", first_bias, expected.bias, figures);
    } else if (
        (with_weight && !same_bits(weight.numbers(), first_weight)) ||
        (with_bias && !same_bits(bias.numbers(), first_bias))) {
      fail(
          call, kind,
          "the bits of the gradients of weight and bias depend on threads, blocks or what else is wanted, " +
              describe(bytes, {threads[i % std::size(threads)], PatchOrder::patches_first}));
    }
  }
}

template <typename scalar_t>
void check(const Call& call, const std::string& kind, uint64_t seed, Figures& figures) {
  const Tensors<scalar_t> tensors(call, seed);
  const Expected expected(call, tensors);
  ++figures.calls;
  check_results<false>(call, kind, tensors, expected.out, figures);
  if constexpr (std::is_same_v<scalar_t, accumulate_t<scalar_t>>) {
    check_results<true>(call, kind + ", gradient of input", tensors, expected.input, figures);
  }
  check_sums(call, kind, tensors, expected, figures);
}

// Calls whose shapes sit at the edges of vectors, panels, micro-tiles, groups of patches and blocks.
const Call kCalls[] = {
    {1, 13, 3, 4, 4, 17, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, true, 0, 0, false},
    {2, 7, 37, 3, 5, 33, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, true, 1, 1, true},
    {3, 5, 17, 4, 3, 16, {3, 2}, {2, 1}, {1, 1}, {1, 2}, 1, true, 2, 2, false},
    {1, 1, 1, 1, 1, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1, false, 0, 0, false},
    {0, 5, 3, 4, 4, 5, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, true, 0, 0, false},
    {3, 0, 3, 4, 4, 5, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, true, 2, 0, false},
    {1, 6, 5, 3, 4, 6, {2, 3}, {1, 2}, {5, 6}, {1, 1}, 1, true, 1, 6, true},
    {2, 3, 4, 3, 4, 6, {3, 3}, {1, 1}, {5, 5}, {5, 5}, 1, true, 6, 8, true},
    {1, 7, 3, 17, 13, 5, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, true, 0, 1, false},
    {1, 25, 70, 5, 4, 3, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, true, 0, 0, true},
    {1, 4, 3, 2, 3, 70, {5, 5}, {1, 1}, {2, 2}, {1, 1}, 1, true, 7, 7, false},
    {2, 12, 12, 3, 3, 20, {2, 2}, {1, 1}, {0, 1}, {1, 1}, 4, true, 2, 1, true},
    {2, 6, 40, 2, 3, 36, {3, 1}, {1, 1}, {1, 0}, {1, 1}, 2, true, 8, 8, true},
    {1, 13, 5, 4, 4, 5, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 5, true, 3, 4, true},
    {2, 9, 6, 5, 5, 9, {1, 2}, {3, 2}, {0, 0}, {1, 3}, 3, false, 4, 3, false},
    {3, 8, 4, 4, 4, 8, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 1, true, kExpanded, kExpanded, true},
};

Call random_call(Random& random) {
  const int64_t few[] = {1, 1, 1, 2, 3}, most[] = {3, 3, 20, 36};
  Call call{};
  do {
    call.batch = random.integer(1, 3);
    call.patches = random.integer(1, 14);
    call.groups = random.pick(few);
    call.channels = call.groups * random.integer(1, random.pick(most));
    call.out_channels = call.groups * random.integer(1, random.pick(most));
    call.height = random.integer(1, 7);
    call.width = random.integer(1, 7);
    for (int axis = 0; axis < 2; ++axis) {
      call.kernel[axis] = random.integer(1, 4);
      call.stride[axis] = random.integer(1, 3);
      call.padding[axis] = random.integer(0, 4);
      call.dilation[axis] = random.integer(1, 3);
    }
    call.bias = random.integer(0, 2) != 0;
    call.input = static_cast<int>(random.integer(0, kExpanded));
    call.grad = static_cast<int>(random.integer(0, kExpanded));
    call.wild = random.integer(0, 1) == 0;
  } while (!call.fits());
  return call;
}

template <typename scalar_t>
void check_type(const char* kind, int random_calls, Figures& figures) {
  uint64_t seed = 1;
  for (const Call& call : kCalls) {
    check<scalar_t>(call, kind, seed++, figures);
  }
  Random random(sizeof(scalar_t) + 1);
  for (int i = 0; i < random_calls; ++i) {
    check<scalar_t>(random_call(random), kind, seed++, figures);
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
  figures.print();
  return 0;
}
