// What the kernels on boxes with scores share: sorting, classes, and a grid that finds the boxes near each other.
#ifndef INDUCTOR_VISION_BOXES_H
#define INDUCTOR_VISION_BOXES_H

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "base.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// N boxes, rows of numbers, with a score each, and the class that each is of; null: all are of one.
template <typename box_t, typename score_t>
struct ScoredBoxes {
  const box_t* boxes;
  int64_t row, column;
  const score_t* scores;
  int64_t score_distance;
  const int64_t* classes;
  int64_t class_distance;
  int64_t count;

  // A score in the type that is computed in.
  accumulate_t<score_t> score(int64_t i) const {
    return static_cast<accumulate_t<score_t>>(scores[i * score_distance]);
  }
  uint64_t class_of(int64_t i) const {
    return classes == nullptr ? 0 : static_cast<uint64_t>(classes[i * class_distance]);
  }
};

// Integers in the order of floating numbers.  Both zeros are equal, and so are all NaN, which are greatest.
template <typename acc_t>
inline uint64_t ordered_bits(acc_t value) {
  using bits_t = std::conditional_t<sizeof(acc_t) == 8, uint64_t, uint32_t>;
  constexpr bits_t kSign = bits_t(1) << (8 * sizeof(acc_t) - 1);
  bits_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & ~kSign) == 0) {
    return kSign;
  }
  return std::isnan(value) ? ~bits_t(0) : bits & kSign ? ~bits : bits | kSign;
}

// Stably sorts indices by their keys, least first, digit by digit; digits in which all keys agree are left out.
inline void sort_by_key(std::vector<uint64_t>& keys, std::vector<int64_t>& indices) {
  constexpr int kBits = 8, kDigits = 1 << kBits;
  const size_t count = keys.size();
  std::vector<uint64_t> other_keys(count);
  std::vector<int64_t> other_indices(count);
  uint64_t all = ~uint64_t(0), any = 0;
  for (const uint64_t key : keys) {
    all &= key;
    any |= key;
  }
  for (int shift = 0; shift < 64; shift += kBits) {
    const auto digit = [&](uint64_t key) { return (key >> shift) & (kDigits - 1); };
    if (digit(all ^ any) == 0) {
      continue;
    }
    std::array<size_t, kDigits + 1> first{};
    for (const uint64_t key : keys) {
      ++first[digit(key) + 1];
    }
    std::partial_sum(first.begin(), first.end(), first.begin());
    for (size_t i = 0; i < count; ++i) {
      const size_t place = first[digit(keys[i])]++;
      other_keys[place] = keys[i];
      other_indices[place] = indices[i];
    }
    keys.swap(other_keys);
    indices.swap(other_indices);
  }
}

// run(indices, parallel) for the indices of each class, by which they are sorted stably.  Large classes are one after
// the other, for all threads to share, small ones next to each other.
template <typename Run>
inline void for_each_class(std::vector<uint64_t> classes, std::vector<int64_t> indices, int64_t large, const Run& run) {
  sort_by_key(classes, indices);
  std::vector<int64_t> begin;
  for (size_t i = 0; i < classes.size(); ++i) {
    if (i == 0 || classes[i] != classes[i - 1]) {
      begin.push_back(static_cast<int64_t>(i));
    }
  }
  begin.push_back(static_cast<int64_t>(classes.size()));
  const size_t count = begin.size() - 1;
  const auto is_large = [&](size_t c) { return begin[c + 1] - begin[c] > large; };
  const auto run_class = [&](size_t c) {
    run(std::vector<int64_t>(indices.begin() + begin[c], indices.begin() + begin[c + 1]), is_large(c));
  };
  for (size_t c = 0; c < count; ++c) {
    if (is_large(c)) {
      run_class(c);
    }
  }
  constexpr size_t kFew = 4096;   // indices, for which it does not pay to wake the other threads
  ParallelExceptions exceptions;  // what a class needs is allocated when it is its turn
#pragma omp parallel for schedule(dynamic) if (indices.size() > kFew && count > 1)
  for (size_t c = 0; c < count; ++c) {
    if (!is_large(c)) {
      exceptions.run([&] { run_class(c); });
    }
  }
  exceptions.rethrow();
}

// The largest number of type acc_t that is not greater: whatever is of that type is greater than both or neither.
template <typename acc_t>
inline acc_t round_down_to(double value) {
  const acc_t rounded = static_cast<acc_t>(value);
  return static_cast<double>(rounded) > value ? std::nextafter(rounded, -std::numeric_limits<acc_t>::infinity())
                                              : rounded;
}

// Boxes (x1, y1, x2, y2), coordinate by coordinate.
template <typename acc_t>
struct BoxArrays {
  using value_t = acc_t;
  Scratch<acc_t> x1, y1, x2, y2, area;

  explicit BoxArrays(int64_t count) : x1(count), y1(count), x2(count), y2(count), area(count) {
  }
  void set(int64_t i, acc_t left, acc_t top, acc_t right, acc_t bottom) const {
    x1[i] = left;
    y1[i] = top;
    x2[i] = right;
    y2[i] = bottom;
    area[i] = (right - left) * (bottom - top);
  }
  // at(0), at(1), ...: the numbers of a box.
  template <typename At>
  void read(int64_t i, const At& at) const {
    set(i, at(0), at(1), at(2), at(3));
  }
  void set(int64_t i, const BoxArrays& other, int64_t j) const {
    x1[i] = other.x1[j];
    y1[i] = other.y1[j];
    x2[i] = other.x2[j];
    y2[i] = other.y2[j];
    area[i] = other.area[j];
  }
  // Along an axis, x or y.
  double centre(int axis, int64_t i) const {
    const acc_t low = axis == 0 ? x1[i] : y1[i], high = axis == 0 ? x2[i] : y2[i];
    return static_cast<double>(low) / 2 + static_cast<double>(high) / 2;  // their sum may be infinite
  }
  double length(int axis, int64_t i) const {
    return axis == 0 ? static_cast<double>(x2[i]) - static_cast<double>(x1[i])
                     : static_cast<double>(y2[i]) - static_cast<double>(y1[i]);
  }
  // Whether the box is one that, for a threshold of 0 or more, can overlap another by more than that: with sides, and
  // an area that is a number.  All others have an intersection of 0 or a union that is infinite or NaN.
  bool is_proper(int64_t i) const {
    return x2[i] - x1[i] > 0 && y2[i] - y1[i] > 0 && std::isfinite(area[i]);
  }

  // How far apart along an axis the centres of two boxes are at most, as a multiple of the length of either, if they
  // overlap by more than a threshold.
  //
  // If so, the intersection is longer than `threshold` times either length, l and m, and no longer than
  // (l + m) / 2 - d, where d is the distance: d < (l + m) / 2 - threshold * max(l, m), and m is between threshold * l
  // and l / threshold.
  static double reach(double threshold) {
    constexpr double kLeast = 0.05;      // below, little is gained
    constexpr double kRounding = 0.001;  // by much less than this, an overlap may be computed as more than it is
    const double least = threshold - kRounding;
    return threshold < kLeast ? std::numeric_limits<double>::infinity()
                              : std::max({1 - least, (1 / least - 1) / 2, 0.0});
  }
};

// Intersection over union, for any boxes, as torchvision computes it: NaN is not greater than anything.
template <typename acc_t>
inline acc_t overlap(const BoxArrays<acc_t>& a, int64_t i, const BoxArrays<acc_t>& b, int64_t j) {
  const acc_t left = std::max(a.x1[i], b.x1[j]), top = std::max(a.y1[i], b.y1[j]);
  const acc_t right = std::min(a.x2[i], b.x2[j]), bottom = std::min(a.y2[i], b.y2[j]);
  const acc_t intersection = std::max(acc_t(0), right - left) * std::max(acc_t(0), bottom - top);
  return intersection / (a.area[i] + b.area[j] - intersection);
}

// Where a grid cuts one axis: cells of equal length, but those at the ends have no end.
class GridAxis {
 public:
  // For most of the points: a few that are far away do not make the cells large.
  GridAxis(const std::vector<double>& points, int64_t cells) : cells_(cells) {
    std::vector<double> sorted = points;
    const int64_t left_out = static_cast<int64_t>(points.size()) / 64;
    const auto low = sorted.begin() + left_out, high = sorted.end() - 1 - left_out;
    std::nth_element(sorted.begin(), low, sorted.end());
    begin_ = *low;
    std::nth_element(low, high, sorted.end());
    cells_per_unit_ = *high > begin_ ? static_cast<double>(cells) / (*high - begin_) : 0;
  }

  int64_t cells() const {
    return cells_;
  }
  int64_t cell(double point) const {
    const double place = (point - begin_) * cells_per_unit_;
    return place >= static_cast<double>(cells_) ? cells_ - 1 : place > 0 ? static_cast<int64_t>(place) : 0;
  }

 private:
  int64_t cells_;
  double begin_, cells_per_unit_;
};

// Proper boxes by the cell that their centre is in.
template <typename Boxes>
class BoxGrid {
 public:
  BoxGrid(const Boxes& given, int64_t count, double threshold)
      : boxes(count),
        place_of(count),
        given_(given),
        reach_(Boxes::reach(threshold)),
        axes_{make_axis(0, count), make_axis(1, count)},
        cell_begin_(axes_[0].cells() * axes_[1].cells() + 1, 0) {
    for (int64_t i = 0; i < count; ++i) {
      place_of[i] = axes_[1].cell(given.centre(1, i)) * axes_[0].cells() + axes_[0].cell(given.centre(0, i));
      ++cell_begin_[place_of[i] + 1];
      for (const int axis : {0, 1}) {
        longest_[axis] = std::max(longest_[axis], given.length(axis, i));
      }
    }
    std::partial_sum(cell_begin_.begin(), cell_begin_.end(), cell_begin_.begin());
    std::vector<int64_t> next = cell_begin_;
    for (int64_t i = 0; i < count; ++i) {
      place_of[i] = next[place_of[i]]++;
      boxes.set(place_of[i], given, i);
    }
  }

  // By place: those of a cell follow each other, and so do the cells of a row.
  const Boxes boxes;
  std::vector<int64_t> place_of;

  // visit(begin, end) for the places of all boxes that box i can overlap by more than the threshold, and of others.
  template <typename Visit>
  void visit_neighbours(int64_t i, const Visit& visit) const {
    const auto rows = cells(1, i), columns = cells(0, i);
    for (int64_t row = rows[0]; row <= rows[1]; ++row) {
      const int64_t* begin = cell_begin_.data() + row * axes_[0].cells();
      visit(begin[columns[0]], begin[columns[1] + 1]);
    }
  }

 private:
  using acc_t = typename Boxes::value_t;

  GridAxis make_axis(int axis, int64_t count) const {
    constexpr double kPerCell = 8;
    std::vector<double> centres(count);
    for (int64_t i = 0; i < count; ++i) {
      centres[i] = given_.centre(axis, i);
    }
    return {centres, std::max<int64_t>(std::llround(std::sqrt(static_cast<double>(count) / kPerCell)), 1)};
  }

  // The first and the last cell along an axis that the centre of a neighbour can be in.
  std::array<int64_t, 2> cells(int axis, int64_t i) const {
    using limits = std::numeric_limits<double>;
    using acc_limits = std::numeric_limits<acc_t>;
    const double from = given_.centre(axis, i), own = given_.length(axis, i), longest = longest_[axis];
    // Intersections with a box of so small an area may be denormal, and rounded by any part of themselves.
    const bool small = given_.area[i] < acc_limits::min() / acc_limits::epsilon();
    const double reached = small ? limits::infinity() : reach_ * own;
    // The second term allows for the rounding of centres.
    const double distance = std::min(reached, (own + longest) / 2) +
                            8 * (limits::epsilon() * (std::abs(from) + own + longest) + limits::denorm_min());
    return {axes_[axis].cell(from - distance), axes_[axis].cell(from + distance)};
  }

  const Boxes& given_;
  double reach_;
  std::array<double, 2> longest_{};
  std::array<GridAxis, 2> axes_;
  std::vector<int64_t> cell_begin_;  // of all cells, and the end of the last
};

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_BOXES_H
