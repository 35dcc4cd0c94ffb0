// Runs the kernel of winograd_conv2d.h against a direct convolution in double, to be built with sanitizers.
//
// Each call runs for several sizes of blocks, memory formats of the result and numbers of threads, with the weight
// transformed before or in the call, and as the gradient of another convolution: results must agree to the bit.  All
// memory is allocated to the exact size, so that AddressSanitizer sees any access beyond it; gaps between the elements
// of strided tensors are NaN, so that a read of one shows in the result; every output must be written exactly once.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "winograd_conv2d.h"

#include "harness.h"

#include <cinttypes>
#include <cmath>
#include <cstdio>

namespace {

using namespace harness;
using inductor_vision::accumulate_t;
using inductor_vision::DenseStore;
using inductor_vision::WinogradBlocking;
using inductor_vision::WinogradConv2d;
using inductor_vision::WinogradWeight;

struct Call {
  int64_t batch, channels, out_channels, height, width;
  int64_t padding[2];
  int64_t groups;
  bool bias;
  Layout input;
  bool hostile;  // some pixels are NaN or infinite

  int64_t out(int axis) const {
    return (axis == 0 ? height : width) + 2 * padding[axis] - 2;
  }
  bool fits() const {
    return out(0) > 0 && out(1) > 0;
  }
  int64_t out_pixels() const {
    return out(0) * out(1);
  }
  int64_t inputs() const {
    return channels / groups;
  }
  int64_t outputs() const {
    return out_channels / groups;
  }
  std::string describe() const {
    char text[300];
    std::snprintf(
        text, sizeof text,
        "batch %" PRId64 ", channels %" PRId64 " -> %" PRId64 ", size %" PRId64 "x%" PRId64 ", padding %" PRId64
        "x%" PRId64 ", groups %" PRId64 ", bias %d, input layout %d, hostile %d",
        batch, channels, out_channels, height, width, padding[0], padding[1], groups, bias, static_cast<int>(input),
        hostile);
    return text;
  }
};

// Calls whose shapes sit at the edges of tiles, runs of tiles, panels, lines and chunks of channels.
const Call kCalls[] = {
    {2, 5, 6, 7, 9, {1, 1}, 1, true, Layout::contiguous, false},
    {1, 40, 36, 9, 6, {1, 1}, 1, true, Layout::channels_last, false},
    {1, 32, 32, 5, 70, {1, 1}, 1, true, Layout::channels_last, false},  // more than a run; whole lines
    {1, 32, 16, 8, 68, {1, 0}, 1, true, Layout::contiguous, false},
    {3, 34, 33, 4, 4, {1, 1}, 1, false, Layout::images_in_rows, false},
    {2, 51, 54, 6, 5, {2, 1}, 3, true, Layout::sliced_channels_last, true},
    {1, 19, 19, 7, 8, {1, 1}, 19, true, Layout::contiguous, false},
    {1, 3, 20, 13, 11, {1, 1}, 1, true, Layout::sliced, true},
    {1, 1, 1, 1, 1, {1, 1}, 1, false, Layout::contiguous, false},
    {1, 6, 5, 1, 1, {5, 4}, 1, true, Layout::channels_last, true},  // pixels that meet nothing but padding
    {2, 4, 4, 12, 3, {0, 2}, 2, true, Layout::transposed, true},
    {3, 8, 6, 6, 6, {1, 1}, 1, true, Layout::expanded, false},
    {1, 7, 9, 10, 12, {-2, -1}, 1, true, Layout::contiguous, true},  // as gradients have it
    {1, 17, 3, 9, 11, {-1, -3}, 1, false, Layout::channels_last, false},
    {0, 8, 8, 4, 4, {1, 1}, 1, true, Layout::contiguous, false},
};

Call random_call(Random& random) {
  const int64_t most[] = {3, 20, 70};
  const int64_t longest[] = {4, 12, 70};
  const Layout layouts[] = {Layout::contiguous,           Layout::channels_last,  Layout::sliced,
                            Layout::sliced_channels_last, Layout::images_in_rows, Layout::expanded};
  Call call{};
  do {
    call.groups = random.integer(0, 2) == 0 ? random.integer(1, 3) : 1;
    call.batch = random.integer(1, 3);
    call.channels = call.groups * random.integer(1, random.pick(most));
    call.out_channels = call.groups * random.integer(1, random.pick(most));
    call.height = random.integer(1, random.pick(longest));
    call.width = random.integer(1, random.pick(longest));
    for (int64_t& padding : call.padding) {
      padding = random.integer(-1, 4);
    }
    call.bias = random.integer(0, 2) != 0;
    call.input = random.pick(layouts);
    call.hostile = random.integer(0, 2) == 0;
  } while (!call.fits() || call.batch * call.out_pixels() * call.channels * call.out_channels > 300000);
  return call;
}

[[noreturn]] void fail(const Call& call, const std::string& kind, const std::string& what) {
  std::printf("%s: %s\n  in %s\n", kind.c_str(), what.c_str(), call.describe().c_str());
  std::exit(1);
}

template <typename scalar_t>
struct Tensors {
  Tensor<scalar_t> input;
  std::vector<scalar_t> weight, rotated, bias;

  Tensors(const Call& call, uint64_t seed) : input(call.batch, call.channels, call.height, call.width, call.input) {
    Random random(seed);
    const double bad[] = {kNaN, kInf, -kInf};
    input.fill([&](auto...) {
      return call.hostile && random.integer(0, 150) == 0 ? random.pick(bad) : random.uniform(-3, 3);
    });
    weight.resize(call.out_channels * call.inputs() * 9);
    for (scalar_t& value : weight) {
      value = from_double<scalar_t>(random.uniform(-1, 1));
    }
    bias.resize(call.bias ? call.out_channels : 0);
    for (scalar_t& value : bias) {
      value = from_double<scalar_t>(random.uniform(-2, 2));
    }
    // The weight of a convolution that this one is the gradient of: [C][O / G][9].
    rotated.resize(weight.size());
    for (int64_t g = 0; g < call.groups; ++g) {
      for (int64_t o = 0; o < call.outputs(); ++o) {
        for (int64_t c = 0; c < call.inputs(); ++c) {
          for (int64_t tap = 0; tap < 9; ++tap) {
            rotated[((g * call.inputs() + c) * call.outputs() + o) * 9 + 8 - tap] = at(call, g, o, c, tap);
          }
        }
      }
    }
  }
  scalar_t at(const Call& call, int64_t g, int64_t o, int64_t c, int64_t tap) const {
    return weight[((g * call.outputs() + o) * call.inputs() + c) * 9 + tap];
  }
  WinogradWeight<scalar_t> view(const Call& call, bool turned) const {
    const int64_t outputs = call.outputs(), inputs = call.inputs(), group = outputs * inputs * 9;
    if (turned) {
      return {rotated.data(), call.groups, outputs, inputs, group, 9, outputs * 9, true};
    }
    return {weight.data(), call.groups, outputs, inputs, group, inputs * 9, 9, false};
  }
};

// What the operator is, in double, and what a pixel that is NaN or infinite does to each output.
struct Expected {
  Numbers numbers;
  std::vector<bool> must, may;  // be NaN or infinite

  template <typename scalar_t>
  Expected(const Call& call, const Tensors<scalar_t>& tensors, int64_t tile)
      : numbers(call.batch * call.out_channels * call.out_pixels()),
        must(numbers.sum.size()),
        may(numbers.sum.size()) {
    for (int64_t i = 0; i < static_cast<int64_t>(numbers.sum.size()); ++i) {
      const int64_t x = i % call.out(1), y = i / call.out(1) % call.out(0);
      const int64_t o = i / call.out_pixels() % call.out_channels, b = i / (call.out_pixels() * call.out_channels);
      const int64_t g = o / call.outputs();
      if (call.bias) {
        numbers.add(i, static_cast<double>(tensors.bias[o]));
      }
      // All pixels that the tile reads; those that this output reads are among them.
      const int64_t top = y / tile * tile, left = x / tile * tile;
      for (int64_t c = 0; c < call.inputs(); ++c) {
        for (int64_t p = 0; p < (tile + 2) * (tile + 2); ++p) {
          const int64_t row = top + p / (tile + 2), column = left + p % (tile + 2);
          const int64_t from_y = row - call.padding[0], from_x = column - call.padding[1];
          if (from_y < 0 || from_y >= call.height || from_x < 0 || from_x >= call.width) {
            continue;
          }
          const double pixel = tensors.input(b, g * call.inputs() + c, from_y, from_x);
          const bool reads = row >= y && row < y + 3 && column >= x && column < x + 3;
          if (!std::isfinite(pixel)) {
            may[i] = true;
            must[i] = must[i] || reads;
          } else {
            // Every pixel of the tile takes part in the rounding.
            const double weight =
                reads ? static_cast<double>(tensors.at(call, g, o % call.outputs(), c, (row - y) * 3 + column - x)) : 0;
            numbers.add(i, weight * pixel, std::abs(pixel));
          }
        }
      }
    }
  }
};

// How a call runs: the result must not depend on it.
struct Setting {
  int64_t tiles, panels;  // of WinogradBlocking
  int threads;
  bool channels_last;  // memory format of the result
  bool in_call;        // the weight is transformed there
  bool rotated;        // it is that of the convolution that this one is the gradient of
};
const Setting kSettings[] = {
    {48, 2, 1, true, false, false},
    {48, 2, 2, false, true, false},
    {1, 1, 3, true, true, true},
    {13, 3, 5, false, false, true},
    {kHuge, kHuge, 3, true, false, false}};

template <bool kChannelsLast, int kTile, int64_t kDepth, typename scalar_t, typename Store>
void run(const Call& call, const Tensors<scalar_t>& tensors, const Setting& setting, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  const WinogradWeight<scalar_t> weight = tensors.view(call, setting.rotated);
  constexpr int64_t kPoints = (kTile + 2) * (kTile + 2);
  const inductor_vision::Scratch<acc_t> transformed(
      call.groups * weight.panels() * kPoints * call.inputs() * inductor_vision::kPanel<acc_t>);
  omp_set_num_threads(setting.threads);
  inductor_vision::winograd_weight<kTile>(weight, transformed.get());
  const WinogradConv2d<scalar_t> op{
      tensors.input.view(),
      setting.in_call ? nullptr : transformed.get(),
      call.bias ? tensors.bias.data() : nullptr,
      call.batch,
      call.channels,
      call.height,
      call.width,
      call.out_channels,
      call.out(0),
      call.out(1),
      call.padding[0],
      call.padding[1],
      call.groups};
  const WinogradBlocking blocking{setting.tiles, setting.panels};
  if (setting.in_call) {
    inductor_vision::winograd_conv2d<kChannelsLast, kTile, kDepth>(op, weight, blocking, store);
  } else {
    inductor_vision::winograd_conv2d<kChannelsLast, kTile, kDepth>(op, blocking, store);
  }
}

// Runs the kernel once, with a store of blocks, or with the one that lets it write the output itself.
template <bool kChannelsLast, int kTile, int64_t kDepth, typename scalar_t>
Results<accumulate_t<scalar_t>> results(
    const Call& call, const std::string& kind, const Tensors<scalar_t>& tensors, const Setting& setting,
    bool in_place) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t channels = call.out_channels, pixels = call.out_pixels();
  Results<acc_t> out(call.batch, channels, call.out(0), call.out(1));
  if (in_place) {
    const std::unique_ptr<acc_t[]> written(new acc_t[call.batch * pixels * channels]);
    std::fill_n(written.get(), call.batch * pixels * channels, poison<acc_t>());
    const DenseStore<kChannelsLast, acc_t> store{written.get(), channels, call.out(0), call.out(1)};
    run<kChannelsLast, kTile, kDepth>(call, tensors, setting, store);
    for (int64_t b = 0; b < call.batch; ++b) {
      const inductor_vision::OutputBlock image{b, 0, channels, 0, call.out(0), 0, call.out(1)};
      out.add(kChannelsLast, image, written.get() + b * pixels * channels, store.distance());
    }
  } else {
    run<kChannelsLast, kTile, kDepth>(call, tensors, setting, Sink<acc_t>{&out, kChannelsLast});
  }
  std::string complaint;
  if (!out.written(1, &complaint)) {
    fail(call, kind, complaint);
  }
  return out;
}

// One call against the direct convolution and against itself.
template <int kTile, int64_t kDepth, typename scalar_t>
void check(const Call& call, const std::string& kind, uint64_t seed, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  const Tensors<scalar_t> tensors(call, seed);
  const Expected expected(call, tensors, kTile);
  const std::vector<acc_t> first = results<true, kTile, kDepth>(call, kind, tensors, kSettings[0], false).values();
  for (size_t i = 0; i < first.size(); ++i) {
    const double value = static_cast<double>(first[i]), want = expected.numbers.sum[i];
    const double allowed = (std::is_same_v<acc_t, double> ? 1e-14 : 4e-6) * (expected.numbers.magnitude[i] + 1);
    const bool good = std::isfinite(value) ? !expected.must[i] && std::abs(value - want) <= allowed : expected.may[i];
    if (!good && !(expected.may[i] && !expected.must[i])) {
      fail(
          call, kind,
          "output " + std::to_string(i) + " is " + std::to_string(value) + ", expected " + std::to_string(want));
    }
    if (!expected.may[i]) {
      figures.error = std::max(figures.error, std::abs(value - want) / allowed);
    }
  }
  ++figures.calls;
  for (const Setting& setting : kSettings) {
    for (const bool in_place : {false, true}) {
      ++figures.runs;
      const std::vector<acc_t> other =
          setting.channels_last ? results<true, kTile, kDepth>(call, kind, tensors, setting, in_place).values()
                                : results<false, kTile, kDepth>(call, kind, tensors, setting, in_place).values();
      if (!same_bits(first, other)) {
        fail(
            call, kind,
            "the bits depend on blocks, threads, format or weight (" + std::to_string(setting.tiles) + " tiles, " +
                std::to_string(setting.threads) + " threads, in place " + std::to_string(in_place) + ")");
      }
    }
  }
}

template <int kTile, int64_t kDepth, typename scalar_t>
void check_type(const char* type, int random_calls, Figures& figures) {
  const std::string kind = std::string(type) + ", tile " + std::to_string(kTile);
  Random random(sizeof(scalar_t) + kTile);
  uint64_t seed = 1;
  for (const Call& call : kCalls) {
    check<kTile, kDepth, scalar_t>(call, kind, seed++, figures);
  }
  for (int i = 0; i < random_calls; ++i) {
    check<kTile, kDepth, scalar_t>(random_call(random), kind, seed++, figures);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int random_calls = argc > 1 ? std::atoi(argv[1]) : 40;
  Figures figures;
  check_type<4, 32, float>("float", random_calls, figures);
  check_type<2, 16, float>("float", random_calls, figures);
  check_type<4, 16, double>("double", random_calls, figures);
  check_type<4, 16, at::BFloat16>("bf16", random_calls, figures);
  figures.print();
  return 0;
}
