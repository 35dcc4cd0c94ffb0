// Runs the kernels of box_iou_rotated.h and nms_rotated.h against plain loops, to be built with sanitizers.
//
// Overlaps are compared with those of clipped polygons; suppression must be exactly that of a loop over all pairs with
// the overlaps of the former.  Each call runs on several numbers of threads, with the same bits.  Memory and gaps are
// as in nms_test.cpp.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "box_iou_rotated.h"
#include "nms_rotated.h"

#include <numeric>

#include "scored_boxes.h"

namespace {

using namespace harness;
using inductor_vision::RotatedBoxes;

const double kThresholds[] = {0.5, 0.0, 0.03, 0.1, 0.3, 0.55, 0.7, 0.9, 0.97, 1, 2, -1, kNaN};

struct RotatedFigures {
  int64_t calls = 0;
  int64_t runs = 0;
  int64_t overlaps = 0;  // compared with those of polygons
  int64_t kept = 0;
  int64_t suppressed = 0;
  double error = 0;
};

double make_angle(Kind kind, Random& random) {
  const double hostile[] = {kNaN, kInf, -kInf, 1e30, -1e4, 1e-30};
  switch (random.integer(0, kind == Kind::hostile ? 3 : 2)) {
    case 0:
      return static_cast<double>(90 * random.integer(-9, 9));
    case 1:
      return static_cast<double>(45 * random.integer(-9, 9)) + random.uniform(-1e-9, 1e-9);
    case 2:
      return random.uniform(-400, 400);
    default:
      return random.pick(hostile);
  }
}

// A call of nms_test.cpp with boxes that are turned, some of them into narrow ones.
template <typename box_t, typename score_t>
struct RotatedTensors {
  Tensors<box_t, score_t> upright;
  Tensor<box_t> boxes;

  RotatedTensors(const Call& call, uint64_t seed) : upright(call, seed), boxes(1, 1, call.count, 5, call.box_layout) {
    Random random(seed + 1);
    std::vector<std::array<double, 5>> rows;
    for (const Box& box : make_boxes<box_t>(call, random)) {
      const double narrow = random.integer(0, 3) == 0 ? 0.01 : 1;
      rows.push_back(
          {(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], (box[3] - box[1]) * narrow,
           make_angle(call.kind, random)});
    }
    boxes.fill([&](int64_t, int64_t, int64_t y, int64_t x) { return rows[y][x]; });
  }
  ScoredBoxes<box_t, score_t> view() const {
    ScoredBoxes<box_t, score_t> view = upright.view();
    view.boxes = boxes.view().data;
    view.row = boxes.view().row;
    view.column = boxes.view().column;
    return view;
  }
};

struct Point {
  long double x, y;
};

std::vector<Point> corners(const double* box, long double x, long double y) {
  const long double angle = std::fmod(static_cast<long double>(box[4]), 360.0L) * 3.14159265358979323846264338L / 180;
  const long double c = std::cos(angle), s = std::sin(angle), w = std::abs(box[2]) / 2, h = std::abs(box[3]) / 2;
  std::vector<Point> points;
  for (const auto& [a, b] : {std::pair<int, int>{1, 1}, {-1, 1}, {-1, -1}, {1, -1}}) {
    points.push_back({x + a * w * c + b * h * s, y - a * w * s + b * h * c});
  }
  return points;
}

// By clipping a polygon at one edge of the other after the other.
double polygon_iou(const double* a, const double* b) {
  const long double area_a = static_cast<long double>(a[2]) * a[3], area_b = static_cast<long double>(b[2]) * b[3];
  std::vector<Point> polygon = corners(a, 0, 0);
  const std::vector<Point> clip =
      corners(b, static_cast<long double>(b[0]) - a[0], static_cast<long double>(b[1]) - a[1]);
  for (size_t e = 0; e < 4; ++e) {
    const Point from = clip[e], to = clip[(e + 1) % 4];
    const auto side = [&](const Point& p) {
      return (to.x - from.x) * (p.y - from.y) - (to.y - from.y) * (p.x - from.x);
    };
    std::vector<Point> left;
    for (size_t i = 0; i < polygon.size(); ++i) {
      const Point p = polygon[i], q = polygon[(i + 1) % polygon.size()];
      const long double sp = side(p), sq = side(q);
      if (sp >= 0) {
        left.push_back(p);
      }
      if ((sp >= 0) != (sq >= 0)) {
        const long double t = sp / (sp - sq);
        left.push_back({p.x + t * (q.x - p.x), p.y + t * (q.y - p.y)});
      }
    }
    polygon = left;
  }
  long double twice = 0;
  for (size_t i = 0; i < polygon.size(); ++i) {
    const Point p = polygon[i], q = polygon[(i + 1) % polygon.size()];
    twice += p.x * q.y - p.y * q.x;
  }
  const long double intersection = std::abs(twice) / 2;
  return static_cast<double>(intersection / (area_a + area_b - intersection));
}

// Whether areas and sums have all their bits, and what a polygon is clipped at is no needle.
bool is_plain(const double* box) {
  const double aspect = std::abs(box[2] / box[3]);
  return box[2] * box[3] > 1e-250 && aspect < 1e6 && aspect > 1e-6 &&
         std::all_of(box, box + 5, [](double v) { return std::abs(v) < 1e15; });
}

template <typename box_t>
std::vector<box_t> overlaps(const RotatedBoxes<box_t>& a, const RotatedBoxes<box_t>& b, int threads) {
  omp_set_num_threads(threads);
  std::vector<box_t> out(a.count * b.count, poison<box_t>());
  inductor_vision::box_iou_rotated(a, b, out.data());
  return out;
}

template <typename box_t, typename score_t>
void check(const char* types, const Call& call, uint64_t seed, RotatedFigures& figures) {
  const RotatedTensors<box_t, score_t> tensors(call, seed);
  const ScoredBoxes<box_t, score_t> view = tensors.view();
  const int64_t count = call.count;
  const std::vector<double> boxes = tensors.boxes.numbers(), scores = tensors.upright.scores.numbers();
  const std::vector<double> classes = tensors.upright.classes.numbers();
  const RotatedBoxes<box_t> given{view.boxes, view.row, view.column, count};
  const RotatedBoxes<double> exact{boxes.data(), 5, 1, count};
  const std::vector<double> expected = overlaps(exact, exact, 1);
  ++figures.calls;

  const int64_t compared = std::min<int64_t>(count, 40);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      const double iou = expected[i * count + j], *a = &boxes[5 * i], *b = &boxes[5 * j];
      bool right = iou >= 0 && iou <= 1 + 1e-12;
      if (i < compared && j < compared && is_plain(a) && is_plain(b)) {
        const double error = std::abs(iou - polygon_iou(a, b));
        figures.error = std::max(figures.error, error);
        figures.overlaps += iou > 0;
        right = right && error < 1e-9;
      }
      if (!right) {
        char text[400];
        std::snprintf(
            text, sizeof text, "IoU %.17g, by polygons %.17g, of (%.17g %.17g %.17g %.17g %.17g) and (%g %g %g %g %g)",
            iou, polygon_iou(a, b), a[0], a[1], a[2], a[3], a[4], b[0], b[1], b[2], b[3], b[4]);
        fail(types, text, call.describe());
      }
    }
  }

  std::vector<int64_t> order(count), kept;
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return scores[i] > scores[j] || (std::isnan(scores[i]) && !std::isnan(scores[j]));
  });
  for (const int64_t i : order) {
    const auto suppresses = [&](int64_t j) {
      return classes[j] == classes[i] && expected[j * count + i] > call.threshold;
    };
    if (std::none_of(kept.begin(), kept.end(), suppresses)) {
      kept.push_back(i);
    }
  }
  figures.kept += static_cast<int64_t>(kept.size());
  figures.suppressed += count - static_cast<int64_t>(kept.size());
  kept.resize(count, -1);
  // Many columns are computed in parts, a few rows of which are enough.
  const RotatedBoxes<box_t> few{given.boxes, given.row, given.column, std::min<int64_t>(count, 200)};
  for (const int threads : kThreads) {
    const std::vector<box_t> ious = overlaps(few, given, threads);
    const std::unique_ptr<int64_t[]> out(new int64_t[count]);
    inductor_vision::nms_rotated(view, call.threshold, out.get());
    ++figures.runs;
    for (int64_t i = 0; i < few.count * count; ++i) {
      if (ious[i] != static_cast<box_t>(expected[i])) {
        fail(types, "on " + std::to_string(threads) + " threads, an overlap differs", call.describe());
      }
    }
    if (!std::equal(kept.begin(), kept.end(), out.get())) {
      fail(types, "on " + std::to_string(threads) + " threads, other boxes are kept", call.describe());
    }
  }
}

template <typename box_t, typename score_t>
void check_types(const char* types, int repeats, RotatedFigures& figures) {
  Random random(sizeof(box_t) + 16 * sizeof(score_t) + 256 * std::is_same_v<box_t, at::Half>);
  for (int i = 0; i < repeats; ++i) {
    for (const Kind kind : kKinds) {
      for (const int64_t count : {0, 1, 2, 7, 8, 9, 17, 64, 130}) {
        const Call call{
            count,
            kind,
            random.pick(kScores),
            random.pick(kClasses),
            random.pick(kThresholds),
            random.pick(kBoxLayouts),
            random.pick(kVectorLayouts),
            random.pick(kVectorLayouts)};
        check<box_t, score_t>(types, call, random.next(), figures);
      }
    }
  }
}

// So many boxes of one class that they are decided on all threads.
void check_large(RotatedFigures& figures) {
  const Call call{4200, Kind::uniform,      Scores::uniform,    Classes::none,
                  0.3,  Layout::contiguous, Layout::contiguous, Layout::contiguous};
  check<float, float>("float", call, 1, figures);
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 2;
  RotatedFigures figures;
  check_types<float, float>("float", 2 * repeats, figures);
  check_types<double, double>("double", 2 * repeats, figures);
  check_types<double, at::Half>("double, fp16 scores", repeats, figures);
  check_types<at::BFloat16, at::BFloat16>("bf16", repeats, figures);
  check_types<at::Half, float>("fp16, float scores", repeats, figures);
  check_large(figures);
  std::printf(
      "lanes=%d calls=%" PRId64 " runs=%" PRId64 " overlaps=%" PRId64 " error=%g kept=%" PRId64 " suppressed=%" PRId64
      "\n",
      static_cast<int>(at::vec::Vectorized<float>::size()), figures.calls, figures.runs, figures.overlaps,
      figures.error, figures.kept, figures.suppressed);
  return 0;
}
