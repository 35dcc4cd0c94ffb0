// Runs the kernel of nms.h against a plain loop over all pairs, to be built with sanitizers.
//
// Each call runs on several numbers of threads, and the result must be exactly that of the loop, which computes as
// torchvision's kernel for CPUs does.  All memory is allocated to the exact size, so that AddressSanitizer sees any
// access beyond it; gaps between the elements of strided tensors are NaN, so that a read of one shows in the result.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "nms.h"

#include <numeric>

#include "scored_boxes.h"

namespace {

using namespace harness;

// Most are rounded when they are compared in float, up or down; the last ones are where no sum, or any, is greater.
const double kThresholds[] = {0.5,  0.0,       0.01,     0.05, 0.1, 0.3, 1.0 / 3, 0.7,  0.9,
                              0.97, 0.9999999, 1 - 1e-9, 1,    2,   -1,  kNaN,    kInf, -0.0};

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

struct NMSFigures {
  int64_t calls = 0;
  int64_t runs = 0;
  int64_t large = 0;       // calls with a class that is decided on all threads
  int64_t kept = 0;        // boxes, of all calls
  int64_t suppressed = 0;  // also
};

template <typename box_t, typename score_t>
void run(
    const char* types, const std::string& call, const ScoredBoxes<box_t, score_t>& given, double threshold,
    const std::vector<int64_t>& expected, NMSFigures& figures) {
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
void check(const char* types, const Call& call, uint64_t seed, NMSFigures& figures) {
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
void check_ties(const char* types, NMSFigures& figures) {
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
void check_types(const char* types, int repeats, NMSFigures& figures) {
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
void check_hard(const char* types, NMSFigures& figures) {
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
void check_large(const char* types, NMSFigures& figures) {
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
  NMSFigures figures;
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
