// Runs the kernel of direct_conv2d.h against a loop in double, to be built with sanitizers.
//
// Each call runs for several sizes of tiles and slices, memory formats of the result and numbers of threads: results
// must agree to the bit.  All memory is allocated to the exact size, so that AddressSanitizer sees any access beyond
// it; gaps between the elements of strided tensors are NaN, so that a read of one shows in the result; every output
// must be written exactly once.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "direct_conv2d.h"

#include "harness.h"

#include <cinttypes>
#include <cmath>
#include <cstdio>

namespace {

using namespace harness;
using inductor_vision::accumulate_t;
using inductor_vision::DenseStore;
using inductor_vision::DirectBlocking;
using inductor_vision::DirectConv2d;
using inductor_vision::kPanel;

struct Call {
  int64_t batch, channels, out_channels, height, width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  bool depthwise, bias;
  Layout input;

  int64_t out(int axis) const {
    const int64_t size = axis == 0 ? height : width;
    return (size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }
  int64_t inputs() const {
    return depthwise ? 1 : channels;
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
        ", depthwise %d, bias %d, input layout %d",
        batch, channels, out_channels, height, width, kernel[0], kernel[1], stride[0], stride[1], padding[0],
        padding[1], dilation[0], dilation[1], depthwise, bias, static_cast<int>(input));
    return text;
  }
};

// Calls whose shapes sit at the edges of tiles, slices, panels and vectors.
const Call kCalls[] = {
    {1, 16, 32, 7, 7, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false, true, Layout::channels_last},
    {2, 5, 37, 6, 9, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false, true, Layout::sliced_channels_last},
    {1, 40, 150, 1, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false, true, Layout::channels_last},  // a single pixel
    {2, 19, 17, 9, 8, {1, 1}, {2, 2}, {0, 0}, {1, 1}, false, false, Layout::channels_last},
    {1, 6, 20, 5, 4, {1, 1}, {1, 2}, {1, 2}, {1, 1}, false, true, Layout::contiguous},
    {2, 3, 18, 17, 15, {3, 3}, {2, 2}, {1, 1}, {1, 1}, false, true, Layout::contiguous},  // an image
    {1, 17, 9, 8, 31, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false, true, Layout::channels_last},
    {1, 4, 16, 9, 9, {3, 2}, {1, 1}, {0, 0}, {1, 1}, false, true, Layout::channels_last},  // in place
    {1, 4, 16, 9, 9, {3, 2}, {1, 1}, {0, 0}, {1, 1}, false, true, Layout::sliced_channels_last},
    {1, 4, 5, 9, 3, {3, 1}, {1, 1}, {2, 0}, {2, 3}, false, true, Layout::sliced},
    {1, 2, 3, 3, 3, {5, 5}, {1, 1}, {4, 4}, {1, 1}, false, true, Layout::transposed},  // taps that meet padding alone
    {0, 8, 8, 4, 4, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false, true, Layout::contiguous},
    {1, 16, 16, 7, 7, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, true, Layout::channels_last},
    {2, 37, 37, 9, 6, {3, 3}, {2, 2}, {1, 1}, {1, 1}, true, true, Layout::sliced_channels_last},
    {1, 70, 70, 5, 30, {5, 5}, {1, 2}, {2, 1}, {1, 1}, true, false, Layout::contiguous},
    {1, 3, 3, 8, 7, {3, 3}, {1, 1}, {2, 2}, {2, 2}, true, true, Layout::images_in_rows},
    {2, 20, 20, 1, 1, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, true, Layout::expanded},
};

Call random_call(Random& random) {
  const int64_t most[] = {3, 20, 70};
  const int64_t longest[] = {4, 12, 40};
  const Layout layouts[] = {Layout::contiguous,           Layout::channels_last,  Layout::sliced,
                            Layout::sliced_channels_last, Layout::images_in_rows, Layout::expanded};
  Call call{};
  do {
    call.depthwise = random.integer(0, 1) == 0;
    call.batch = random.integer(1, 3);
    call.channels = random.integer(2, random.pick(most));
    call.out_channels = call.depthwise ? call.channels : random.integer(1, random.pick(most));
    call.height = random.integer(1, random.pick(longest));
    call.width = random.integer(1, random.pick(longest));
    for (int axis = 0; axis < 2; ++axis) {
      call.kernel[axis] = random.integer(1, 4);
      call.stride[axis] = random.integer(1, 3);
      call.padding[axis] = random.integer(0, 3);
      call.dilation[axis] = axis == 1 && !call.depthwise && call.kernel[1] > 1 ? 1 : random.integer(1, 2);
    }
    call.bias = random.integer(0, 2) != 0;
    call.input = random.pick(layouts);
  } while (call.out(0) < 1 || call.out(1) < 1 ||
           call.batch * call.out(0) * call.out(1) * call.inputs() * call.out_channels * call.taps() > 500000);
  return call;
}

[[noreturn]] void fail(const Call& call, const std::string& kind, const std::string& what) {
  std::printf("%s: %s\n  in %s\n", kind.c_str(), what.c_str(), call.describe().c_str());
  std::exit(1);
}

template <typename scalar_t>
struct Tensors {
  using acc_t = accumulate_t<scalar_t>;
  Tensor<scalar_t> input;
  std::vector<acc_t> weight, packed;  // [O][C / G][taps], and as the kernel has it
  std::vector<scalar_t> bias;

  Tensors(const Call& call, uint64_t seed) : input(call.batch, call.channels, call.height, call.width, call.input) {
    Random random(seed);
    input.fill([&](auto...) { return random.uniform(-3, 3); });
    const int64_t inputs = call.inputs(), taps = call.taps(), lanes = kPanel<acc_t>;
    weight.resize(call.out_channels * inputs * taps);
    for (acc_t& value : weight) {
      value = from_double<acc_t>(random.uniform(-1, 1));
    }
    const int64_t outputs = inductor_vision::round_up(call.out_channels, lanes);
    packed.resize(call.depthwise ? weight.size() : outputs * inputs * taps, 0);
    for (int64_t o = 0; o < call.out_channels; ++o) {
      for (int64_t c = 0; c < inputs; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t to = call.depthwise ? tap * call.channels + o
                                            : (o / lanes * taps * inputs + tap * inputs + c) * lanes + o % lanes;
          packed[to] = weight[(o * inputs + c) * taps + tap];
        }
      }
    }
    bias.resize(call.bias ? call.out_channels : 0);
    for (scalar_t& value : bias) {
      value = from_double<scalar_t>(random.uniform(-2, 2));
    }
  }
};

template <typename scalar_t>
Numbers expected_of(const Call& call, const Tensors<scalar_t>& tensors) {
  const int64_t pixels = call.out(0) * call.out(1);
  Numbers numbers(call.batch * call.out_channels * pixels);
  for (int64_t i = 0; i < static_cast<int64_t>(numbers.sum.size()); ++i) {
    const int64_t x = i % call.out(1), y = i / call.out(1) % call.out(0);
    const int64_t o = i / pixels % call.out_channels, b = i / (pixels * call.out_channels);
    numbers.add(i, call.bias ? static_cast<double>(tensors.bias[o]) : 0);
    for (int64_t c = 0; c < call.inputs(); ++c) {
      for (int64_t tap = 0; tap < call.taps(); ++tap) {
        const int64_t row = y * call.stride[0] - call.padding[0] + tap / call.kernel[1] * call.dilation[0];
        const int64_t column = x * call.stride[1] - call.padding[1] + tap % call.kernel[1] * call.dilation[1];
        if (row >= 0 && row < call.height && column >= 0 && column < call.width) {
          const double weight = static_cast<double>(tensors.weight[(o * call.inputs() + c) * call.taps() + tap]);
          numbers.add(i, weight * tensors.input(b, call.depthwise ? o : c, row, column));
        }
      }
    }
  }
  return numbers;
}

// How a call runs: the result must not depend on it.
struct Setting {
  int64_t pixels, channels;  // of DirectBlocking
  int threads;
  bool channels_last;  // memory format of the result
};
const Setting kSettings[] = {
    {56, 64, 1, true}, {56, 64, 2, false}, {1, 16, 3, true}, {13, 32, 5, false}, {kHuge, 1024, 3, true}};

template <bool kChannelsLast, typename scalar_t, typename Store>
void run(const Call& call, const Tensors<scalar_t>& tensors, const Setting& setting, const Store& store) {
  omp_set_num_threads(setting.threads);
  const DirectConv2d<scalar_t> op{
      tensors.input.view(), tensors.packed.data(), call.bias ? tensors.bias.data() : nullptr,
      call.batch,           call.channels,         call.height,
      call.width,           call.out_channels,     call.out(0),
      call.out(1),          call.kernel[0],        call.kernel[1],
      call.stride[0],       call.stride[1],        call.padding[0],
      call.padding[1],      call.dilation[0],      call.dilation[1]};
  const DirectBlocking blocking{setting.pixels, setting.channels, 0};
  if (call.depthwise) {
    inductor_vision::direct_conv2d<kChannelsLast, true>(op, blocking, store);
  } else {
    inductor_vision::direct_conv2d<kChannelsLast, false>(op, blocking, store);
  }
}

// Runs the kernel once, with a store of blocks, or with the one that lets it write the output itself.
template <bool kChannelsLast, typename scalar_t>
std::vector<accumulate_t<scalar_t>> results(
    const Call& call, const std::string& kind, const Tensors<scalar_t>& tensors, const Setting& setting,
    bool in_place) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t channels = call.out_channels, pixels = call.out(0) * call.out(1);
  Results<acc_t> out(call.batch, channels, call.out(0), call.out(1));
  if (in_place) {
    const std::unique_ptr<acc_t[]> written(new acc_t[call.batch * pixels * channels]);
    std::fill_n(written.get(), call.batch * pixels * channels, poison<acc_t>());
    const DenseStore<kChannelsLast, acc_t> store{written.get(), channels, call.out(0), call.out(1)};
    run<kChannelsLast>(call, tensors, setting, store);
    for (int64_t b = 0; b < call.batch; ++b) {
      const inductor_vision::OutputBlock image{b, 0, channels, 0, call.out(0), 0, call.out(1)};
      out.add(kChannelsLast, image, written.get() + b * pixels * channels, store.distance());
    }
  } else {
    run<kChannelsLast>(call, tensors, setting, Sink<acc_t>{&out, kChannelsLast});
  }
  std::string complaint;
  if (!out.written(1, &complaint)) {
    fail(call, kind, complaint);
  }
  return out.values();
}

// One call against the loop and against itself.
template <typename scalar_t>
void check(const Call& call, const std::string& kind, uint64_t seed, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  const Tensors<scalar_t> tensors(call, seed);
  const std::vector<acc_t> first = results<true>(call, kind, tensors, kSettings[0], false);
  const std::string complaint = complaint_of<acc_t>(first, expected_of(call, tensors), 1e-6, figures);
  if (!complaint.empty()) {
    fail(call, kind, complaint);
  }
  ++figures.calls;
  for (const Setting& setting : kSettings) {
    for (const bool in_place : {false, true}) {
      ++figures.runs;
      if (!same_bits(
              first, setting.channels_last ? results<true>(call, kind, tensors, setting, in_place)
                                           : results<false>(call, kind, tensors, setting, in_place))) {
        fail(
            call, kind,
            "the bits depend on tiles, threads or format (" + std::to_string(setting.pixels) + " pixels, " +
                std::to_string(setting.threads) + " threads, in place " + std::to_string(in_place) + ")");
      }
    }
  }
}

template <typename scalar_t>
void check_type(const std::string& kind, int random_calls, Figures& figures) {
  Random random(sizeof(scalar_t));
  uint64_t seed = 1;
  for (const Call& call : kCalls) {
    check<scalar_t>(call, kind, seed++, figures);
  }
  for (int i = 0; i < random_calls; ++i) {
    check<scalar_t>(random_call(random), kind, seed++, figures);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int random_calls = argc > 1 ? std::atoi(argv[1]) : 40;
  Figures figures;
  check_type<float>("float", random_calls, figures);
  check_type<double>("double", random_calls, figures);
  check_type<at::BFloat16>("bf16", random_calls, figures);
  figures.print();
  return 0;
}
