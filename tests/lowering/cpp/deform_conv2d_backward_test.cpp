// Runs the kernel of deform_conv2d_backward.h against a plain loop in double, to be built with sanitizers.
//
// Each call runs for several blockings.  The bits must not depend on the number of threads, the memory format of the
// gradients, which of them are wanted, or how tiles are gathered in phases.  All memory is allocated to the exact size,
// so that AddressSanitizer sees any access beyond it; gaps between the elements of strided tensors are NaN, so that a
// read of one shows in the result; every element of a gradient must be written, and no gradient that is not wanted has
// memory.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "deform_conv2d_backward.h"

#include "deform_convolutions.h"

namespace {

using harness::fail;
using harness::Figures;
using harness::kHuge;
using harness::kInf;
using harness::kNaN;
using harness::Layout;
using harness::Random;
using harness::same_bits;
using harness::Tensor;
using harness::Tensors;
using inductor_vision::accumulate_t;
using inductor_vision::DeformBackwardBlocking;
using inductor_vision::DeformConv2d;
using inductor_vision::DeformGradients;
using inductor_vision::DeformKernel;
using inductor_vision::Output4d;

// What sums depend on: tiles as small and as large as can be, one image at a time or all.
struct Blocking {
  int64_t pixels, image_bytes;  // of DeformBackwardBlocking
};
const Blocking kBlockings[] = {{12, kHuge}, {kHuge, 1}, {30, 60000}, {12, 1}, {252, kHuge}};

// How else a run may differ from another, without a bit of the result changing.
struct Setting {
  int threads;
  bool channels_last;   // memory format of the gradients of input and weight
  int64_t phase_bytes;  // of DeformBackwardBlocking: all tiles in one phase, each in its own
};
const Setting kFirst{1, false, kHuge};
const Setting kOthers[] = {{2, true, 1}, {3, false, kHuge}, {5, true, 50000}};

struct Call : harness::Call {
  Layout grad, weight;
  bool wild;  // some numbers of the output's gradient and of the input are infinite or NaN

  std::string describe() const {
    return harness::Call::describe() + ", gradient layout " + std::to_string(static_cast<int>(grad)) +
           ", weight layout " + std::to_string(static_cast<int>(weight)) + ", wild " + std::to_string(wild);
  }
};

// The gradients, in the order of DeformGradient.
enum { kInput, kOffset, kWeight, kBias, kMask, kGradients };
const char* const kNames[kGradients] = {"input", "offset", "weight", "bias", "mask"};

constexpr bool is_wanted(int wanted, int gradient) {
  return (wanted >> gradient & 1) != 0;
}

std::array<int64_t, 4> gradient_size(const Call& call, int gradient) {
  const int64_t taps = call.offset_groups * call.taps();
  switch (gradient) {
    case kInput:
      return {call.batch, call.channels, call.height, call.width};
    case kOffset:
      return {call.batch, 2 * taps, call.out(0), call.out(1)};
    case kWeight:
      return {call.out_channels, call.channels / call.groups, call.kernel[0], call.kernel[1]};
    case kBias:
      return {call.out_channels, 1, 1, 1};
    default:
      return {call.batch, taps, call.out(0), call.out(1)};
  }
}

// Numbers of all gradients; of each in the order of a contiguous tensor.
template <typename T>
using Numbers = std::array<std::vector<T>, kGradients>;

// The tensors of a call, and what the operator takes of them.
template <typename scalar_t>
struct Arguments {
  Call call;
  Tensors<scalar_t> tensors;
  Tensor<scalar_t> grad, weight;
  DeformConv2d<scalar_t> op;

  Arguments(const Call& call, uint64_t seed)
      : call(call),
        tensors(call, false, seed),
        grad(call.batch, call.out_channels, call.out(0), call.out(1), call.grad),
        weight(call.out_channels, call.channels / call.groups, call.kernel[0], call.kernel[1], call.weight),
        op(harness::operation(call, tensors)) {
    Random random(seed + 1);
    const double wild[] = {kNaN, kInf, -kInf};
    const int64_t pixels = call.out(0) * call.out(1), rare = std::max<int64_t>(call.out_channels * pixels / 2, 1);
    grad.fill(
        [&](auto...) { return call.wild && random.integer(1, rare) == 1 ? random.pick(wild) : random.uniform(-1, 1); });
    weight.fill([&](auto...) { return random.uniform(-1, 1); });
    if (call.wild) {
      const int64_t rare_input = call.channels * call.height * call.width;
      tensors.input.fill(
          [&](auto...) { return random.integer(1, rare_input) == 1 ? random.pick(wild) : random.uniform(-1, 1); });
    }
  }
};

// What the operator is, in double, and for each number the sum of the magnitudes that were added.  Coordinates are
// rounded as the operator's are: at the kinks of the interpolation its derivative jumps.
template <typename scalar_t>
void plain_loop(const Arguments<scalar_t>& arguments, Numbers<double>& out, Numbers<double>& magnitude) {
  using acc_t = accumulate_t<scalar_t>;
  const Call& call = arguments.call;
  const Tensors<scalar_t>& tensors = arguments.tensors;
  for (int gradient = 0; gradient < kGradients; ++gradient) {
    const auto size = gradient_size(call, gradient);
    out[gradient].assign(size[0] * size[1] * size[2] * size[3], 0);
    magnitude[gradient].assign(out[gradient].size(), 0);
  }
  const auto add = [&](int gradient, int64_t at, double term, double size) {
    out[gradient][at] += term;
    magnitude[gradient][at] += std::abs(size);
  };
  const int64_t group_channels = call.channels / call.groups, group_outputs = call.out_channels / call.groups;
  const int64_t out_pixels = call.out(0) * call.out(1);
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t p = 0; p < out_pixels; ++p) {
      const int64_t py = p / call.out(1), px = p % call.out(1);
      for (int64_t o = 0; o < call.out_channels; ++o) {
        const double grad = arguments.grad(b, o, py, px);
        add(kBias, o, grad, grad);
      }
      for (int64_t c = 0; c < call.channels; ++c) {
        const int64_t first = c / group_channels * group_outputs, end = first + group_outputs;
        for (int64_t tap = 0; tap < call.taps(); ++tap) {
          const int64_t i = tap / call.kernel[1], j = tap % call.kernel[1];
          const int64_t plane = c / (call.channels / call.offset_groups) * call.taps() + tap;
          const double y = static_cast<acc_t>(py * call.stride[0] - call.padding[0] + i * call.dilation[0]) +
                           static_cast<acc_t>(tensors.offset(b, 2 * plane, py, px));
          const double x = static_cast<acc_t>(px * call.stride[1] - call.padding[1] + j * call.dilation[1]) +
                           static_cast<acc_t>(tensors.offset(b, 2 * plane + 1, py, px));
          const double mask = call.mask ? tensors.mask(b, plane, py, px) : 1;

          double grad_column = 0, grad_size = 0;
          for (int64_t o = first; o < end; ++o) {
            const double term = arguments.weight(o, c % group_channels, i, j) * arguments.grad(b, o, py, px);
            grad_column += term;
            grad_size += std::abs(term);
          }

          double value = 0, value_size = 0, slope_y = 0, slope_x = 0, size_y = 0, size_x = 0;
          if (y >= -1 && y < call.height && x >= -1 && x < call.width) {
            const bool inside = y > -1 && x > -1;
            const int64_t top = static_cast<int64_t>(std::floor(y)), left = static_cast<int64_t>(std::floor(x));
            const double down = y - std::floor(y), right = x - std::floor(x);
            double corners[2][2] = {};
            for (int64_t row = top; row < top + 2; ++row) {
              for (int64_t column = left; column < left + 2; ++column) {
                if (row < 0 || row >= call.height || column < 0 || column >= call.width) {
                  continue;
                }
                const double corner = tensors.input(b, c, row, column);
                corners[row - top][column - left] = corner;
                const double share = (row == top ? 1 - down : down) * (column == left ? 1 - right : right);
                if (inside) {
                  value += share * corner;
                  value_size += std::abs(share * corner);
                }
                if (inside && share > 0) {
                  const int64_t at = ((b * call.channels + c) * call.height + row) * call.width + column;
                  add(kInput, at, grad_column * mask * share, grad_size * mask * share);
                }
              }
            }
            const auto& v = corners;
            slope_y = (v[1][0] - v[0][0]) * (1 - right) + (v[1][1] - v[0][1]) * right;
            slope_x = (v[0][1] - v[0][0]) * (1 - down) + (v[1][1] - v[1][0]) * down;
            size_y =
                (std::abs(v[1][0]) + std::abs(v[0][0])) * (1 - right) + (std::abs(v[1][1]) + std::abs(v[0][1])) * right;
            size_x =
                (std::abs(v[0][1]) + std::abs(v[0][0])) * (1 - down) + (std::abs(v[1][1]) + std::abs(v[1][0])) * down;
          }
          const int64_t at_mask = (b * call.offset_groups * call.taps() + plane) * out_pixels + p;
          const int64_t at_y = (b * call.offset_groups * call.taps() + plane) * 2 * out_pixels + p;
          add(kMask, at_mask, grad_column * value, grad_size * value_size);
          add(kOffset, at_y, grad_column * mask * slope_y, grad_size * mask * size_y);
          add(kOffset, at_y + out_pixels, grad_column * mask * slope_x, grad_size * mask * size_x);
          for (int64_t o = first; o < end; ++o) {
            const double grad = arguments.grad(b, o, py, px);
            const int64_t at = (o * group_channels + c % group_channels) * call.taps() + tap;
            add(kWeight, at, grad * value * mask, grad * value_size * mask);
          }
        }
      }
    }
  }
}

// Memory for a gradient, filled with what no gradient is: not NaN, which some are.
template <typename scalar_t>
class Output {
 public:
  Output(const std::array<int64_t, 4>& size, bool channels_last)
      : size_(size),
        count_(size[0] * size[1] * size[2] * size[3]),
        data_(new scalar_t[count_]),
        view_{data_.get(), size[1] * size[2] * size[3], size[2] * size[3], size[3], 1} {
    if (channels_last) {
      view_ = {data_.get(), view_.image, 1, size[3] * size[1], size[1]};
    }
    std::memset(static_cast<void*>(data_.get()), kUnwritten, count_ * sizeof(scalar_t));
  }
  const Output4d<scalar_t>& view() const {
    return view_;
  }
  // All elements, in the order of a contiguous tensor; none, if one was not written.
  std::vector<scalar_t> numbers() const {
    std::vector<scalar_t> numbers;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t x = i % size_[3], y = i / size_[3] % size_[2], c = i / (size_[3] * size_[2]) % size_[1];
      const scalar_t* from = view_.at(i / (size_[3] * size_[2] * size_[1]), c, y, x);
      unsigned char bytes[sizeof(scalar_t)];
      std::memcpy(bytes, from, sizeof bytes);
      if (std::all_of(bytes, bytes + sizeof bytes, [](unsigned char byte) { return byte == kUnwritten; })) {
        return {};
      }
      numbers.push_back(*from);
    }
    return numbers;
  }

 private:
  static constexpr unsigned char kUnwritten = 0x5a;
  std::array<int64_t, 4> size_;
  int64_t count_;
  std::unique_ptr<scalar_t[]> data_;
  Output4d<scalar_t> view_;
};

// An instance of the kernel.
template <typename scalar_t>
struct Instance {
  int wanted;
  void (*run)(const DeformConv2d<scalar_t>&, const DeformGradients<scalar_t>&, const DeformBackwardBlocking&);
};
template <typename scalar_t, DeformKernel kKernel, int... kWanted>
std::vector<Instance<scalar_t>> instances() {
  return {{kWanted, inductor_vision::deform_conv2d_backward<kKernel, kWanted, scalar_t>}...};
}

std::string describe(const Blocking& blocking, const Setting& setting, int wanted) {
  return "tiles of " + std::to_string(blocking.pixels) + ", phase bytes " + std::to_string(setting.phase_bytes) +
         ", image bytes " + std::to_string(blocking.image_bytes) + ", " + std::to_string(setting.threads) +
         " threads, channels_last " + std::to_string(setting.channels_last) + ", wanted " + std::to_string(wanted);
}

// Runs the kernel once; the gradients that are wanted.
template <typename scalar_t>
Numbers<scalar_t> run(
    const Arguments<scalar_t>& arguments, const char* kind, const Instance<scalar_t>& instance,
    const Blocking& blocking, const Setting& setting, Figures& figures) {
  const Call& call = arguments.call;
  std::vector<Output<scalar_t>> outputs;
  Output4d<scalar_t> views[kGradients];
  for (int gradient = 0; gradient < kGradients; ++gradient) {
    const bool wanted = is_wanted(instance.wanted, gradient);
    const bool either_format = gradient == kInput || gradient == kWeight;
    outputs.emplace_back(
        wanted ? gradient_size(call, gradient) : std::array<int64_t, 4>{}, setting.channels_last && either_format);
    views[gradient] = wanted ? outputs[gradient].view() : Output4d<scalar_t>{};
  }
  const DeformGradients<scalar_t> gradients{
      arguments.grad.view(), arguments.weight.view(), views[kInput], views[kOffset],
      views[kWeight],        views[kBias].data,       views[kMask],
  };
  omp_set_num_threads(setting.threads);
  instance.run(arguments.op, gradients, {blocking.pixels, setting.phase_bytes, blocking.image_bytes});
  ++figures.runs;
  Numbers<scalar_t> numbers;
  for (int gradient = 0; gradient < kGradients; ++gradient) {
    if (!is_wanted(instance.wanted, gradient)) {
      continue;
    }
    numbers[gradient] = outputs[gradient].numbers();
    if (numbers[gradient].empty() && gradient_size(call, gradient)[0] > 0) {
      fail(
          call, kind,
          std::string("some of the gradient of ") + kNames[gradient] + " is not written, " +
              describe(blocking, setting, instance.wanted));
    }
  }
  return numbers;
}

// A run whose results must be those of another.
template <typename scalar_t>
void check_same(
    const Arguments<scalar_t>& arguments, const char* kind, const Instance<scalar_t>& instance,
    const Blocking& blocking, const Setting& setting, const Numbers<scalar_t>& expected, const char* differs_by,
    Figures& figures) {
  const Numbers<scalar_t> numbers = run(arguments, kind, instance, blocking, setting, figures);
  for (int gradient = 0; gradient < kGradients; ++gradient) {
    if (is_wanted(instance.wanted, gradient) && !same_bits(numbers[gradient], expected[gradient])) {
      fail(
          arguments.call, kind,
          std::string("the bits of the gradient of ") + kNames[gradient] + " depend on " + differs_by + ", " +
              describe(blocking, setting, instance.wanted));
    }
  }
}

// How far the numbers are from those of the plain loop.
template <typename scalar_t>
struct Tolerance {
  double sums;      // of the magnitudes that are added
  double rounding;  // of the result
  double smallest;  // number but 0, rounded to 0

  Tolerance() : sums(std::is_same_v<scalar_t, double> ? 1e-13 : 4e-6), rounding(0), smallest(0) {
    if constexpr (!std::is_same_v<scalar_t, accumulate_t<scalar_t>>) {
      rounding = static_cast<double>(std::numeric_limits<scalar_t>::epsilon()) / 2;
      smallest = static_cast<double>(std::numeric_limits<scalar_t>::denorm_min());
    }
  }
};

template <typename scalar_t>
void compare(
    const Call& call, const char* kind, const Blocking& blocking, const Numbers<scalar_t>& numbers, int wanted,
    const Numbers<double>& expected, const Numbers<double>& magnitude, Figures& figures) {
  const Tolerance<scalar_t> tolerance;
  for (int gradient = 0; gradient < kGradients; ++gradient) {
    for (size_t i = 0; is_wanted(wanted, gradient) && i < expected[gradient].size(); ++i) {
      const double number = static_cast<double>(numbers[gradient][i]), want = expected[gradient][i];
      double error = 0, allowed = 0;
      bool good = number == want || (std::isnan(number) && std::isnan(want));
      if (!good && std::isfinite(want)) {
        error = std::abs(number - want);
        allowed = tolerance.sums * magnitude[gradient][i] + tolerance.rounding * std::abs(want) + tolerance.smallest;
        good = error <= allowed;
      }
      if (!good) {
        fail(
            call, kind,
            std::string("number ") + std::to_string(i) + " of the gradient of " + kNames[gradient] + " is " +
                std::to_string(number) + ", expected " + std::to_string(want) + ", error " +
                std::to_string(error / allowed) + " of what is allowed, " + describe(blocking, kFirst, wanted));
      }
      figures.error = std::max(figures.error, allowed > 0 ? error / allowed : 0);
    }
  }
}

// One call, by one kernel, against the plain loop and against itself.  The first of the instances is for all gradients;
// where it is the only one, some of the blockings do.
template <typename scalar_t>
void check(
    const Arguments<scalar_t>& arguments, const char* kind, const std::vector<Instance<scalar_t>>& instances,
    uint64_t seed, Figures& figures) {
  Numbers<double> expected, magnitude;
  plain_loop(arguments, expected, magnitude);
  const Instance<scalar_t>& all = instances[0];
  const size_t step = instances.size() > 1 ? 1 : 3;
  ++figures.calls;
  for (size_t i = seed % step; i < std::size(kBlockings); i += step, ++seed) {
    const Blocking& blocking = kBlockings[i];
    const Setting& other = kOthers[seed % std::size(kOthers)];
    const Numbers<scalar_t> first = run(arguments, kind, all, blocking, kFirst, figures);
    compare(arguments.call, kind, blocking, first, all.wanted, expected, magnitude, figures);
    check_same(arguments, kind, all, blocking, other, first, "threads, memory format or phases", figures);
    if (instances.size() > 1) {
      const Instance<scalar_t>& part = instances[1 + seed % (instances.size() - 1)];
      check_same(arguments, kind, part, blocking, other, first, "what else is wanted", figures);
    }
  }
}

// Besides harness::kCalls: more outputs than a block of the depth holds, rows longer than a tile, batches that are cut
// into unequal parts, offset groups that end within a panel.
const harness::Call kMoreCalls[] = {
    {2, 17, 3, 3, 270, {2, 2}, {1, 1}, {1, 0}, {1, 1}, 1, 1, true, true, Layout::contiguous, Layout::contiguous, true},
    {1, 6, 3, 4, 522, {1, 2}, {1, 1}, {0, 1}, {1, 1}, 2, 1, true, true, Layout::contiguous, Layout::contiguous, true},
    {1, 5, 2, 300, 7, {2, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1, true, true, Layout::sliced, Layout::sliced, true},
    {1, 6, 1, 290, 6, {1, 2}, {1, 1}, {0, 1}, {1, 1}, 6, 1, true, true, Layout::contiguous, Layout::contiguous, true},
    {5, 176, 1, 2, 3, {1, 2}, {1, 1}, {0, 1}, {1, 1}, 1, 1, true, true, Layout::contiguous, Layout::contiguous, true},
    {7, 33, 2, 3, 5, {2, 1}, {1, 1}, {1, 0}, {1, 1}, 1, 1, true, true, Layout::contiguous, Layout::contiguous, true},
    {2, 72, 3, 4, 6, {1, 3}, {1, 1}, {0, 1}, {1, 1}, 2, 3, true, true, Layout::channels_last, Layout::sliced, true},
    {2, 60, 4, 4, 40, {2, 2}, {1, 1}, {0, 0}, {1, 1}, 20, 3, true, true, Layout::contiguous, Layout::sliced, true},
};

constexpr DeformKernel kGemm = DeformKernel::gemm, kVectors = DeformKernel::depthwise;
constexpr int kAll = (1 << kGradients) - 1, kAllButMask = kAll & ~(1 << kMask);

// By all kernels that can do it.  A type that is not summed in differs only in how numbers are loaded and stored, which
// is the same in both kernels: one does.
template <typename scalar_t>
void check_kernels(const Call& call, const char* kind, uint64_t seed, Figures& figures) {
  const Arguments<scalar_t> arguments(call, seed);
  const bool vectors = call.groups > 1 && call.channels / call.groups < inductor_vision::kPanel<accumulate_t<scalar_t>>;
  if constexpr (std::is_same_v<scalar_t, float>) {
    auto by_gemm = instances<float, kGemm, kAll, 1 << kInput, 1 << kOffset, 1 << kWeight, 1 << kBias, 1 << kMask>();
    auto by_vectors = instances<float, kVectors, kAll, 1 << kInput | 1 << kWeight, 1 << kOffset | 1 << kMask>();
    if (!call.mask) {
      by_gemm = instances<float, kGemm, kAllButMask, 1 << kInput, 1 << kOffset, 1 << kWeight, 1 << kBias>();
      by_vectors = instances<float, kVectors, kAllButMask, 1 << kInput | 1 << kWeight>();
    }
    check(arguments, kind, by_gemm, seed, figures);
    if (vectors) {
      check(arguments, "float, vectors", by_vectors, seed, figures);
    }
  } else {
    if constexpr (!std::is_same_v<scalar_t, at::Half>) {
      check(arguments, kind, instances<scalar_t, kGemm, kAll>(), seed, figures);
    }
    if constexpr (!std::is_same_v<scalar_t, at::BFloat16>) {
      if (vectors) {
        check(
            arguments, (std::string(kind) + ", vectors").c_str(), instances<scalar_t, kVectors, kAll>(), seed, figures);
      }
    }
  }
}

// The same call with other layouts, and one of its sizes that is depthwise, with several outputs for each channel,
// unless that takes long.
template <typename scalar_t>
void check_call(const harness::Call& shape, const char* kind, Random& random, uint64_t seed, Figures& figures) {
  const Layout grads[] = {Layout::contiguous, Layout::contiguous,     Layout::channels_last,
                          Layout::sliced,     Layout::images_in_rows, Layout::sliced_channels_last,
                          Layout::transposed, Layout::constant};
  const Layout weights[] = {
      Layout::contiguous, Layout::channels_last, Layout::sliced, Layout::transposed, Layout::expanded};
  Call call{};
  static_cast<harness::Call&>(call) = shape;
  call.mask = call.mask || !std::is_same_v<scalar_t, float>;  // fewer instances of the kernel
  call.grad = random.pick(grads);
  call.weight = random.pick(weights);
  call.wild = random.integer(0, 2) == 0;
  check_kernels<scalar_t>(call, kind, seed, figures);
  if (call.out(0) * call.out(1) > 100) {
    return;
  }
  const int64_t each = std::min<int64_t>(call.channels, 24) / call.offset_groups;
  call.groups = call.channels = call.offset_groups * std::max<int64_t>(each, 1);
  call.out_channels = call.channels * random.integer(1, 3);
  check_kernels<scalar_t>(call, kind, seed, figures);
}

template <typename scalar_t>
void check_type(const char* kind, int random_calls, Figures& figures) {
  uint64_t seed = 1;
  Random random(sizeof(scalar_t));
  for (const harness::Call& call : harness::kCalls) {
    check_call<scalar_t>(call, kind, random, seed++, figures);
  }
  for (const harness::Call& call : kMoreCalls) {
    check_call<scalar_t>(call, kind, random, seed++, figures);
  }
  for (int i = 0; i < random_calls; ++i) {
    check_call<scalar_t>(harness::random_call(random), kind, random, seed++, figures);
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
