// Calls of the kernels on boxes with scores: boxes, scores and classes of many kinds, in tensors with any strides.
#ifndef INDUCTOR_VISION_TEST_SCORED_BOXES_H
#define INDUCTOR_VISION_TEST_SCORED_BOXES_H

#include "boxes.h"
#include "harness.h"

#include <cinttypes>
#include <cstdio>

namespace harness {

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

inline Box from_centre(double x, double y, double width, double height) {
  return {x - width / 2, y - height / 2, x + width / 2, y + height / 2};
}

// A box of any kind but duplicates.
template <typename box_t>
inline Box make_box(Kind kind, int64_t i, int64_t count, Random& random) {
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
inline std::vector<Box> make_boxes(const Call& call, Random& random) {
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

inline double make_score(Scores scores, Random& random) {
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
inline double make_class(Classes classes, Random& random) {
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

// Boxes, [count, 4], and numbers, [count], each on a buffer that ends with its last element.
template <typename scalar_t>
inline Tensor<scalar_t> rows(int64_t count, Layout layout) {
  return Tensor<scalar_t>(1, 1, count, 4, layout);
}
template <typename scalar_t>
inline Tensor<scalar_t> vector(int64_t count, Layout layout) {
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

[[noreturn]] inline void fail(const char* types, const std::string& what, const std::string& call) {
  std::printf("%s: %s\n  in %s\n", types, what.c_str(), call.c_str());
  std::exit(1);
}

}  // namespace harness

#endif  // INDUCTOR_VISION_TEST_SCORED_BOXES_H
