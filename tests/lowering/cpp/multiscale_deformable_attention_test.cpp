// Runs the kernels of multiscale_deformable_attention.h and its gradients against a plain loop, to be built with
// sanitizers.
//
// Each call runs on several numbers of threads, which must give the same bits.  All memory is allocated to the exact
// size, so that AddressSanitizer sees any access beyond it; gaps between the elements of strided tensors are NaN, so
// that a read of one shows in the result.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "multiscale_deformable_attention_backward.h"

#include <cinttypes>
#include <cstdio>

#include "harness.h"

namespace {

using harness::Figures;
using harness::from_double;
using harness::kInf;
using harness::kNaN;
using harness::Layout;
using harness::Numbers;
using harness::Output;
using harness::Random;
using harness::Results;
using harness::Sink;
using harness::Tensor;
using inductor_vision::accumulate_t;
using inductor_vision::DeformableAttention;
using inductor_vision::DeformableAttentionGradients;
using inductor_vision::HeadsView;

// Around those of vectors, and of what is done together.
constexpr int64_t kChannels[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65};
constexpr int64_t kQueries[] = {0, 1, 2, 5, 31, 32, 33, 40};
constexpr int64_t kLengths[] = {1, 1, 2, 3, 5, 9};
constexpr int64_t kPoints[] = {1, 2, 3, 4, 5, 9};
constexpr int64_t kBytes[] = {1, 512, 4096, 1 << 20};
// As a [B, S, H, D] tensor: natural, as rf-detr has it, with gaps of both kinds, one image for all.
constexpr Layout kLayouts[] = {
    Layout::contiguous, Layout::channels_last, Layout::sliced, Layout::sliced_channels_last, Layout::expanded};

struct Call {
  int64_t batch, queries, heads, channels;
  std::vector<int64_t> sizes, points;
  Layout layout;
  bool hostile;  // locations and values
  int64_t bytes;

  int64_t pixels() const {
    int64_t sum = 0;
    for (size_t l = 0; l < points.size(); ++l) {
      sum += sizes[2 * l] * sizes[2 * l + 1];
    }
    return sum;
  }
  int64_t count() const {
    int64_t sum = 0;
    for (const int64_t n : points) {
      sum += n;
    }
    return sum;
  }
  std::string describe() const {
    std::string text = std::to_string(batch) + " images, " + std::to_string(queries) + " queries, " +
                       std::to_string(heads) + " heads of " + std::to_string(channels) + ", layout " +
                       std::to_string(static_cast<int>(layout)) + ", hostile " + std::to_string(hostile) + ", tiles " +
                       std::to_string(bytes) + ", levels";
    for (size_t l = 0; l < points.size(); ++l) {
      text +=
          " " + std::to_string(sizes[2 * l]) + "x" + std::to_string(sizes[2 * l + 1]) + ":" + std::to_string(points[l]);
    }
    return text;
  }
};

[[noreturn]] void fail(const char* type, const std::string& what, const Call& call) {
  std::printf("%s: %s\n  in %s\n", type, what.c_str(), call.describe().c_str());
  std::exit(1);
}

// A contiguous tensor to the exact size, filled by f(i).
template <typename T, typename F>
std::unique_ptr<T[]> filled(int64_t count, const F& f) {
  std::unique_ptr<T[]> values(new T[count]);
  for (int64_t i = 0; i < count; ++i) {
    values[i] = from_double<T>(f(i));
  }
  return values;
}

template <typename scalar_t, typename other_t>
struct Tensors {
  Tensor<scalar_t> value;
  std::unique_ptr<scalar_t[]> grad;
  std::unique_ptr<other_t[]> locations, weights;
};

struct Expected {
  Numbers out, value, locations, weights;
};

template <bool kDiscrete, typename scalar_t, typename other_t>
Expected plain_loop(const Call& call, const Tensors<scalar_t, other_t>& in) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t count = call.count(), places = call.batch * call.queries * call.heads;
  Expected expected{
      Numbers(call.batch * call.heads * call.channels * call.queries),
      Numbers(call.batch * call.pixels() * call.heads * call.channels), Numbers(places * count * 2),
      Numbers(places * count)};
  for (int64_t place = 0; place < places; ++place) {
    const int64_t h = place % call.heads, q = place / call.heads % call.queries, b = place / call.heads / call.queries;
    int64_t first = 0, k = 0;
    for (size_t l = 0; l < call.points.size(); ++l) {
      const int64_t height = call.sizes[2 * l], width = call.sizes[2 * l + 1];
      for (int64_t p = 0; p < call.points[l]; ++p, ++k) {
        const int64_t at = place * count + k;
        const acc_t shift = kDiscrete ? acc_t(0.5) : acc_t(-0.5);
        const acc_t x = static_cast<acc_t>(in.locations[2 * at]) * static_cast<acc_t>(width) + shift;
        const acc_t y = static_cast<acc_t>(in.locations[2 * at + 1]) * static_cast<acc_t>(height) + shift;
        const double weight = static_cast<double>(in.weights[at]);
        double row, column, down = 0, right = 0;
        if (kDiscrete) {
          if (!std::isfinite(x) || !std::isfinite(y)) {
            continue;
          }
          row = std::clamp(std::trunc(static_cast<double>(y)), 0.0, static_cast<double>(height - 1));
          column = std::clamp(std::trunc(static_cast<double>(x)), 0.0, static_cast<double>(width - 1));
        } else {
          if (!(x > -1 && y > -1 && x < static_cast<acc_t>(width) && y < static_cast<acc_t>(height))) {
            continue;
          }
          row = std::floor(static_cast<double>(y)), column = std::floor(static_cast<double>(x));
          down = static_cast<double>(y) - row, right = static_cast<double>(x) - column;
        }
        for (int corner = 0; corner < (kDiscrete ? 1 : 4); ++corner) {
          const int64_t i = static_cast<int64_t>(row) + corner / 2, j = static_cast<int64_t>(column) + corner % 2;
          if (i < 0 || i >= height || j < 0 || j >= width) {
            continue;
          }
          const int64_t pixel = first + i * width + j;
          const double vertical = corner / 2 == 0 ? 1 - down : down, horizontal = corner % 2 == 0 ? 1 - right : right;
          for (int64_t d = 0; d < call.channels; ++d) {
            const double value = in.value(b, pixel, h, d), bound = std::abs(weight * value);
            const double g = static_cast<double>(in.grad[place * call.channels + d]), product = g * value;
            expected.out.add(
                ((b * call.heads + h) * call.channels + d) * call.queries + q, vertical * horizontal * weight * value,
                bound);
            expected.value.add(
                ((b * call.pixels() + pixel) * call.heads + h) * call.channels + d, vertical * horizontal * weight * g,
                std::abs(weight * g));
            expected.weights.add(at, vertical * horizontal * product, std::abs(product));
            if (!kDiscrete) {
              const double to_right = static_cast<double>(width) * weight * vertical * product;
              const double to_bottom = static_cast<double>(height) * weight * horizontal * product;
              const double most = static_cast<double>(std::max(width, height)) * std::abs(weight * product);
              expected.locations.add(2 * at, corner % 2 == 0 ? -to_right : to_right, most);
              expected.locations.add(2 * at + 1, corner / 2 == 0 ? -to_bottom : to_bottom, most);
            }
          }
        }
      }
      first += height * width;
    }
  }
  return expected;
}

template <typename scalar_t, typename other_t>
struct Given {
  std::vector<accumulate_t<scalar_t>> out;
  std::vector<scalar_t> value;
  std::vector<other_t> locations, weights;
};

template <bool kDiscrete, bool kStrided, typename scalar_t, typename other_t>
Given<scalar_t, other_t> run(
    const char* type, const Call& call, const Tensors<scalar_t, other_t>& in, int threads, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  ++figures.runs;
  omp_set_num_threads(threads);
  const auto& view = in.value.view();
  const HeadsView<const scalar_t> value{view.data, view.image, view.channel, view.row, view.column};
  const DeformableAttention<scalar_t, other_t, other_t> op{
      value,
      in.locations.get(),
      in.weights.get(),
      call.sizes.data(),
      call.points.data(),
      static_cast<int64_t>(call.points.size()),
      call.batch,
      call.pixels(),
      call.queries,
      call.heads,
      call.channels};
  Results<acc_t> out(call.batch, call.heads * call.channels, 1, call.queries);
  inductor_vision::multiscale_deformable_attention<kDiscrete, kStrided>(op, Sink<acc_t>{&out, true});
  std::string complaint;
  if (!out.written(1, &complaint)) {
    fail(type, complaint, call);
  }
  const int64_t points = call.batch * call.queries * call.heads * call.count();
  Output<scalar_t> of_value(call.batch * call.pixels() * call.heads * call.channels);
  Output<other_t> of_locations(2 * points), of_weights(points);
  const DeformableAttentionGradients<scalar_t, other_t, other_t> gradients{
      in.grad.get(), of_value.get(), of_locations.get(), of_weights.get(), call.bytes};
  inductor_vision::multiscale_deformable_attention_backward<kDiscrete, kStrided>(op, gradients);
  return {out.values(), of_value.numbers(), of_locations.numbers(), of_weights.numbers()};
}

template <bool kDiscrete, bool kStrided, typename scalar_t, typename other_t>
void check(const char* type, const Call& call, const Tensors<scalar_t, other_t>& in, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  ++figures.calls;
  const auto first = run<kDiscrete, kStrided>(type, call, in, 1, figures);
  const Expected expected = plain_loop<kDiscrete>(call, in);
  const std::string complaints[] = {
      harness::complaint_of<acc_t>(first.out, expected.out, 2e-6, figures),
      harness::complaint_of<acc_t>(first.value, expected.value, 2e-6, figures),
      harness::complaint_of<acc_t>(first.locations, expected.locations, 2e-6, figures),
      harness::complaint_of<acc_t>(first.weights, expected.weights, 2e-6, figures)};
  const char* names[] = {"result", "gradient of value", "gradient of locations", "gradient of weights"};
  for (int i = 0; i < 4; ++i) {
    if (!complaints[i].empty()) {
      fail(type, std::string(names[i]) + ": " + complaints[i], call);
    }
  }
  for (const int threads : {2, 3}) {
    const auto other = run<kDiscrete, kStrided>(type, call, in, threads, figures);
    if (!harness::same_bits(other.out, first.out) || !harness::same_bits(other.value, first.value) ||
        !harness::same_bits(other.locations, first.locations) || !harness::same_bits(other.weights, first.weights)) {
      fail(type, "other bits on " + std::to_string(threads) + " threads", call);
    }
  }
}

template <typename scalar_t, typename other_t>
void check_type(const char* type, int calls, Figures& figures) {
  Random random(sizeof(scalar_t) + 16 * std::is_same_v<scalar_t, at::Half>);
  for (int i = 0; i < calls; ++i) {
    Call call{random.integer(0, 2),  random.pick(kQueries),     random.integer(1, 3), random.pick(kChannels), {}, {},
              random.pick(kLayouts), random.integer(0, 3) == 0, random.pick(kBytes)};
    for (int64_t l = random.integer(1, 3); l > 0; --l) {
      call.sizes.push_back(random.pick(kLengths)), call.sizes.push_back(random.pick(kLengths));
      call.points.push_back(random.pick(kPoints));
    }
    const double hostile[] = {kNaN, kInf, -kInf, 1e30, -1e30, 2147483648.0, 9.3e18, -9.3e18};
    const int64_t places = call.batch * call.queries * call.heads, points = places * call.count();
    Tensors<scalar_t, other_t> in{
        Tensor<scalar_t>(call.batch, call.pixels(), call.heads, call.channels, call.layout),
        filled<scalar_t>(places * call.channels, [&](int64_t) { return random.uniform(-1, 1); }),
        filled<other_t>(
            2 * points,
            [&](int64_t) {
              const bool far = call.hostile && random.integer(0, 4) == 0;
              return far ? random.pick(hostile) : random.uniform(-0.3, 1.3);
            }),
        filled<other_t>(points, [&](int64_t) { return random.uniform(-1, 1); })};
    in.value.fill([&](int64_t, int64_t, int64_t, int64_t) { return random.uniform(-1, 1); });
    const bool strided = call.layout == Layout::channels_last || call.layout == Layout::sliced_channels_last;
    if (i % 4 == 0) {
      strided ? check<true, true>(type, call, in, figures) : check<true, false>(type, call, in, figures);
    } else {
      strided ? check<false, true>(type, call, in, figures) : check<false, false>(type, call, in, figures);
    }
    call.sizes[0] += 1;  // more pixels than there are
    omp_set_num_threads(2);
    try {
      std::vector<int64_t> sizes = call.sizes;
      const DeformableAttention<scalar_t, other_t, other_t> op{{},
                                                               nullptr,
                                                               nullptr,
                                                               sizes.data(),
                                                               call.points.data(),
                                                               static_cast<int64_t>(call.points.size()),
                                                               1,
                                                               call.pixels() - 1,
                                                               1,
                                                               1,
                                                               1};
      inductor_vision::multiscale_deformable_attention<false, false>(op, [](const auto&...) {});
      fail(type, "sizes that do not add up are taken", call);
    } catch (const std::runtime_error&) {
      ++figures.rejected;
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 50;
  Figures figures;
  check_type<float, float>("float", calls, figures);
  check_type<double, double>("double", calls, figures);
  check_type<double, float>("double and float", calls, figures);
  check_type<at::BFloat16, float>("bf16 and float", calls, figures);
  check_type<at::Half, at::Half>("fp16", calls, figures);
  std::printf(
      "lanes=%d calls=%" PRId64 " runs=%" PRId64 " rejected=%" PRId64 " error=%.3g\n",
      static_cast<int>(at::vec::Vectorized<float>::size()), figures.calls, figures.runs, figures.rejected,
      figures.error);
  return 0;
}
