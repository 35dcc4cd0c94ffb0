// Runs the kernels of roi_align.h, roi_pool.h, ps_roi_align.h and ps_roi_pool.h, forward and backward, against plain
// loops in double, to be built with sanitizers.
//
// Each call runs for several budgets of cache, numbers of threads and memory formats of the result, which must agree to
// the bit.  All memory is allocated to the exact size, so that AddressSanitizer sees any access beyond it; gaps between
// the elements of strided tensors are NaN, so that a read of one shows in the result; every output must be written
// exactly once, and none where a box names an image that does not exist.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "ps_roi_align.h"
#include "ps_roi_pool.h"
#include "roi_align.h"
#include "roi_pool.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "harness.h"

namespace {

using harness::Figures;
using harness::from_double;
using harness::kHuge;
using harness::kInf;
using harness::kNaN;
using harness::Layout;
using harness::Random;
using harness::Results;
using harness::Sink;
using harness::Tensor;
using inductor_vision::accumulate_t;
using inductor_vision::Bins;
using inductor_vision::Boxes;
using inductor_vision::FeatureMaps;
using inductor_vision::GradMaps;
using inductor_vision::GridSampling;
using inductor_vision::OutputBlock;
using inductor_vision::PositionSensitiveMaps;
using inductor_vision::Pyramid;

// How a call runs: the result must not depend on it.
struct Setting {
  int64_t bytes;  // of Pyramid and GradMaps
  int threads;
  bool channels_last;  // memory format of the result
};
const Setting kSettings[] = {
    {1 << 20, 1, false}, {1 << 20, 2, true}, {1, 3, false}, {700, 2, true}, {9000, 3, true}, {kHuge, 2, false},
};

enum class Op { align, pool, ps_align, ps_pool };
constexpr Op kOps[] = {Op::align, Op::pool, Op::ps_align, Op::ps_pool};

const char* name(Op op) {
  const char* names[] = {"roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"};
  return names[static_cast<int>(op)];
}
bool position_sensitive(Op op) {
  return op == Op::ps_align || op == Op::ps_pool;
}

enum class BoxLayout { rows, columns, gaps };

enum class Coordinates {
  plain,
  hostile,  // some are NaN, infinite or huge
  far,      // boxes begin or end so far away that coordinates are rounded to many pixels
};

struct Call {
  int64_t batch, channels, height, width;
  int64_t levels;  // of roi_align; 0: one, and nothing says which regions are on it
  int64_t bins[2];
  int64_t regions;
  double spatial_scale;
  int64_t sampling_ratio;
  bool aligned;
  Layout input, grad;
  BoxLayout boxes;
  Coordinates coordinates;

  int64_t out_channels(Op op) const {
    return position_sensitive(op) ? std::min<int64_t>(channels, 7) : channels;
  }
  int64_t in_channels(Op op) const {
    return position_sensitive(op) ? out_channels(op) * bins[0] * bins[1] : channels;
  }
  int64_t maps(Op op) const {
    return op == Op::align ? std::max<int64_t>(levels, 1) : 1;
  }
  bool exists(Op op, int64_t level) const {
    return level >= 0 && level < maps(op);
  }
  int64_t height_of(int64_t level) const {
    return std::max<int64_t>(height >> level, 1);
  }
  int64_t width_of(int64_t level) const {
    return std::max<int64_t>(width >> level, 1);
  }
  double scale_of(int64_t level) const {
    return spatial_scale / static_cast<double>(1 << level);
  }
  // The kernels of operators that are not position-sensitive want neighbouring channels or columns.
  Layout input_of(Op op) const {
    const bool any = position_sensitive(op) || channels == 1;
    return !any && (input == Layout::transposed || input == Layout::constant) ? Layout::contiguous : input;
  }
  std::string describe() const {
    char text[400];
    std::snprintf(
        text, sizeof text,
        "batch %" PRId64 ", channels %" PRId64 ", size %" PRId64 "x%" PRId64 ", levels %" PRId64 ", bins %" PRId64
        "x%" PRId64 ", regions %" PRId64 ", scale %g, sampling ratio %" PRId64
        ", aligned %d, input layout %d, grad layout %d, box layout %d, coordinates %d",
        batch, channels, height, width, levels, bins[0], bins[1], regions, spatial_scale, sampling_ratio, aligned,
        static_cast<int>(input), static_cast<int>(grad), static_cast<int>(boxes), static_cast<int>(coordinates));
    return text;
  }
};

// [K, 5] on a buffer that ends with its last element.
template <typename box_t>
class BoxTensor {
 public:
  BoxTensor(int64_t count, BoxLayout layout)
      : row_(
            layout == BoxLayout::columns ? 1
            : layout == BoxLayout::rows  ? 5
                                         : 13),
        column_(
            layout == BoxLayout::columns ? count
            : layout == BoxLayout::rows  ? 1
                                         : 2),
        count_(count) {
    const int64_t elements = count == 0 ? 0 : (count - 1) * row_ + 4 * column_ + 1;
    data_.reset(new box_t[elements]);
    std::fill_n(data_.get(), elements, harness::poison<box_t>());
  }
  box_t& operator()(int64_t k, int64_t i) {
    return data_[k * row_ + i * column_];
  }
  const box_t& operator()(int64_t k, int64_t i) const {
    return data_[k * row_ + i * column_];
  }
  Boxes<box_t> view(const int64_t* levels) const {
    return {data_.get(), row_, column_, count_, levels};
  }

 private:
  int64_t row_, column_, count_;
  std::unique_ptr<box_t[]> data_;
};

// The ends of a box along an axis of a map of that length.
std::array<double, 2> random_ends(Random& random, int64_t length, Coordinates coordinates) {
  const double size = static_cast<double>(length), here = random.uniform(-2, size + 1);
  const double border[] = {-2.0, -1.0, -0.5, 0.0, 0.5, 1.5, size - 1, size - 0.5, size, size + 1, size + 2};
  const double far[] = {1e4, 1e6, 1e7, 1e8, 1e8};
  const double unreal[] = {kNaN, kInf,         -kInf,         1e30, -1e30, 3e38,  -3e38,
                           1e9,  2147483648.0, -2147483648.0, 1e19, -1e19, 1e-40, 2 * size};
  if (coordinates == Coordinates::far) {
    const double begin = -random.uniform(0.3, 10) * random.pick(far);
    return random.integer(0, 1) == 0 ? std::array<double, 2>{begin, here} : std::array<double, 2>{-size, 2 * size};
  }
  if (coordinates == Coordinates::hostile && random.integer(0, 2) == 0) {
    switch (random.integer(0, 3)) {
      case 0:
        return {-random.pick(far), here};
      case 1:
        return {here, random.pick(unreal)};
      case 2:
        return {random.pick(unreal), here};
      default:
        return {random.pick(unreal), random.pick(unreal)};
    }
  }
  switch (random.integer(0, 6)) {
    case 0:
      return {random.pick(border), random.pick(border)};
    case 1:
      return {here, here};
    case 2:
      return {here, here - random.uniform(0, size)};
    case 3:
      return {-random.uniform(0, 3) * size, random.uniform(1, 4) * size};
    case 4:
      return {std::round(here), std::round(here) + static_cast<double>(random.integer(0, 5))};
    default:
      return {here, here + random.uniform(0, size)};
  }
}

// The numbers in the tensors of a call, in double; maps[level][b][c][y][x], grad and argmax [k][c][p][q].
struct Numbers {
  std::vector<std::vector<double>> maps;
  std::vector<std::array<double, 5>> boxes;
  std::vector<int64_t> levels;
  std::vector<double> grad, argmax;

  Numbers(const Call& call, Op op, uint64_t seed) {
    Random random(seed);
    for (int64_t level = 0; level < call.maps(op); ++level) {
      maps.emplace_back(call.batch * call.in_channels(op) * call.height_of(level) * call.width_of(level));
      for (double& value : maps.back()) {
        value = op == Op::pool ? few_values(random) : random.uniform(-1, 1);
      }
    }
    for (int64_t k = 0; k < call.regions; ++k) {
      levels.push_back(op == Op::align && call.levels > 0 ? random_level(random, call.levels) : 0);
      const int64_t level = call.exists(op, levels[k]) ? levels[k] : 0;
      const auto y = random_ends(random, call.height_of(level), call.coordinates);
      const auto x = random_ends(random, call.width_of(level), call.coordinates);
      const double scale = call.scale_of(level), fractions[] = {0.0, 0.0, 0.5};  // are cut off, towards zero
      double image =
          static_cast<double>(random.integer(0, std::max<int64_t>(call.batch, 1) - 1)) + random.pick(fractions);
      image = image < 1 && random.integer(0, 4) == 0 ? -0.5 : image;
      boxes.push_back({image, x[0] / scale, y[0] / scale, x[1] / scale, y[1] / scale});
    }
    grad.resize(call.regions * call.out_channels(op) * call.bins[0] * call.bins[1]);
    argmax.resize(grad.size());
    for (size_t i = 0; i < grad.size(); ++i) {
      const int64_t pixels = call.height * call.width;
      const int64_t astray[] = {-1, -2, pixels, pixels + 1, INT32_MIN, INT32_MAX};
      grad[i] = random.uniform(-1, 1);
      argmax[i] = static_cast<double>(random.integer(0, 3) == 0 ? random.pick(astray) : random.integer(0, pixels - 1));
    }
  }
  int64_t image(int64_t k) const {
    return static_cast<int64_t>(boxes[k][0]);
  }

 private:
  // Few different ones, so that the first of several maxima counts.
  static double few_values(Random& random) {
    const double strange[] = {kNaN, -kInf, -0.0, kInf};
    return random.integer(0, 5) == 0 ? random.pick(strange) : static_cast<double>(random.integer(-3, 3)) / 2;
  }
  static int64_t random_level(Random& random, int64_t levels) {
    const int64_t none[] = {-1, levels, INT64_MIN, INT64_MAX};
    return random.integer(0, 5) == 0 ? random.pick(none) : random.integer(0, levels - 1);
  }
};

// The tensors of a call.
template <typename scalar_t, typename box_t>
struct Tensors {
  std::vector<Tensor<scalar_t>> maps;  // of each level
  BoxTensor<box_t> boxes;
  std::unique_ptr<int64_t[]> levels;  // null: all regions are on the first
  Tensor<scalar_t> grad;
  Tensor<int32_t> argmax;

  // `numbers` become what the tensors can hold.
  Tensors(const Call& call, Op op, Numbers& numbers)
      : boxes(call.regions, call.boxes),
        grad(call.regions, call.out_channels(op), call.bins[0], call.bins[1], call.grad),
        argmax(call.regions, call.out_channels(op), call.bins[0], call.bins[1], call.grad) {
    for (int64_t level = 0; level < call.maps(op); ++level) {
      maps.emplace_back(
          call.batch, call.in_channels(op), call.height_of(level), call.width_of(level), call.input_of(op));
      hold(maps.back(), numbers.maps[level]);
    }
    for (int64_t k = 0; k < call.regions; ++k) {
      for (int64_t i = 0; i < 5; ++i) {
        boxes(k, i) = from_double<box_t>(numbers.boxes[k][i]);
        numbers.boxes[k][i] = static_cast<double>(boxes(k, i));
      }
    }
    if (op == Op::align && call.levels > 0) {
      levels.reset(new int64_t[call.regions]);
      std::copy(numbers.levels.begin(), numbers.levels.end(), levels.get());
    }
    hold(grad, numbers.grad);
    hold(argmax, numbers.argmax);
  }
  Boxes<box_t> view() const {
    return boxes.view(levels.get());
  }

 private:
  template <typename T>
  static void hold(Tensor<T>& tensor, std::vector<double>& numbers) {
    const double* next = numbers.data();
    tensor.fill([&](auto...) { return *next++; });
    numbers = tensor.numbers();
  }
};

// What the operators are, read off torchvision's kernels: where samples and bins lie is computed in the type that
// theirs compute in, all else in double.

struct Part {
  int64_t y, x;
  double weight;
};

// The pixels of a region's bins.  `blur`, if not zero: there are too many samples to try them all; there may be parts
// of so much weight in all bins instead, anywhere.
struct Region {
  std::vector<std::vector<Part>> bins;
  double divisor = 1;
  double blur = 0;
};

// The samples of bins along an axis that are not outside the map.
template <typename acc_t>
struct Samples {
  std::vector<std::vector<acc_t>> bins;
  acc_t count;
  double blur;

  Samples(acc_t begin, acc_t end, int64_t n_bins, int64_t length, int64_t sampling_ratio, bool at_least_one)
      : bins(n_bins),
        blur(0) {
    const acc_t size = at_least_one && end - begin < 1 ? acc_t(1) : end - begin;
    const acc_t bin_size = size / static_cast<acc_t>(n_bins);
    count = sampling_ratio > 0 ? static_cast<acc_t>(sampling_ratio) : std::ceil(bin_size);
    if (!(count > 0) || !std::isfinite(count)) {
      return;
    }
    if (count > 20000) {
      blur = std::min(1.0, static_cast<double>(4 * length + 16) / static_cast<double>(count));
      return;
    }
    for (int64_t p = 0; p < n_bins; ++p) {
      for (int64_t i = 0; i < static_cast<int64_t>(count); ++i) {
        const acc_t at =
            begin + static_cast<acc_t>(p) * bin_size + (static_cast<acc_t>(i) + acc_t(0.5)) * bin_size / count;
        if (at >= -1 && at <= static_cast<acc_t>(length)) {
          bins[p].push_back(at);
        }
      }
    }
  }
};

struct Corners {
  int64_t pixel[2];
  double weight[2];

  Corners(double at, int64_t length) {
    at = std::max(at, 0.0);
    pixel[0] = std::min(static_cast<int64_t>(at), length - 1);
    pixel[1] = std::min(pixel[0] + 1, length - 1);
    weight[1] = pixel[0] == length - 1 ? 0 : at - static_cast<double>(pixel[0]);
    weight[0] = 1 - weight[1];
  }
};

// Which pixels the bins of a region cover along an axis: [begin, end).
template <typename acc_t>
std::vector<std::array<int64_t, 2>> covered(acc_t begin, acc_t end, int64_t bins, bool inclusive, int64_t limit) {
  std::vector<std::array<int64_t, 2>> ranges(bins, {0, 0});
  if (!std::isfinite(begin) || !std::isfinite(end)) {
    return ranges;
  }
  const double farthest = 1 << 30;
  const double first = std::max(-farthest, std::min(farthest, static_cast<double>(std::round(begin))));
  const double last = std::max(-farthest, std::min(farthest, static_cast<double>(std::round(end))));
  const acc_t bin_size =
      static_cast<acc_t>(std::max(last - first + (inclusive ? 1.0 : 0.0), 1.0)) / static_cast<acc_t>(bins);
  const auto cut = [&](acc_t at) {
    return static_cast<int64_t>(std::max(0.0, std::min(static_cast<double>(limit), static_cast<double>(at) + first)));
  };
  for (int64_t p = 0; p < bins; ++p) {
    ranges[p] = {
        cut(std::floor(static_cast<acc_t>(p) * bin_size)), cut(std::ceil(static_cast<acc_t>(p + 1) * bin_size))};
  }
  return ranges;
}

// `backward`: of the gradient, which ps_roi_pool's is not that of its forward.
template <typename acc_t>
Region plain_region(const Call& call, Op op, const Numbers& numbers, int64_t k, bool backward) {
  const int64_t level = numbers.levels[k];
  const int64_t height = call.height_of(level), width = call.width_of(level), columns = call.bins[1];
  acc_t box[4];
  for (int64_t i = 0; i < 4; ++i) {
    box[i] = static_cast<acc_t>(numbers.boxes[k][1 + i]) * static_cast<acc_t>(call.scale_of(level));
  }
  Region region;
  region.bins.resize(call.bins[0] * columns);
  if (op == Op::pool || op == Op::ps_pool) {
    const int64_t cut = op == Op::ps_pool && !backward ? 1 : 0;
    const auto y = covered(box[1], box[3], call.bins[0], op == Op::pool, height - cut);
    const auto x = covered(box[0], box[2], call.bins[1], op == Op::pool, width - cut);
    for (int64_t bin = 0; bin < call.bins[0] * columns; ++bin) {
      const auto [top, bottom] = y[bin / columns];
      const auto [left, right] = x[bin % columns];
      for (int64_t row = top; row < bottom; ++row) {
        for (int64_t column = left; column < right; ++column) {
          region.bins[bin].push_back({row, column, 1 / static_cast<double>((bottom - top) * (right - left))});
        }
      }
    }
    return region;
  }
  const acc_t shift = op == Op::ps_align || call.aligned ? acc_t(0.5) : acc_t(0);
  const bool at_least_one = op == Op::align && !call.aligned;
  const Samples<acc_t> y(box[1] - shift, box[3] - shift, call.bins[0], height, call.sampling_ratio, at_least_one);
  const Samples<acc_t> x(box[0] - shift, box[2] - shift, call.bins[1], width, call.sampling_ratio, at_least_one);
  const acc_t count = y.count * x.count;
  region.divisor = op == Op::ps_align || count > 1 ? static_cast<double>(count) : 1;
  if (y.count > 0 && x.count > 0 && std::isfinite(y.count) && std::isfinite(x.count) && y.blur + x.blur > 0) {
    region.blur = (y.blur > 0 ? y.blur : 1) * (x.blur > 0 ? x.blur : 1);
    return region;
  }
  std::vector<double> weights(height * width);
  for (int64_t bin = 0; bin < call.bins[0] * columns; ++bin) {
    std::fill(weights.begin(), weights.end(), 0.0);
    for (acc_t at_y : y.bins[bin / columns]) {
      for (acc_t at_x : x.bins[bin % columns]) {
        const Corners row(at_y, height), column(at_x, width);
        for (int corner = 0; corner < 4; ++corner) {
          weights[row.pixel[corner / 2] * width + column.pixel[corner % 2]] +=
              row.weight[corner / 2] * column.weight[corner % 2];
        }
      }
    }
    for (int64_t pixel = 0; pixel < height * width; ++pixel) {
      if (weights[pixel] != 0) {
        region.bins[bin].push_back({pixel / width, pixel % width, weights[pixel]});
      }
    }
  }
  return region;
}

// What is to come out, and by how much it may differ.
struct Expected {
  std::vector<double> values, allowed;
  std::vector<int32_t> argmax;
};

template <typename acc_t>
Expected plain_forward(const Call& call, Op op, const Numbers& numbers, double tolerance) {
  const int64_t bins = call.bins[0] * call.bins[1];
  Expected expected;
  for (int64_t k = 0; k < call.regions; ++k) {
    const bool exists = call.exists(op, numbers.levels[k]);
    const int64_t level = exists ? numbers.levels[k] : 0, height = call.height_of(level), width = call.width_of(level);
    Region region;
    region.bins.resize(bins);
    if (exists) {
      region = plain_region<acc_t>(call, op, numbers, k, false);
    }
    for (int64_t c = 0; c < call.out_channels(op); ++c) {
      for (int64_t bin = 0; bin < bins; ++bin) {
        const int64_t channel = position_sensitive(op) ? c * bins + bin : c;
        const int64_t plane = (numbers.image(k) * call.in_channels(op) + channel) * height * width;
        double sum = 0, magnitude = 0, best = region.bins[bin].empty() ? 0 : -std::numeric_limits<float>::max();
        int64_t argmax = -1;
        for (const Part& part : region.bins[bin]) {
          const double value = numbers.maps[level][plane + part.y * width + part.x];
          sum += part.weight * value;
          magnitude += part.weight * std::abs(value);
          if (value > best) {
            best = value;
            argmax = part.y * width + part.x;
          }
        }
        expected.values.push_back(op == Op::pool ? best : sum / region.divisor);
        expected.allowed.push_back(op == Op::pool ? 0 : tolerance * magnitude / region.divisor + region.blur);
        expected.argmax.push_back(static_cast<int32_t>(argmax));
      }
    }
  }
  return expected;
}

// The gradient of the maps of a level.
template <typename acc_t>
Expected plain_backward(const Call& call, Op op, const Numbers& numbers, int64_t level, double tolerance) {
  const int64_t bins = call.bins[0] * call.bins[1], height = call.height_of(level), width = call.width_of(level);
  Expected expected;
  expected.values.assign(call.batch * call.in_channels(op) * height * width, 0);
  expected.allowed.assign(expected.values.size(), 0);
  for (int64_t k = 0; k < call.regions; ++k) {
    if (numbers.levels[k] != level) {
      continue;
    }
    const Region region = plain_region<acc_t>(call, op, numbers, k, true);
    for (int64_t c = 0; c < call.out_channels(op); ++c) {
      for (int64_t bin = 0; bin < bins; ++bin) {
        const int64_t from = (k * call.out_channels(op) + c) * bins + bin;
        const int64_t channel = position_sensitive(op) ? c * bins + bin : c;
        const int64_t plane = (numbers.image(k) * call.in_channels(op) + channel) * height * width;
        const auto add = [&](int64_t y, int64_t x, double value) {
          expected.values[plane + y * width + x] += value;
          expected.allowed[plane + y * width + x] += tolerance * std::abs(value);
        };
        if (op == Op::pool) {
          const int64_t argmax = static_cast<int64_t>(numbers.argmax[from]);
          if (argmax >= 0 && argmax < height * width) {
            add(argmax / width, argmax % width, numbers.grad[from]);
          }
          continue;
        }
        for (const Part& part : region.bins[bin]) {
          add(part.y, part.x, part.weight * numbers.grad[from] / region.divisor);
        }
        for (int64_t pixel = 0; pixel < height * width && region.blur > 0; ++pixel) {
          expected.allowed[plane + pixel] += region.blur * std::abs(numbers.grad[from]);
        }
      }
    }
  }
  return expected;
}

// The `store_argmax` of roi_pool: the indices by way of store_indices.
template <typename acc_t>
struct IndexSink {
  Results<int32_t>* results;
  bool channels_last;

  void operator()(const OutputBlock& block, const acc_t* values, int64_t distance) const {
    const int64_t pixels = block.rows * block.columns;
    const int64_t outer = channels_last ? pixels : block.channels, inner = channels_last ? block.channels : pixels;
    std::vector<int32_t> indices(outer * inner);
    inductor_vision::store_indices(values, distance, indices.data(), inner, outer, inner);
    results->add(channels_last, block, indices.data(), inner);
  }
};

// Runs the kernel of an operator once; without `argmax`, roi_pool is not to find it.
template <bool kChannelsLast, typename scalar_t, typename box_t>
void forward(
    const Call& call, Op op, const Tensors<scalar_t, box_t>& tensors, const Setting& setting,
    Results<accumulate_t<scalar_t>>& out, Results<int32_t>* argmax) {
  using acc_t = accumulate_t<scalar_t>;
  omp_set_num_threads(setting.threads);
  std::vector<FeatureMaps<scalar_t>> levels;
  for (int64_t level = 0; level < call.maps(op); ++level) {
    levels.push_back({tensors.maps[level].view(), call.height_of(level), call.width_of(level), call.scale_of(level)});
  }
  const Pyramid<scalar_t> pyramid{levels.data(), call.maps(op), call.batch, call.channels, setting.bytes};
  const Bins bins{call.bins[0], call.bins[1]};
  const PositionSensitiveMaps<scalar_t> maps{levels[0], call.batch, call.out_channels(op), bins};
  const Boxes<box_t> boxes = tensors.view();
  const Sink<acc_t> store{&out, kChannelsLast};
  switch (op) {
    case Op::align:
      inductor_vision::roi_align<kChannelsLast>(
          pyramid, boxes, bins, GridSampling{call.sampling_ratio, call.aligned, false}, store);
      break;
    case Op::pool:
      if (argmax != nullptr) {
        inductor_vision::roi_pool<kChannelsLast, true>(
            pyramid, boxes, bins, store, IndexSink<acc_t>{argmax, kChannelsLast});
      } else {
        inductor_vision::roi_pool<kChannelsLast, false>(pyramid, boxes, bins, store, nullptr);
      }
      break;
    case Op::ps_align:
      inductor_vision::ps_roi_align<kChannelsLast>(maps, boxes, GridSampling{call.sampling_ratio, true, true}, store);
      break;
    case Op::ps_pool:
      inductor_vision::ps_roi_pool<kChannelsLast>(maps, boxes, store);
      break;
  }
}

template <bool kChannelsLast, typename scalar_t, typename box_t>
void backward(
    const Call& call, Op op, const Tensors<scalar_t, box_t>& tensors, int64_t level, const Setting& setting,
    Results<accumulate_t<scalar_t>>& out) {
  omp_set_num_threads(setting.threads);
  const Bins bins{call.bins[0], call.bins[1]};
  const GradMaps maps{call.batch,           call.in_channels(op), call.height_of(level),
                      call.width_of(level), call.scale_of(level), level,
                      setting.bytes};
  const Boxes<box_t> boxes = tensors.view();
  const auto& grad = tensors.grad.view();
  const Sink<accumulate_t<scalar_t>> store{&out, kChannelsLast};
  switch (op) {
    case Op::align:
      inductor_vision::roi_align_backward<kChannelsLast>(
          grad, boxes, bins, GridSampling{call.sampling_ratio, call.aligned, false}, maps, store);
      break;
    case Op::pool:
      inductor_vision::roi_pool_backward<kChannelsLast>(grad, tensors.argmax.view(), boxes, bins, maps, store);
      break;
    case Op::ps_align:
      inductor_vision::ps_roi_align_backward<kChannelsLast>(
          grad, boxes, bins, GridSampling{call.sampling_ratio, true, true}, maps, store);
      break;
    case Op::ps_pool:
      inductor_vision::ps_roi_pool_backward<kChannelsLast>(grad, boxes, bins, maps, store);
      break;
  }
}

// Where in the test we are, for messages.
struct Place {
  const Call& call;
  Op op;
  const char* kind;
  const char* direction;

  [[noreturn]] void fail(const std::string& what) const {
    std::printf("%s %s, %s: %s\n  in %s\n", name(op), direction, kind, what.c_str(), call.describe().c_str());
    std::exit(1);
  }
};

void check_throws(const Place& place, const std::string& box, const std::function<void()>& run) {
  std::string message;
  try {
    run();
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  if (message.find(name(place.op)) == std::string::npos || message.find(box) == std::string::npos) {
    place.fail("the message should name " + box + ": \"" + message + "\"");
  }
}

template <typename acc_t>
void compare(const Place& place, const std::vector<acc_t>& out, const Expected& expected, Figures& figures) {
  for (size_t i = 0; i < expected.values.size(); ++i) {
    const double got = static_cast<double>(out[i]), wanted = expected.values[i];
    if (got == wanted || (std::isnan(got) && std::isnan(wanted))) {
      continue;
    }
    const double error = std::abs(got - wanted);
    if (!(error <= expected.allowed[i])) {
      place.fail("output " + std::to_string(i) + " is " + std::to_string(got) + ", expected " + std::to_string(wanted));
    }
    figures.error = std::max(figures.error, error / expected.allowed[i]);
  }
}

// run(setting, out), for all settings, against what is expected and against itself.
template <typename acc_t>
void check_results(
    const Place& place, const Results<acc_t>& empty, const Expected& expected, Figures& figures,
    const std::function<void(const Setting&, Results<acc_t>&)>& run) {
  Results<acc_t> first = empty;
  for (const Setting& setting : kSettings) {
    Results<acc_t> out = empty;
    run(setting, out);
    ++figures.runs;
    std::string complaint;
    if (!out.written(1, &complaint)) {
      place.fail(complaint);
    }
    if (&setting == kSettings) {
      compare(place, out.values(), expected, figures);
      first = std::move(out);
    } else if (!out.same_bits(first)) {
      place.fail(
          "the bits depend on memory format, budget or threads (" + std::to_string(setting.bytes) + " bytes, " +
          std::to_string(setting.threads) + " threads)");
    }
  }
}

// Which memory formats of the result to check: each takes its time to compile.
enum class Formats { contiguous, channels_last, both };

// As a setting has it, or as it can be.
constexpr bool channels_last_in(Formats formats, const Setting& setting) {
  return formats == Formats::both ? setting.channels_last : formats == Formats::channels_last;
}

template <Formats kFormats, typename scalar_t, typename box_t>
void run_forward(
    const Call& call, Op op, const Tensors<scalar_t, box_t>& tensors, const Setting& setting,
    Results<accumulate_t<scalar_t>>& out, Results<int32_t>* argmax) {
  if constexpr (kFormats != Formats::contiguous) {
    if (channels_last_in(kFormats, setting)) {
      return forward<true>(call, op, tensors, setting, out, argmax);
    }
  }
  if constexpr (kFormats != Formats::channels_last) {
    forward<false>(call, op, tensors, setting, out, argmax);
  }
}

template <Formats kFormats, typename scalar_t, typename box_t>
void run_backward(
    const Call& call, Op op, const Tensors<scalar_t, box_t>& tensors, int64_t level, const Setting& setting,
    Results<accumulate_t<scalar_t>>& out) {
  if constexpr (kFormats != Formats::contiguous) {
    if (channels_last_in(kFormats, setting)) {
      return backward<true>(call, op, tensors, level, setting, out);
    }
  }
  if constexpr (kFormats != Formats::channels_last) {
    backward<false>(call, op, tensors, level, setting, out);
  }
}

template <Formats kFormats, typename scalar_t, typename box_t>
void check(const Call& call, Op op, const char* kind, uint64_t seed, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  const double tolerance = std::is_same_v<acc_t, double> ? 1e-13 : 2e-5;
  Numbers numbers(call, op, seed);
  const Tensors<scalar_t, box_t> tensors(call, op, numbers);
  ++figures.calls;
  const Place there{call, op, kind, "forward"}, back{call, op, kind, "backward"};

  const Results<acc_t> regions(call.regions, call.out_channels(op), call.bins[0], call.bins[1]);
  const Results<int32_t> indices(call.regions, call.out_channels(op), call.bins[0], call.bins[1]);
  const Expected expected = plain_forward<acc_t>(call, op, numbers, tolerance);
  for (int with_argmax = 0; with_argmax <= (op == Op::pool ? 1 : 0); ++with_argmax) {
    check_results<acc_t>(there, regions, expected, figures, [&](const Setting& setting, Results<acc_t>& out) {
      Results<int32_t> argmax = indices;
      run_forward<kFormats>(call, op, tensors, setting, out, with_argmax ? &argmax : nullptr);
      std::string complaint;
      if (!argmax.written(with_argmax, &complaint)) {
        there.fail("argmax: " + complaint);
      }
      if (with_argmax && argmax.values() != expected.argmax) {
        there.fail("argmax is not where the first maximum is");
      }
    });
  }
  for (int64_t level = 0; level < call.maps(op); ++level) {
    const Results<acc_t> map(call.batch, call.in_channels(op), call.height_of(level), call.width_of(level));
    const Expected gradient = plain_backward<acc_t>(call, op, numbers, level, tolerance);
    check_results<acc_t>(back, map, gradient, figures, [&](const Setting& setting, Results<acc_t>& out) {
      run_backward<kFormats>(call, op, tensors, level, setting, out);
    });
  }
}

// A box that names an image that does not exist is an error that says which box, and nothing is written.
template <Formats kFormats, typename scalar_t, typename box_t>
void check_missing_image(const Call& call, Op op, const char* kind, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  const double batch = static_cast<double>(call.batch);
  for (double image : {-1.0, -1.5, batch, batch + 0.5, 1e30, kInf, -kInf, kNaN}) {
    for (int64_t k : {int64_t{0}, call.regions / 2, call.regions - 1}) {
      Numbers numbers(call, op, 1);
      for (int64_t i = 0; i < call.regions && call.batch > 0; ++i) {
        numbers.boxes[i][0] = static_cast<double>(i % call.batch);
      }
      numbers.boxes[k][0] = image;
      numbers.levels[k] = -1;  // not even that excuses it
      const Tensors<scalar_t, box_t> tensors(call, op, numbers);
      const std::string box = "boxes[" + std::to_string(call.batch == 0 ? 0 : k) + "]";
      const Place there{call, op, kind, "forward"}, back{call, op, kind, "backward"};
      Results<acc_t> out(call.regions, call.out_channels(op), call.bins[0], call.bins[1]);
      Results<int32_t> argmax(call.regions, call.out_channels(op), call.bins[0], call.bins[1]);
      check_throws(there, box, [&] { run_forward<kFormats>(call, op, tensors, kSettings[1], out, &argmax); });
      Results<acc_t> grad(call.batch, call.in_channels(op), call.height, call.width);
      check_throws(back, box, [&] { run_backward<kFormats>(call, op, tensors, 0, kSettings[1], grad); });
      std::string complaint;
      if (!out.written(0, &complaint) || !argmax.written(0, &complaint) || !grad.written(0, &complaint)) {
        there.fail("before or after an error, " + complaint);
      }
      figures.rejected += 2;
    }
  }
}

constexpr Coordinates kPlain = Coordinates::plain, kHostile = Coordinates::hostile, kFar = Coordinates::far;
constexpr BoxLayout kRows = BoxLayout::rows, kColumns = BoxLayout::columns, kGaps = BoxLayout::gaps;

// Calls whose shapes sit at the edges of vectors, chunks and blocks of channels, tiles and strips of pixels.
const Call kCalls[] = {
    {2, 1, 9, 7, 0, {3, 2}, 7, 1.0, 2, false, Layout::contiguous, Layout::contiguous, kRows, kPlain},
    {2, 3, 9, 8, 0, {2, 2}, 9, 0.5, 0, true, Layout::contiguous, Layout::channels_last, kGaps, kHostile},
    {3, 16, 6, 11, 0, {1, 1}, 9, 1.0, -1, false, Layout::channels_last, Layout::channels_last, kRows, kHostile},
    {1, 70, 4, 5, 0, {2, 2}, 40, 1.0, 1, false, Layout::channels_last, Layout::channels_last, kRows, kPlain},
    {2, 17, 12, 10, 3, {3, 3}, 14, 0.25, 2, true, Layout::contiguous, Layout::contiguous, kColumns, kPlain},
    {1, 37, 10, 13, 1, {2, 3}, 8, 1.0, 0, false, Layout::sliced, Layout::sliced, kRows, kHostile},
    {2, 65, 7, 8, 0, {7, 7}, 5, 0.3, 1, true, Layout::contiguous, Layout::contiguous, kRows, kPlain},
    {1, 130, 8, 5, 2, {2, 1}, 6, 1.0, -1, false, Layout::images_in_rows, Layout::transposed, kRows, kHostile},
    {2, 130, 6, 6, 0, {2, 2}, 6, 1.0, 2, false, Layout::sliced_channels_last, Layout::constant, kGaps, kHostile},
    {2, 3, 4, 5, 0, {1, 2}, 40, 1.0, 4, true, Layout::contiguous, Layout::contiguous, kRows, kPlain},
    {2, 5, 1, 1, 0, {2, 2}, 12, 1.0, 2, false, Layout::contiguous, Layout::contiguous, kRows, kHostile},
    {2, 5, 1, 1, 2, {3, 1}, 12, 0.0625, 0, true, Layout::channels_last, Layout::contiguous, kRows, kHostile},
    {2, 6, 2, 300, 0, {2, 2}, 12, 1.0, 0, false, Layout::contiguous, Layout::contiguous, kRows, kHostile},
    {1, 6, 300, 2, 0, {2, 3}, 12, 1.0, -1, true, Layout::contiguous, Layout::contiguous, kRows, kHostile},
    {3, 2, 2, 200, 0, {3, 7}, 9, 1.0, 0, true, Layout::contiguous, Layout::contiguous, kRows, kFar},
    {3, 2, 200, 2, 0, {7, 3}, 30, 1.0, 0, false, Layout::contiguous, Layout::contiguous, kRows, kFar},
    {2, 35, 20, 40, 0, {3, 3}, 3, 0.5, 2, false, Layout::contiguous, Layout::contiguous, kRows, kPlain},
    {1, 4, 3, 260, 2, {1, 4}, 9, 1.0, 0, true, Layout::sliced, Layout::expanded, kRows, kHostile},
    {2, 8, 9, 9, 2, {2, 2}, 60, 1.0, 0, true, Layout::contiguous, Layout::images_in_rows, kRows, kHostile},
    {3, 1, 8, 6, 0, {3, 3}, 9, 1.0, 2, true, Layout::transposed, Layout::contiguous, kRows, kHostile},
    {2, 1, 5, 5, 2, {2, 2}, 9, 1.0, 3, false, Layout::constant, Layout::sliced_channels_last, kRows, kHostile},
    {4, 9, 5, 6, 0, {2, 2}, 9, 1.0, 2, false, Layout::expanded, Layout::expanded, kRows, kPlain},
    {2, 20, 5, 6, 2, {2, 2}, 0, 1.0, 2, false, Layout::contiguous, Layout::contiguous, kRows, kPlain},
    {2, 0, 5, 6, 2, {2, 2}, 5, 1.0, 2, false, Layout::contiguous, Layout::contiguous, kRows, kPlain},
    {2, 0, 5, 6, 0, {2, 2}, 5, 1.0, 0, true, Layout::channels_last, Layout::channels_last, kRows, kPlain},
    {0, 4, 5, 6, 2, {2, 2}, 0, 1.0, 2, false, Layout::contiguous, Layout::contiguous, kRows, kPlain},
};

const Call kMissingImages[] = {
    {3, 4, 3, 4, 2, {2, 1}, 5, 1.0, 2, false, Layout::contiguous, Layout::contiguous, kRows, kPlain},
    {0, 4, 3, 4, 2, {2, 1}, 5, 1.0, 2, false, Layout::contiguous, Layout::contiguous, kRows, kPlain},
};

Call random_call(Random& random) {
  const int64_t channels[] = {1, 2, 3, 8, 15, 16, 17, 31, 33, 37, 64, 65, 100, 130};
  const Layout layouts[] = {Layout::contiguous,           Layout::contiguous, Layout::channels_last,  Layout::sliced,
                            Layout::sliced_channels_last, Layout::transposed, Layout::images_in_rows, Layout::expanded};
  const BoxLayout box_layouts[] = {kRows, kRows, kColumns, kGaps};
  const double scales[] = {1.0, 0.5, 0.25, 0.0625, 0.3, 2.0};
  Call call{};
  call.batch = random.integer(1, 4);
  call.channels = random.pick(channels);
  call.height = random.integer(1, 14);
  call.width = random.integer(1, 14);
  (random.integer(0, 1) == 0 ? call.height : call.width) *= random.integer(0, 7) == 0 ? 13 : 1;
  call.levels = random.integer(0, 3);
  call.bins[0] = random.integer(1, 4);
  call.bins[1] = random.integer(1, 4);
  call.regions = random.integer(1, 12);
  call.spatial_scale = random.pick(scales);
  call.sampling_ratio = random.integer(-1, 3);
  call.aligned = random.integer(0, 1) == 0;
  call.input = random.pick(layouts);
  call.grad = random.pick(layouts);
  call.boxes = random.pick(box_layouts);
  const Coordinates kinds[] = {kPlain, kPlain, kHostile, kHostile, kFar};
  call.coordinates = random.pick(kinds);
  return call;
}

template <typename scalar_t, typename box_t, Formats kFormats>
void check_types(const char* kind, int random_calls, Figures& figures) {
  uint64_t seed = 1;
  Random random(sizeof(scalar_t) + 16 * sizeof(box_t));
  for (Op op : kOps) {
    for (const Call& call : kCalls) {
      check<kFormats, scalar_t, box_t>(call, op, kind, seed++, figures);
    }
    for (int i = 0; i < random_calls; ++i) {
      check<kFormats, scalar_t, box_t>(random_call(random), op, kind, seed++, figures);
    }
    for (const Call& call : kMissingImages) {
      check_missing_image<kFormats, scalar_t, box_t>(call, op, kind, figures);
    }
  }
}

// A channels_last map that does not fit in cache is pooled some channels at a time, for all regions.
void check_blocks_of_a_large_map() {
  constexpr int64_t kChannels = 64, kSide = 8, kRegions = 20;
  std::vector<float> map(kChannels * kSide * kSide);  // greatest in the last pixel
  for (size_t i = 0; i < map.size(); ++i) {
    map[i] = static_cast<float>(i);
  }
  std::vector<float> rois;
  for (int64_t k = 0; k < kRegions; ++k) {
    rois.insert(rois.end(), {0, 0, 0, kSide - 1, kSide - 1});
  }
  const FeatureMaps<float> level{
      {map.data(), kChannels * kSide * kSide, 1, kSide * kChannels, kChannels}, kSide, kSide, 1.0};
  const Boxes<float> boxes{rois.data(), 5, 1, kRegions, nullptr};
  omp_set_num_threads(1);
  for (const bool fits : {true, false}) {
    const Pyramid<float> pyramid{&level, 1, 1, kChannels, fits ? kHuge : 1};
    std::vector<int64_t> channels;  // in the order in which they are stored
    bool right = true;
    inductor_vision::roi_pool<true, false>(
        pyramid, boxes, Bins{2, 2},
        [&](const OutputBlock& block, const float* values, int64_t distance) {
          channels.push_back(block.channel);
          for (int64_t c = 0; c < block.channels; ++c) {
            right = right && values[3 * distance + c] == map[map.size() - kChannels + block.channel + c];
          }
        },
        nullptr);
    const bool by_blocks = channels.back() > 0 && std::is_sorted(channels.begin(), channels.end());
    const bool by_regions = channels.size() == kRegions || !by_blocks;
    if (!right || (fits ? !by_regions : !by_blocks)) {
      std::printf("roi_pool: channels of a map that %s in cache\n", fits ? "fits" : "does not fit");
      std::exit(1);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int random_calls = argc > 1 ? std::atoi(argv[1]) : 20;
  Figures figures;
  check_blocks_of_a_large_map();
  check_types<float, float, Formats::both>("float", random_calls, figures);
  check_types<float, at::BFloat16, Formats::contiguous>("float, bf16 boxes", random_calls, figures);
  check_types<double, double, Formats::both>("double", random_calls, figures);
  check_types<double, float, Formats::channels_last>("double, float boxes", random_calls, figures);
  check_types<at::BFloat16, at::BFloat16, Formats::both>("bf16", random_calls, figures);
  check_types<at::BFloat16, float, Formats::contiguous>("bf16, float boxes", random_calls, figures);
  check_types<at::Half, at::Half, Formats::channels_last>("fp16", random_calls, figures);
  check_types<at::Half, float, Formats::both>("fp16, float boxes", random_calls, figures);
  std::printf(
      "lanes=%d calls=%" PRId64 " runs=%" PRId64 " rejected=%" PRId64 " error=%.2g\n",
      static_cast<int>(at::vec::Vectorized<float>::size()), figures.calls, figures.runs, figures.rejected,
      figures.error);
  return 0;
}
