// Non-maximum suppression: boxes in the order of their scores, each kept unless it overlaps one that was kept before.
//
//   kept = the boxes i, best score first, with no j kept before for which IoU(j, i) > threshold, j of i's class
//
// Each class is a problem of its own.  Boxes that overlap so much have their centres near each other, compared with
// their widths and heights: the boxes of a class are sorted into the cells of a grid by their centres, and one that is
// kept is compared with those in the cells around it.  They are decided a group at a time: the best ones left are
// compared with each other, and then those that are kept with all other boxes, in parallel.
#ifndef INDUCTOR_VISION_NMS_H
#define INDUCTOR_VISION_NMS_H

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "base.h"

namespace inductor_vision {

// N boxes (x1, y1, x2, y2), with a score each, and the class that each is of; null: all are of one.
template <typename box_t, typename score_t>
struct ScoredBoxes {
  const box_t* boxes;
  int64_t row, column;
  const score_t* scores;
  int64_t score_distance;
  const int64_t* classes;
  int64_t class_distance;
  int64_t count;
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

// Boxes, coordinate by coordinate.
template <typename acc_t>
struct BoxArrays {
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
  void set(int64_t i, const BoxArrays& other, int64_t j) const {
    x1[i] = other.x1[j];
    y1[i] = other.y1[j];
    x2[i] = other.x2[j];
    y2[i] = other.y2[j];
    area[i] = other.area[j];
  }
  acc_t width(int64_t i) const {
    return x2[i] - x1[i];
  }
  acc_t height(int64_t i) const {
    return y2[i] - y1[i];
  }
  // Whether the box is one that, for a threshold of 0 or more, can overlap another by more than that: with sides, and
  // an area that is a number.  All others have an intersection of 0 or a union that is infinite or NaN.
  bool is_proper(int64_t i) const {
    return width(i) > 0 && height(i) > 0 && std::isfinite(area[i]);
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

// Sets the bits of suppressed[j], begin <= j < end, where proper box i of `a` overlaps proper box j of `b` by more than
// the threshold.
template <typename acc_t>
inline void suppress(
    const BoxArrays<acc_t>& a, int64_t i, const BoxArrays<acc_t>& b, int64_t begin, int64_t end,
    const Vectorized<acc_t>& threshold, acc_t* suppressed) {
  using Vec = Vectorized<acc_t>;
  constexpr int64_t kLanes = Vec::size();
  const Vec x1(a.x1[i]), y1(a.y1[i]), x2(a.x2[i]), y2(a.y2[i]), area(a.area[i]), zero(0);
  for (int64_t j = begin; j < end; j += kLanes) {
    const int64_t count = std::min(kLanes, end - j);
    const auto load = [&](const Scratch<acc_t>& values) {
      return count == kLanes ? Vec::loadu(values.get() + j) : Vec::loadu(values.get() + j, count);
    };
    const Vec width = at::vec::minimum(x2, load(b.x2)) - at::vec::maximum(x1, load(b.x1));
    const Vec height = at::vec::minimum(y2, load(b.y2)) - at::vec::maximum(y1, load(b.y1));
    const Vec intersection = at::vec::maximum(zero, width) * at::vec::maximum(zero, height);
    const Vec ratio = intersection / (area + load(b.area) - intersection);
    const Vec before = Vec::loadu(suppressed + j, count);
    (before | (ratio > threshold)).store(suppressed + j, count);
  }
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

// How far apart along an axis the centres of two boxes are at most, as a multiple of the length of either, if they
// overlap by more than a threshold.
//
// If so, the intersection is longer than `threshold` times either length, l and m, and no longer than (l + m) / 2 - d,
// where d is the distance: d < (l + m) / 2 - threshold * max(l, m), and m is between threshold * l and l / threshold.
inline double reach(double threshold) {
  constexpr double kLeast = 0.05;      // below, little is gained
  constexpr double kRounding = 0.001;  // by much less than this, an overlap may be computed as more than it is
  const double least = threshold - kRounding;
  return threshold < kLeast ? std::numeric_limits<double>::infinity()
                            : std::max({1 - least, (1 / least - 1) / 2, 0.0});
}

// Proper boxes by the cell that their centre is in.
template <typename acc_t>
class BoxGrid {
 public:
  BoxGrid(const BoxArrays<acc_t>& given, int64_t count, double threshold)
      : boxes(count),
        place_of(count),
        given_(given),
        reach_(reach(threshold)),
        x_(axis(given.x1, given.x2, count)),
        y_(axis(given.y1, given.y2, count)),
        cell_begin_(x_.cells() * y_.cells() + 1, 0) {
    for (int64_t i = 0; i < count; ++i) {
      place_of[i] = y_.cell(centre(given.y1, given.y2, i)) * x_.cells() + x_.cell(centre(given.x1, given.x2, i));
      ++cell_begin_[place_of[i] + 1];
      longest_x_ = std::max(longest_x_, length(given.x1, given.x2, i));
      longest_y_ = std::max(longest_y_, length(given.y1, given.y2, i));
    }
    std::partial_sum(cell_begin_.begin(), cell_begin_.end(), cell_begin_.begin());
    std::vector<int64_t> next = cell_begin_;
    for (int64_t i = 0; i < count; ++i) {
      place_of[i] = next[place_of[i]]++;
      boxes.set(place_of[i], given, i);
    }
  }

  // By place: those of a cell follow each other, and so do the cells of a row.
  const BoxArrays<acc_t> boxes;
  std::vector<int64_t> place_of;

  // visit(begin, end) for the places of all boxes that box i can overlap by more than the threshold, and of others.
  template <typename Visit>
  void visit_neighbours(int64_t i, const Visit& visit) const {
    const auto rows = cells(y_, given_.y1, given_.y2, i, longest_y_);
    const auto columns = cells(x_, given_.x1, given_.x2, i, longest_x_);
    for (int64_t row = rows[0]; row <= rows[1]; ++row) {
      const int64_t* begin = cell_begin_.data() + row * x_.cells();
      visit(begin[columns[0]], begin[columns[1] + 1]);
    }
  }

 private:
  static double centre(const Scratch<acc_t>& low, const Scratch<acc_t>& high, int64_t i) {
    return static_cast<double>(low[i]) / 2 + static_cast<double>(high[i]) / 2;  // their sum may be infinite
  }
  static double length(const Scratch<acc_t>& low, const Scratch<acc_t>& high, int64_t i) {
    return static_cast<double>(high[i]) - static_cast<double>(low[i]);
  }
  static GridAxis axis(const Scratch<acc_t>& low, const Scratch<acc_t>& high, int64_t count) {
    constexpr double kPerCell = 8;
    std::vector<double> centres(count);
    for (int64_t i = 0; i < count; ++i) {
      centres[i] = centre(low, high, i);
    }
    return {centres, std::max<int64_t>(std::llround(std::sqrt(static_cast<double>(count) / kPerCell)), 1)};
  }

  // The first and the last cell along an axis that the centre of a neighbour can be in.
  std::array<int64_t, 2> cells(
      const GridAxis& axis, const Scratch<acc_t>& low, const Scratch<acc_t>& high, int64_t i, double longest) const {
    using limits = std::numeric_limits<double>;
    using acc_limits = std::numeric_limits<acc_t>;
    const double from = centre(low, high, i), own = length(low, high, i);
    // Intersections with a box of so small an area may be denormal, and rounded by any part of themselves.
    const bool small = given_.area[i] < acc_limits::min() / acc_limits::epsilon();
    const double reached = small ? limits::infinity() : reach_ * own;
    // The second term allows for the rounding of centres.
    const double distance = std::min(reached, (own + longest) / 2) +
                            8 * (limits::epsilon() * (std::abs(from) + own + longest) + limits::denorm_min());
    return {axis.cell(from - distance), axis.cell(from + distance)};
  }

  const BoxArrays<acc_t>& given_;
  double reach_, longest_x_ = 0, longest_y_ = 0;
  GridAxis x_, y_;
  std::vector<int64_t> cell_begin_;  // of all cells, and the end of the last
};

// The largest number of type acc_t that is not greater: whatever is of that type is greater than both or neither.
template <typename acc_t>
inline acc_t round_down_to(double value) {
  const acc_t rounded = static_cast<acc_t>(value);
  return static_cast<double>(rounded) > value ? std::nextafter(rounded, -std::numeric_limits<acc_t>::infinity())
                                              : rounded;
}

// Vectors of flags are those of comparisons: all bits are set, or none.  Not by signbit(), which is `flag < 0` to GCC
// with -fno-signed-zeros, and these are NaN.
template <typename acc_t>
inline bool is_set(acc_t flag) {
  unsigned char byte;
  std::memcpy(&byte, &flag, 1);
  return byte != 0;
}

// The boxes of one class that are not decided yet, best first.
template <typename acc_t>
struct Undecided {
  std::vector<int64_t> ids;
  BoxArrays<acc_t> boxes;

  Undecided(std::vector<int64_t> given, const BoxArrays<acc_t>& from)
      : ids(std::move(given)),
        boxes(static_cast<int64_t>(ids.size())) {
    for (int64_t i = 0; i < count(); ++i) {
      boxes.set(i, from, ids[i]);
    }
  }
  int64_t count() const {
    return static_cast<int64_t>(ids.size());
  }
};

// Decides the best boxes, group by group: kept[id] = true for those that are kept.  Ends when there are no more, or
// when so many are suppressed that it pays to sort the others into a new grid; they are returned.
template <typename acc_t>
inline std::vector<int64_t> decide(
    const Undecided<acc_t>& undecided, double threshold, bool parallel, std::vector<char>& kept) {
  constexpr int64_t kGroup = 256;
  const int64_t count = undecided.count();
  const BoxArrays<acc_t>& boxes = undecided.boxes;
  const BoxGrid<acc_t> grid(boxes, count, threshold);
  const Vectorized<acc_t> limit(round_down_to<acc_t>(threshold));
  const BoxArrays<acc_t> group(kGroup);
  const Scratch<acc_t> suppressed(count), suppressed_in_group(kGroup);  // by place in the grid and in the group
  std::fill_n(suppressed.get(), count, acc_t(0));
  int64_t next = 0;
  bool sparse = false;
  std::vector<int64_t> candidates, newly_kept;
  candidates.reserve(kGroup);
  newly_kept.reserve(kGroup);

  const auto decide_group = [&] {
    candidates.clear();
    newly_kept.clear();
    const int64_t first = next;
    for (; next < count && candidates.size() < kGroup; ++next) {
      if (!is_set(suppressed[grid.place_of[next]])) {
        group.set(static_cast<int64_t>(candidates.size()), boxes, next);
        candidates.push_back(next);
      }
    }
    sparse = next - first > 2 * kGroup;
    const int64_t size = static_cast<int64_t>(candidates.size());
    std::fill_n(suppressed_in_group.get(), size, acc_t(0));
    for (int64_t i = 0; i < size; ++i) {
      if (!is_set(suppressed_in_group[i])) {
        newly_kept.push_back(candidates[i]);
        kept[undecided.ids[candidates[i]]] = true;
        suppress(group, i, group, i + 1, size, limit, suppressed_in_group.get());
      }
    }
  };
#pragma omp parallel if (parallel)
  {
    // Each thread has its part of the grid.
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t begin = count * thread / threads, end = count * (thread + 1) / threads;
    for (bool more = true; more;) {
#pragma omp single
      decide_group();
      more = !sparse && !newly_kept.empty();  // of this group: the next one may come any time after the barrier
      for (const int64_t i : newly_kept) {
        grid.visit_neighbours(i, [&](int64_t first, int64_t last) {
          suppress(boxes, i, grid.boxes, std::max(first, begin), std::min(last, end), limit, suppressed.get());
        });
      }
#pragma omp barrier  // the next group depends on all of it
    }
  }
  std::vector<int64_t> left;
  for (; next < count; ++next) {
    if (!is_set(suppressed[grid.place_of[next]])) {
      left.push_back(undecided.ids[next]);
    }
  }
  return left;
}

// The same for thresholds below 0: no intersection is needed, and improper boxes count.
template <typename acc_t>
inline void decide_pair_by_pair(const Undecided<acc_t>& undecided, double threshold, std::vector<char>& kept) {
  std::vector<int64_t> before;
  for (int64_t i = 0; i < undecided.count(); ++i) {
    const auto suppresses = [&](int64_t j) { return overlap(undecided.boxes, j, undecided.boxes, i) > threshold; };
    if (std::none_of(before.begin(), before.end(), suppresses)) {
      before.push_back(i);
      kept[undecided.ids[i]] = true;
    }
  }
}

// out[N] = the indices of the boxes that are kept, best first, and then -1.
template <typename box_t, typename score_t>
inline void nms(const ScoredBoxes<box_t, score_t>& given, double threshold, int64_t* out) {
  using acc_t = accumulate_t<box_t>;
  const int64_t count = given.count;
  std::vector<uint64_t> keys(count);
  std::vector<int64_t> order(count);  // indices, best first
  for (int64_t i = 0; i < count; ++i) {
    keys[i] = ~ordered_bits(static_cast<accumulate_t<score_t>>(given.scores[i * given.score_distance]));
    order[i] = i;
  }
  sort_by_key(keys, order);

  std::vector<char> kept(count, false);  // by place in `order`
  std::vector<int64_t> ranks;            // places in `order`, class by class, of the boxes that may be suppressed
  const BoxArrays<acc_t> boxes(count);   // by place in `order`
  const bool improper_may_suppress = threshold < 0;
  keys.clear();
  for (int64_t rank = 0; rank < count; ++rank) {
    const box_t* box = given.boxes + order[rank] * given.row;
    const auto at = [&](int64_t i) { return static_cast<acc_t>(box[i * given.column]); };
    boxes.set(rank, at(0), at(1), at(2), at(3));
    kept[rank] = std::isnan(threshold) || (!improper_may_suppress && !boxes.is_proper(rank));
    if (!kept[rank]) {
      keys.push_back(
          given.classes == nullptr ? 0 : static_cast<uint64_t>(given.classes[order[rank] * given.class_distance]));
      ranks.push_back(rank);
    }
  }
  sort_by_key(keys, ranks);
  std::vector<int64_t> class_begin;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (i == 0 || keys[i] != keys[i - 1]) {
      class_begin.push_back(static_cast<int64_t>(i));
    }
  }
  class_begin.push_back(static_cast<int64_t>(keys.size()));

  const auto run = [&](size_t c, bool parallel) {
    std::vector<int64_t> left(ranks.begin() + class_begin[c], ranks.begin() + class_begin[c + 1]);
    if (left.size() == 1) {
      kept[left[0]] = true;
      return;
    }
    if (improper_may_suppress) {
      decide_pair_by_pair(Undecided<acc_t>(std::move(left), boxes), threshold, kept);
      return;
    }
    while (!left.empty()) {
      left = decide(Undecided<acc_t>(std::move(left), boxes), threshold, parallel, kept);
    }
  };
  // Large classes one after the other on all threads, small ones next to each other.
  constexpr int64_t kLarge = 4096;
  const auto is_large = [&](size_t c) { return class_begin[c + 1] - class_begin[c] > kLarge; };
  const size_t classes = class_begin.size() - 1;
  for (size_t c = 0; c < classes; ++c) {
    if (is_large(c)) {
      run(c, true);
    }
  }
#pragma omp parallel for schedule(dynamic) if (count > kLarge && classes > 1)
  for (size_t c = 0; c < classes; ++c) {
    if (!is_large(c)) {
      run(c, false);
    }
  }

  int64_t* end = out;
  for (int64_t rank = 0; rank < count; ++rank) {
    if (kept[rank]) {
      *end++ = order[rank];
    }
  }
  std::fill(end, out + count, int64_t{-1});
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_NMS_H
