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

#include "boxes.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// Sets the bits of suppressed[j], begin <= j < end, where proper box i of `a` overlaps proper box j of `b` by more than
// the threshold.
template <typename acc_t>
inline void suppress(
    const BoxArrays<acc_t>& a, int64_t i, const BoxArrays<acc_t>& b, int64_t begin, int64_t end, acc_t threshold,
    acc_t* suppressed) {
  using Vec = Vectorized<acc_t>;
  constexpr int64_t kLanes = Vec::size();
  const Vec x1(a.x1[i]), y1(a.y1[i]), x2(a.x2[i]), y2(a.y2[i]), area(a.area[i]), zero(0), limit(threshold);
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
    (before | (ratio > limit)).store(suppressed + j, count);
  }
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
template <typename Boxes>
struct Undecided {
  std::vector<int64_t> ids;
  Boxes boxes;

  Undecided(std::vector<int64_t> given, const Boxes& from)
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
template <typename Boxes>
inline std::vector<int64_t> decide(
    const Undecided<Boxes>& undecided, double threshold, bool parallel, std::vector<char>& kept) {
  using acc_t = typename Boxes::value_t;
  constexpr int64_t kGroup = 256;
  const int64_t count = undecided.count();
  const Boxes& boxes = undecided.boxes;
  const BoxGrid<Boxes> grid(boxes, count, threshold);
  const acc_t limit = round_down_to<acc_t>(threshold);
  const Boxes group(kGroup);
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
template <typename Boxes>
inline void decide_pair_by_pair(const Undecided<Boxes>& undecided, double threshold, std::vector<char>& kept) {
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
template <typename Boxes, typename box_t, typename score_t>
inline void suppress_greedily(const ScoredBoxes<box_t, score_t>& given, double threshold, int64_t* out) {
  const int64_t count = given.count;
  std::vector<uint64_t> keys(count);
  std::vector<int64_t> order(count);  // indices, best first
  for (int64_t i = 0; i < count; ++i) {
    keys[i] = ~ordered_bits(given.score(i));
    order[i] = i;
  }
  sort_by_key(keys, order);

  std::vector<char> kept(count, false);  // by place in `order`
  std::vector<int64_t> ranks;            // places in `order` of the boxes that may be suppressed
  const Boxes boxes(count);              // by place in `order`
  const bool improper_may_suppress = threshold < 0;
  keys.clear();
  for (int64_t rank = 0; rank < count; ++rank) {
    const box_t* box = given.boxes + order[rank] * given.row;
    boxes.read(rank, [&](int64_t i) { return static_cast<typename Boxes::value_t>(box[i * given.column]); });
    kept[rank] = std::isnan(threshold) || (!improper_may_suppress && !boxes.is_proper(rank));
    if (!kept[rank]) {
      keys.push_back(given.class_of(order[rank]));
      ranks.push_back(rank);
    }
  }
  constexpr int64_t kLarge = 4096;
  for_each_class(std::move(keys), std::move(ranks), kLarge, [&](std::vector<int64_t> left, bool parallel) {
    if (left.size() == 1) {
      kept[left[0]] = true;
      return;
    }
    if (improper_may_suppress) {
      decide_pair_by_pair(Undecided<Boxes>(std::move(left), boxes), threshold, kept);
      return;
    }
    while (!left.empty()) {
      left = decide(Undecided<Boxes>(std::move(left), boxes), threshold, parallel, kept);
    }
  });

  int64_t* end = out;
  for (int64_t rank = 0; rank < count; ++rank) {
    if (kept[rank]) {
      *end++ = order[rank];
    }
  }
  std::fill(end, out + count, int64_t{-1});
}

template <typename box_t, typename score_t>
inline void nms(const ScoredBoxes<box_t, score_t>& given, double threshold, int64_t* out) {
  suppress_greedily<BoxArrays<accumulate_t<box_t>>>(given, threshold, out);
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_NMS_H
