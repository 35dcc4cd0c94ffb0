// Runs the kernel of soft_nms.h against a plain loop over all pairs, to be built with sanitizers.
//
// Each call runs on several numbers of threads, and the result must be exactly that of the loop.  Memory and gaps are
// as in nms_test.cpp.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "soft_nms.h"

#include "scored_boxes.h"

namespace {

using namespace harness;
using inductor_vision::SoftRule;

const double kThresholds[] = {0.3, 0.0, 0.1, 1.0 / 3, 0.5, 0.9, 1, -1, kNaN, kInf};
const double kSigmas[] = {0.5, 0.5, 0.01, 30, 1e-30, 1e-60, kInf};
const double kLeast[] = {1e-3, 1e-3, 0, 0.3, -0.5, -kInf, kInf, kNaN};

// Indices and scores, [N] each.
template <typename real_t>
struct Taken {
  std::vector<int64_t> indices;
  std::vector<real_t> scores;
};

// The plain loop.  Boxes [N, 4], numbers as the tensors have them.
template <typename real_t>
Taken<real_t> plain_soft_nms(
    const std::vector<double>& boxes, const std::vector<double>& given, const std::vector<double>& classes,
    const SoftRule& rule) {
  std::vector<real_t> scores(given.begin(), given.end());
  std::vector<bool> left(scores.size(), true);
  Taken<real_t> taken;
  const auto at = [&](int64_t i, int column) { return static_cast<real_t>(boxes[4 * i + column]); };
  const auto area = [&](int64_t i) { return (at(i, 2) - at(i, 0)) * (at(i, 3) - at(i, 1)); };
  for (;;) {
    int64_t best = -1;
    for (int64_t i = 0; i < static_cast<int64_t>(scores.size()); ++i) {
      if (!left[i] || static_cast<double>(scores[i]) < rule.least_score) {
        continue;
      }
      if (best < 0 || scores[i] > scores[best] || (std::isnan(scores[i]) && !std::isnan(scores[best]))) {
        best = i;
      }
    }
    if (best < 0) {
      break;
    }
    left[best] = false;
    taken.indices.push_back(best);
    taken.scores.push_back(scores[best]);
    for (int64_t i = 0; i < static_cast<int64_t>(scores.size()); ++i) {
      if (!left[i] || !(scores[i] > 0) || classes[i] != classes[best]) {
        continue;
      }
      const real_t width = std::min(at(best, 2), at(i, 2)) - std::max(at(best, 0), at(i, 0));
      const real_t height = std::min(at(best, 3), at(i, 3)) - std::max(at(best, 1), at(i, 1));
      const real_t intersection = std::max(real_t(0), width) * std::max(real_t(0), height);
      const real_t overlap = intersection / (area(best) + area(i) - intersection);
      real_t weight = 1;
      if (rule.gaussian && overlap > 0) {
        const real_t square = overlap * overlap / static_cast<real_t>(rule.sigma);
        real_t lanes[at::vec::Vectorized<real_t>::size()];  // by the same function: results are to be equal
        at::vec::Vectorized<real_t>(square).neg().exp().store(lanes);
        weight = lanes[0];
      } else if (!rule.gaussian && static_cast<double>(overlap) > rule.threshold) {
        weight = 1 - overlap;
      }
      const real_t lowered = scores[i] * weight;
      scores[i] = std::isnan(lowered) ? 0 : lowered;
    }
  }
  return taken;
}

struct SoftFigures {
  int64_t calls = 0;
  int64_t runs = 0;
  int64_t taken = 0;
  int64_t lowered = 0;
  int64_t dropped = 0;
};

template <typename box_t, typename score_t>
void check(const char* types, const Call& call, const SoftRule& rule, uint64_t seed, SoftFigures& figures) {
  constexpr bool kDouble = std::is_same_v<box_t, double> || std::is_same_v<score_t, double>;
  using real_t = std::conditional_t<kDouble, double, float>;
  const Tensors<box_t, score_t> tensors(call, seed);
  const std::vector<double> given = tensors.scores.numbers();
  const Taken<real_t> expected =
      plain_soft_nms<real_t>(tensors.boxes.numbers(), given, tensors.classes.numbers(), rule);
  const int64_t taken = static_cast<int64_t>(expected.indices.size());
  ++figures.calls;
  figures.taken += taken;
  figures.dropped += call.count - taken;
  for (int64_t i = 0; i < taken; ++i) {
    figures.lowered += static_cast<double>(expected.scores[i]) < given[expected.indices[i]];
  }
  char text[100];
  std::snprintf(
      text, sizeof text, ", %s, sigma %g, least score %g", rule.gaussian ? "gaussian" : "linear", rule.sigma,
      rule.least_score);
  for (const int threads : kThreads) {
    omp_set_num_threads(threads);
    const std::unique_ptr<int64_t[]> indices(new int64_t[call.count]);
    const std::unique_ptr<score_t[]> scores(new score_t[call.count]);
    // Each result by itself, too.
    inductor_vision::soft_nms(tensors.view(), rule, indices.get(), threads == 2 ? nullptr : scores.get());
    if (threads == 2) {
      inductor_vision::soft_nms(tensors.view(), rule, static_cast<int64_t*>(nullptr), scores.get());
    }
    ++figures.runs;
    for (int64_t i = 0; i < call.count; ++i) {
      const int64_t index = i < taken ? expected.indices[i] : -1;
      const score_t score = static_cast<score_t>(i < taken ? expected.scores[i] : real_t(0));
      const bool same = scores[i] == score || (std::isnan(scores[i]) && std::isnan(score));
      if (indices[i] != index || !same) {
        fail(
            types,
            "on " + std::to_string(threads) + " threads, output " + std::to_string(i) + " is " +
                std::to_string(indices[i]) + ", " + std::to_string(static_cast<double>(scores[i])) + ", expected " +
                std::to_string(index) + ", " + std::to_string(static_cast<double>(score)),
            call.describe() + text);
      }
    }
  }
}

template <typename box_t, typename score_t>
void check_types(const char* types, int repeats, SoftFigures& figures) {
  Random random(sizeof(box_t) + 16 * sizeof(score_t) + 256 * std::is_same_v<box_t, at::Half>);
  const auto check_random = [&](int64_t count, Kind kind, bool gaussian) {
    const Call call{
        count,
        kind,
        random.pick(kScores),
        random.pick(kClasses),
        random.pick(kThresholds),
        random.pick(kBoxLayouts),
        random.pick(kVectorLayouts),
        random.pick(kVectorLayouts)};
    const SoftRule rule{gaussian, call.threshold, random.pick(kSigmas), random.pick(kLeast)};
    check<box_t, score_t>(types, call, rule, random.next(), figures);
  };
  for (int i = 0; i < repeats; ++i) {
    for (const Kind kind : kKinds) {
      for (const int64_t count : {0, 1, 2, 15, 16, 17, 63, 64, 65, 129, 300}) {
        check_random(count, kind, random.integer(0, 1) == 0);
      }
      check_random(random.integer(280, 400), kind, false);
      check_random(random.integer(280, 400), kind, true);
    }
  }
}

// So many boxes that small classes are next to each other on several threads, and that there are several grids.
void check_large(SoftFigures& figures) {
  uint64_t seed = 1;
  for (const Classes classes : {Classes::none, Classes::many, Classes::one_large}) {
    for (const bool gaussian : {false, true}) {
      const Call call{
          classes == Classes::many ? 5000 : 2000,
          Kind::uniform,
          Scores::uniform,
          classes,
          0.1,
          Layout::contiguous,
          Layout::contiguous,
          Layout::contiguous};
      check<float, float>("float", call, {gaussian, 0.1, 0.2, 1e-2}, seed++, figures);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 2;
  SoftFigures figures;
  check_types<float, float>("float", 2 * repeats, figures);
  check_types<double, double>("double", repeats, figures);
  check_types<float, double>("float, double scores", repeats, figures);
  check_types<double, at::Half>("double, fp16 scores", repeats, figures);
  check_types<at::BFloat16, at::BFloat16>("bf16", repeats, figures);
  check_types<at::Half, float>("fp16, float scores", repeats, figures);
  check_large(figures);
  std::printf(
      "lanes=%d calls=%" PRId64 " runs=%" PRId64 " taken=%" PRId64 " lowered=%" PRId64 " dropped=%" PRId64 "\n",
      static_cast<int>(at::vec::Vectorized<float>::size()), figures.calls, figures.runs, figures.taken, figures.lowered,
      figures.dropped);
  return 0;
}
