// Runs the kernel of nms.h against a plain loop over all pairs, to be built with sanitizers.
//
// Each call runs on several numbers of threads, and the result must be exactly that of the loop, which computes as
// torchvision's kernel for CPUs does.  All memory is allocated to the exact size, so that AddressSanitizer sees any
// access beyond it; gaps between the elements of strided tensors are NaN, so that a read of one shows in the result.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "nms.h"

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <string>
#include <vector>

#include "harness.h"

namespace {

using harness::kInf;
using harness::kNaN;
using harness::Layout;
using harness::Random;
using harness::Tensor;
using inductor_vision::accumulate_t;
using inductor_vision::ScoredBoxes;

const int kThreads[] = {1, 2, 3};

enum class Kind {
  uniform,
  duplicates,
  rounded,           // to small integers: many overlaps are the same simple fraction
  clustered,         // most are suppressed early
  all_sizes,         // sides from 1e-3 to 1e3
  negative,          // coordinates
  nearly_identical,  // centres differ by less than areas are rounded by
  tiny,              // areas are denormal, of a few bits or 0
  denormal_sides,    // but areas are not denormal
  huge,              // areas are near the largest number or infinite
  far_out,           // sums of coordinates overflow, here and there
  inverted,          // some, along one axis or both
  flat,              // some have no area
  hostile,           // some coordinates are NaN or infinite
  outliers,          // few boxes, far from the others
};
constexpr Kind kKinds[] = {
    Kind::uniform,  Kind::duplicates,       Kind::rounded, Kind::clustered,      Kind::all_sizes,
    Kind::negative, Kind::nearly_identical, Kind::tiny,    Kind::denormal_sides, Kind::huge,
    Kind::far_out,  Kind::inverted,         Kind::flat,    Kind::hostile,        Kind::outliers,
};

enum class Scores { uniform, ties, equal, hostile };
constexpr Scores kScores[] = {Scores::uniform, Scores::ties, Scores::equal, Scores::hostile};

enum class Classes { none, few, many, one_large };
constexpr Classes kClasses[] = {Classes::none, Classes::few, Classes::many, Classes::one_large};

// The layouts of rows of boxes, and of scores and classes, each as those of images of one channel.
constexpr Layout kBoxLayouts[] = {
    Layout::contiguous, Layout::contiguous, Layout::sliced, Layout::transposed, Layout::sliced_channels_last};
constexpr Layout kVectorLayouts[] = {Layout::contiguous, Layout::contiguous, Layout::sliced_channels_last};

// Most are rounded when they are compared in float, up or down; the last ones are where no sum, or any, is greater.
const double kThresholds[] = {0.5,  0.0,       0.01,     0.05, 0.1, 0.3, 1.0 / 3, 0.7,  0.9,
                              0.97, 0.9999999, 1 - 1e-9, 1,    2,   -1,  kNaN,    kInf, -0.0};

struct Call {
  int64_t count;
  Kind kind;
  Scores scores;
  Classes classes;
  double threshold;
  Layout box_layout, score_layout, class_layout;

  std::string describe() const {
    char text[300];
    std::snprintf(
        text, sizeof text,
        "%" PRId64
        " boxes of kind %d, scores %d, classes %d, threshold %.17g, layouts of boxes %d, scores %d, classes %d",
        count, static_cast<int>(kind), static_cast<int>(scores), static_cast<int>(classes), threshold,
        static_cast<int>(box_layout), static_cast<int>(score_layout), static_cast<int>(class_layout));
    return text;
  }
};

using Box = std::array<double, 4>;

Box from_centre(double x, double y, double width, double height) {
  return {x - width / 2, y - height / 2, x + width / 2, y + height / 2};
}

// A box of any kind but duplicates.
template <typename box_t>
Box make_box(Kind kind, int64_t i, int64_t count, Random& random) {
  using limits = std::numeric_limits<box_t>;
  using acc_limits = std::numeric_limits<accumulate_t<box_t>>;
  const double largest = static_cast<double>(limits::max()), least = static_cast<double>(limits::denorm_min());
  // So that each box overlaps some, whatever their number.
  const double many = static_cast<double>(count) / 8, room = 10 * std::sqrt(static_cast<double>(count)) + 1;
  const auto uniform = [&](double low, double high) { return random.uniform(low, high); };
  const Box plain = from_centre(uniform(0, room), uniform(0, room), uniform(5, 40), uniform(5, 40));
  const bool special = random.integer(0, 3) == 0;
  switch (kind) {
    case Kind::uniform:
    case Kind::duplicates:
      return plain;
    case Kind::rounded: {
      const double side = std::ceil(room / 5);
      const double x = std::floor(uniform(0, side)), y = std::floor(uniform(0, side));
      return {x, y, x + static_cast<double>(random.integer(1, 10)), y + static_cast<double>(random.integer(1, 3))};
    }
    case Kind::clustered: {
      const double x = 100 * static_cast<double>(random.integer(0, 3)),
                   y = 100 * static_cast<double>(random.integer(0, 1));
      return from_centre(x + uniform(0, 9), y + uniform(0, 9), uniform(30, 60), uniform(30, 60));
    }
    case Kind::all_sizes: {
      const double size = std::pow(10, uniform(-3, 3));
      return from_centre(
          uniform(-1, 1) * 3 * size, uniform(-1, 1) * 3 * size, uniform(1, 3) * size, uniform(1, 3) * size);
    }
    case Kind::negative:
      return from_centre(uniform(-2 * room, 0), uniform(-room / 2, room / 2), uniform(5, 40), uniform(5, 40));
    case Kind::nearly_identical: {
      const double step = static_cast<double>(limits::epsilon()) / 8;
      const auto low = [&] { return -0.3 * (1 + step * static_cast<double>(random.integer(0, 30))); };
      return {low(), low(), 1, 1};
    }
    case Kind::tiny: {
      const double unit = std::max(std::sqrt(static_cast<double>(acc_limits::denorm_min())), least);
      return from_centre(uniform(0, 4) * unit, uniform(0, 4) * unit, uniform(0.5, 3) * unit, uniform(0.5, 3) * unit);
    }
    case Kind::denormal_sides: {
      const double x = least * static_cast<double>(random.integer(-1, 3)), row = std::floor(uniform(0, many));
      const double width = least * static_cast<double>(random.integer(1, 3)), height = largest / (many + 1);
      return {x, row * height, x + width, (row + 1) * height};
    }
    case Kind::huge: {
      if (special) {
        const double far = std::min(1e30, largest);
        return {uniform(-far, 0), uniform(-far, 0), uniform(0, far), uniform(0, far)};
      }
      const double unit = std::min(std::sqrt(static_cast<double>(acc_limits::max())), largest / 8);
      return from_centre(
          uniform(-2, 2) * unit, uniform(-2, 2) * unit, uniform(0.4, 1.2) * unit, uniform(0.4, 1.2) * unit);
    }
    case Kind::far_out: {
      const double x = (i % 90 == 7 ? uniform(0.5, 0.54) : uniform(0.1, 0.49)) * largest;
      return from_centre(count % 2 == 0 ? x : -x, uniform(0, many), largest * uniform(0.2, 0.25), uniform(0.9, 1));
    }
    case Kind::inverted: {
      Box box = plain;
      if (random.integer(0, 2) == 0) {
        std::swap(box[0], box[2]);
      }
      if (random.integer(0, 2) == 0) {
        std::swap(box[1], box[3]);
      }
      return box;
    }
    case Kind::flat: {
      Box box = plain;
      if (special) {
        const int64_t axis = random.integer(0, 1);
        box[axis + 2] = box[axis];
      }
      return box;
    }
    case Kind::hostile: {
      Box box = plain;
      for (double& coordinate : box) {
        const double values[] = {kNaN, kInf, -kInf, largest, -largest, 0};
        coordinate = random.integer(0, 7) == 0 ? random.pick(values) : coordinate;
      }
      return box;
    }
    case Kind::outliers: {
      if (i % 90 != 7) {
        return plain;
      }
      const double far = std::min(1e20, largest / 2);
      if (special) {  // one that covers all others
        return {-far, -1, far, room};
      }
      return from_centre(uniform(-far, far), uniform(-far, far), far * uniform(1e-3, 0.1), 1);
    }
  }
  return plain;
}

template <typename box_t>
std::vector<Box> make_boxes(const Call& call, Random& random) {
  std::vector<Box> boxes;
  for (int64_t i = 0; i < call.count; ++i) {
    if (call.kind == Kind::duplicates && i > 0 && random.integer(0, 4) > 0) {
      boxes.push_back(boxes[random.integer(0, i - 1)]);
    } else {
      boxes.push_back(make_box<box_t>(call.kind, i, call.count, random));
    }
  }
  return boxes;
}

double make_score(Scores scores, Random& random) {
  switch (scores) {
    case Scores::uniform:
      return random.uniform(-1, 1);
    case Scores::ties:
      return static_cast<double>(random.integer(-2, 2)) / 4;
    case Scores::equal:
      return 0.75;
    case Scores::hostile: {
      const double values[] = {kNaN, -kNaN, kInf, -kInf, 0.0, -0.0, 1e-40, -1e-40, 1e-7, 1, -1, random.uniform(-1, 1)};
      return random.pick(values);
    }
  }
  return 0;
}

// Classes that differ in any part of the number.
double make_class(Classes classes, Random& random) {
  const double far[] = {0, 1, -1, 256, 0x1p40, -0x1p40, -0x1p63, 0x1p62};
  switch (classes) {
    case Classes::none:
      return 0;
    case Classes::few: {
      const double few[] = {-1, 0, 0x1p56};
      return random.pick(few);
    }
    case Classes::many:
      return random.pick(far) / 2 + static_cast<double>(random.integer(0, 60));
    case Classes::one_large:
      return random.integer(0, 15) > 0 ? 3 : random.pick(far);
  }
  return 0;
}

// Rows of [count, columns], on a buffer that ends with its last element.
template <typename scalar_t>
Tensor<scalar_t> rows(int64_t count, Layout layout) {
  return Tensor<scalar_t>(1, 1, count, 4, layout);
}
template <typename scalar_t>
Tensor<scalar_t> vector(int64_t count, Layout layout) {
  return Tensor<scalar_t>(1, 1, 1, count, layout);
}

template <typename box_t, typename score_t>
struct Tensors {
  Tensor<box_t> boxes;
  Tensor<score_t> scores;
  Tensor<int64_t> classes;
  int64_t count;
  bool with_classes;

  Tensors(const Call& call, uint64_t seed)
      : boxes(rows<box_t>(call.count, call.box_layout)),
        scores(vector<score_t>(call.count, call.score_layout)),
        classes(vector<int64_t>(call.count, call.class_layout)),
        count(call.count),
        with_classes(call.classes != Classes::none) {
    Random random(seed);
    const std::vector<Box> given = make_boxes<box_t>(call, random);
    boxes.fill([&](int64_t, int64_t, int64_t y, int64_t x) { return given[y][x]; });
    scores.fill([&](int64_t, int64_t, int64_t, int64_t) { return make_score(call.scores, random); });
    classes.fill([&](int64_t, int64_t, int64_t, int64_t) { return make_class(call.classes, random); });
  }
  ScoredBoxes<box_t, score_t> view() const {
    return {boxes.view().data,     boxes.view().row,
            boxes.view().column,   scores.view().data,
            scores.view().column,  with_classes ? classes.view().data : nullptr,
            classes.view().column, count};
  }
};

// The plain loop.  Boxes [N, 4], numbers as the tensors have them.
template <typename acc_t>
std::vector<int64_t> plain_nms(
    const std::vector<double>& given, const std::vector<double>& scores, const std::vector<double>& classes,
    double threshold) {
  const int64_t count = static_cast<int64_t>(scores.size());
  std::vector<int64_t> order(count), kept;
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return scores[i] > scores[j] || (std::isnan(scores[i]) && !std::isnan(scores[j]));
  });
  struct Ranked {
    acc_t x1, y1, x2, y2, area;
    double of;
    bool suppressed;
  };
  std::vector<Ranked> ranked;
  for (const int64_t i : order) {
    const acc_t x1 = static_cast<acc_t>(given[4 * i]), y1 = static_cast<acc_t>(given[4 * i + 1]);
    const acc_t x2 = static_cast<acc_t>(given[4 * i + 2]), y2 = static_cast<acc_t>(given[4 * i + 3]);
    ranked.push_back({x1, y1, x2, y2, (x2 - x1) * (y2 - y1), classes[i], false});
  }
  const Ranked* end = ranked.data() + count;
  for (Ranked* a = ranked.data(); a < end; ++a) {
    if (a->suppressed) {
      continue;
    }
    kept.push_back(order[a - ranked.data()]);
    for (Ranked* b = a + 1; b < end; ++b) {
      if (b->suppressed || b->of != a->of) {
        continue;
      }
      const acc_t left = std::max(a->x1, b->x1), top = std::max(a->y1, b->y1);
      const acc_t right = std::min(a->x2, b->x2), bottom = std::min(a->y2, b->y2);
      const acc_t width = std::max(acc_t(0), right - left), height = std::max(acc_t(0), bottom - top);
      const acc_t intersection = width * height;
      const acc_t overlap = intersection / (a->area + b->area - intersection);
      if (static_cast<double>(overlap) > threshold) {
        b->suppressed = true;
      }
    }
  }
  kept.resize(count, -1);
  return kept;
}

struct Figures {
  int64_t calls = 0;
  int64_t runs = 0;
  int64_t large = 0;       // calls with a class that is decided on all threads
  int64_t kept = 0;        // boxes, of all calls
  int64_t suppressed = 0;  // also
};

[[noreturn]] void fail(const char* types, const std::string& what, const std::string& call) {
  std::printf("%s: %s\n  in %s\n", types, what.c_str(), call.c_str());
  std::exit(1);
}

template <typename box_t, typename score_t>
void run(
    const char* types, const std::string& call, const ScoredBoxes<box_t, score_t>& given, double threshold,
    const std::vector<int64_t>& expected, Figures& figures) {
  ++figures.calls;
  for (const int threads : kThreads) {
    omp_set_num_threads(threads);
    const std::unique_ptr<int64_t[]> out(new int64_t[expected.size()]);
    std::fill_n(out.get(), expected.size(), int64_t{-7});
    inductor_vision::nms(given, threshold, out.get());
    ++figures.runs;
    for (size_t i = 0; i < expected.size(); ++i) {
      if (out[i] != expected[i]) {
        fail(
            types,
            "on " + std::to_string(threads) + " threads, output " + std::to_string(i) + " is " +
                std::to_string(out[i]) + ", expected " + std::to_string(expected[i]),
            call);
      }
    }
  }
}

template <typename box_t, typename score_t>
void check(const char* types, const Call& call, uint64_t seed, Figures& figures) {
  const Tensors<box_t, score_t> tensors(call, seed);
  const std::vector<double> classes = tensors.classes.numbers();
  const std::vector<int64_t> expected =
      plain_nms<accumulate_t<box_t>>(tensors.boxes.numbers(), tensors.scores.numbers(), classes, call.threshold);
  const int64_t suppressed = std::count(expected.begin(), expected.end(), -1);
  figures.suppressed += suppressed;
  figures.kept += call.count - suppressed;
  std::vector<double> sorted = classes;
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 4096; i < sorted.size(); ++i) {
    if (sorted[i] == sorted[i - 4096]) {
      ++figures.large;
      break;
    }
  }
  run(types, call.describe(), tensors.view(), call.threshold, expected, figures);
}

// Where it matters that the overlap is rounded to the type of the boxes, and the threshold is not: known results, also
// for the plain loop.
template <typename box_t>
void check_ties(const char* types, Figures& figures) {
  struct Tie {
    double overlap_of_ten, threshold;  // the second box is so much of the first
    bool in_float, in_double;          // whether it is suppressed
  };
  const Tie ties[] = {
      {5, 0.5, false, false},            // exact in both
      {1, 0.1, true, false},             // rounded up in float
      {3, 0.3, true, false},             // also
      {7, 0.7, false, false},            // rounded down
      {9, 0.9, false, false},            // also
      {5, 0.49999999999, true, true},    // that threshold is 0.5 in float
      {5, 0.50000000001, false, false},  // also
      {10, 1, false, false},
      {10, 0.99999999999, true, true},
      {0, 0, false, false},
      {0, -1, true, true},
  };
  for (const Tie& tie : ties) {
    Tensor<box_t> boxes = rows<box_t>(2, Layout::contiguous);
    Tensor<float> scores = vector<float>(2, Layout::constant);
    boxes.fill([&](int64_t, int64_t, int64_t y, int64_t x) {
      return x < 2 ? 0 : x == 3 ? 1 : y == 0 ? 10 : tie.overlap_of_ten;
    });
    scores.fill([](int64_t, int64_t, int64_t, int64_t) { return 1; });
    const bool suppressed = std::is_same_v<box_t, double> ? tie.in_double : tie.in_float;
    const std::vector<int64_t> expected = {0, suppressed ? -1 : 1};
    char call[100];
    std::snprintf(call, sizeof call, "a tie: %g of 10, threshold %.17g", tie.overlap_of_ten, tie.threshold);
    if (plain_nms<accumulate_t<box_t>>(boxes.numbers(), {1, 1}, {0, 0}, tie.threshold) != expected) {
      fail(types, "the plain loop is wrong", call);
    }
    const auto& view = boxes.view();
    const ScoredBoxes<box_t, float> given{view.data, view.row, view.column, scores.view().data, 0, nullptr, 0, 2};
    run(types, call, given, tie.threshold, expected, figures);
  }
}

// All kinds of boxes in all sizes, around those of vectors and groups, else by chance; in float and double also so many
// that they are not all decided in the first group, `repeats` times, with one threshold after the other.
template <typename box_t, typename score_t>
void check_types(const char* types, int repeats, Figures& figures) {
  Random random(sizeof(box_t) + 16 * sizeof(score_t) + 256 * std::is_same_v<box_t, at::Half>);
  const auto random_call = [&](int64_t count, Kind kind, double threshold) {
    return Call{
        count,
        kind,
        random.pick(kScores),
        random.pick(kClasses),
        threshold,
        random.pick(kBoxLayouts),
        random.pick(kVectorLayouts),
        random.pick(kVectorLayouts)};
  };
  size_t next_threshold = sizeof(box_t);
  for (const Kind kind : kKinds) {
    for (const int64_t count : {0, 1, 2, 15, 16, 17, 63, 255, 256, 257, 600}) {
      check<box_t, score_t>(types, random_call(count, kind, random.pick(kThresholds)), random.next(), figures);
    }
    for (int i = 0; i < repeats && std::is_same_v<box_t, score_t> && sizeof(box_t) >= sizeof(float); ++i) {
      const double threshold = kThresholds[next_threshold++ % (sizeof kThresholds / sizeof kThresholds[0])];
      Call call = random_call(random.integer(280, 400), kind, threshold);
      call.classes = Classes::none;
      check<box_t, score_t>(types, call, random.next(), figures);
    }
  }
  for (const int64_t count : {1, 40, 600}) {  // one box, one score, one class
    Call call = random_call(count, Kind::uniform, 0.5);
    call.box_layout = call.score_layout = call.class_layout = Layout::constant;
    check<box_t, score_t>(types, call, random.next(), figures);
  }
}

// What needs a careful choice of the cells that are searched for neighbours.
template <typename box_t>
void check_hard(const char* types, Figures& figures) {
  struct Hard {
    Kind kind;
    double threshold;
  };
  const Hard hard[] = {
      {Kind::nearly_identical, 1 - 1e-9},
      {Kind::tiny, 0.9},
      {Kind::tiny, 0.5},
      {Kind::denormal_sides, 0.3},
      {Kind::far_out, 0.01},
      {Kind::far_out, 0.1},
      {Kind::all_sizes, 0.05},
      {Kind::outliers, 0.2},
  };
  for (const auto& [kind, threshold] : hard) {
    for (int seed = 1; seed <= 4; ++seed) {
      const Call call{
          500 + seed,        kind, Scores::uniform, Classes::none, threshold, Layout::contiguous, Layout::contiguous,
          Layout::contiguous};
      check<box_t, float>(types, call, seed, figures);
    }
  }
}

// So many boxes that a class is decided on all threads, and small ones next to each other.
template <typename box_t>
void check_large(const char* types, Figures& figures) {
  struct Large {
    int64_t count;
    Kind kind;
    Scores scores;
    Classes classes;
    double threshold;
  };
  const Large large[] = {
      {5000, Kind::uniform, Scores::uniform, Classes::none, 0.3},
      {5000, Kind::uniform, Scores::uniform, Classes::many, 0.3},
      {5000, Kind::clustered, Scores::ties, Classes::one_large, 0.7},
      {4097, Kind::clustered, Scores::uniform, Classes::none, 0.2},
      {4096, Kind::duplicates, Scores::equal, Classes::none, 0.9},
      {4700, Kind::rounded, Scores::hostile, Classes::one_large, 0.1},
      {4100, Kind::hostile, Scores::ties, Classes::none, 0.05},
      {4200, Kind::outliers, Scores::uniform, Classes::few, 0.5},
  };
  uint64_t seed = 1;
  for (const auto& [count, kind, scores, classes, threshold] : large) {
    const bool contiguous = seed % 2 == 0;  // in turns
    const Call call{
        count,
        kind,
        scores,
        classes,
        threshold,
        contiguous ? Layout::contiguous : Layout::transposed,
        contiguous ? Layout::contiguous : Layout::sliced_channels_last,
        contiguous ? Layout::sliced_channels_last : Layout::contiguous};
    check<box_t, box_t>(types, call, seed++, figures);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 6;
  Figures figures;
  check_ties<float>("float", figures);
  check_ties<double>("double", figures);
  check_ties<at::BFloat16>("bf16", figures);
  check_ties<at::Half>("fp16", figures);
  check_hard<float>("float", figures);
  check_hard<double>("double", figures);
  check_types<float, float>("float", repeats, figures);
  check_types<float, double>("float, double scores", repeats, figures);
  check_types<float, at::Half>("float, fp16 scores", repeats, figures);
  check_types<double, double>("double", repeats, figures);
  check_types<double, at::BFloat16>("double, bf16 scores", repeats, figures);
  check_types<at::BFloat16, at::BFloat16>("bf16", repeats, figures);
  check_types<at::BFloat16, float>("bf16, float scores", repeats, figures);
  check_types<at::Half, at::Half>("fp16", repeats, figures);
  check_types<at::Half, float>("fp16, float scores", repeats, figures);
  check_large<float>("float", figures);
  check_large<double>("double", figures);
  std::printf(
      "lanes=%d calls=%" PRId64 " runs=%" PRId64 " large=%" PRId64 " kept=%" PRId64 " suppressed=%" PRId64 "\n",
      static_cast<int>(at::vec::Vectorized<float>::size()), figures.calls, figures.runs, figures.large, figures.kept,
      figures.suppressed);
  return 0;
}
