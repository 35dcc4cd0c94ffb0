// Soft non-maximum suppression: boxes in the order of their scores, each lowering the scores of those that it overlaps.
//
//   i = the box of the highest score s among those left, the first of equal ones; it is taken
//   s[j] *= weight(IoU(i, j)) for all others j of i's class
//
// Until all scores left are below a least one.  Scores only fall, and a weight is 1 where boxes do not overlap: the
// boxes of a class are in the cells of a grid, and only those near i are visited.  The highest score of every block of
// boxes is kept up to date, so that the best of all is found by looking at the blocks.
#ifndef INDUCTOR_VISION_SOFT_NMS_H
#define INDUCTOR_VISION_SOFT_NMS_H

#include "boxes.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

struct SoftRule {
  bool gaussian;  // weight(x) = exp(-x * x / sigma); otherwise 1 - x where x > threshold, else 1
  double threshold, sigma, least_score;

  // The weight is 1 for overlaps that are not greater.  Less than 0 would be as good as 0: what does not overlap keeps
  // its score.
  double limit() const {
    return gaussian ? 0 : std::max(threshold, 0.0);
  }
  template <typename real_t>
  bool drops(real_t score) const {
    return static_cast<double>(score) < least_score;
  }
};

// Boxes of one class that are still in the race, in a grid, with their scores.
template <typename real_t>
class SoftRace {
 public:
  SoftRace(const std::vector<int64_t>& ids, const BoxArrays<real_t>& boxes, const real_t* scores, const SoftRule& rule)
      : rule_(rule),
        count_(static_cast<int64_t>(ids.size())),
        given_(pick(ids, boxes)),
        grid_(given_, count_, rule.limit()),
        index_of_(count_),
        scores_(count_),
        stale_(divide_up(count_, kBlock)) {
    for (int64_t i = 0; i < count_; ++i) {
      index_of_[grid_.place_of[i]] = i;
      scores_[grid_.place_of[i]] = std::isnan(scores[ids[i]]) ? kGone : scores[ids[i]];
    }
    for (size_t block = 0; block < stale_.size(); ++block) {
      heap_.push_back(best_of(static_cast<int64_t>(block)));
    }
    std::make_heap(heap_.begin(), heap_.end());
  }

  // The best box; -1 if no score is greater than 0 and not too low.
  int64_t best() {
    while (stale_[heap_.front().block]) {
      std::pop_heap(heap_.begin(), heap_.end());
      heap_.back() = best_of(heap_.back().block);
      std::push_heap(heap_.begin(), heap_.end());
    }
    const Best& best = heap_.front();
    return best.score > 0 && !rule_.drops(best.score) ? best.first : -1;
  }
  // Has box i lower the scores of the others, and leave; its score.
  real_t take(int64_t i) {
    const int64_t place = grid_.place_of[i];
    const real_t score = std::exchange(scores_[place], kGone);
    stale_[place / kBlock] = true;
    grid_.visit_neighbours(i, [&](int64_t begin, int64_t end) {
      if (lower(place, begin, end)) {
        std::fill(stale_.begin() + begin / kBlock, stale_.begin() + divide_up(end, kBlock), true);
      }
    });
    return score;
  }
  // The score of box i; negative if it has left.
  real_t score(int64_t i) const {
    return scores_[grid_.place_of[i]];
  }

 private:
  using Vec = Vectorized<real_t>;
  static constexpr int64_t kBlock = 64;
  static constexpr real_t kGone = -1;

  static BoxArrays<real_t> pick(const std::vector<int64_t>& ids, const BoxArrays<real_t>& boxes) {
    BoxArrays<real_t> picked(static_cast<int64_t>(ids.size()));
    for (size_t i = 0; i < ids.size(); ++i) {
      picked.set(static_cast<int64_t>(i), boxes, ids[i]);
    }
    return picked;
  }

  // Whether any score was changed.
  bool lower(int64_t place, int64_t begin, int64_t end) {
    constexpr int64_t kLanes = Vec::size();
    constexpr int kAll = static_cast<int>((int64_t{1} << kLanes) - 1);
    const BoxArrays<real_t>& b = grid_.boxes;
    const Vec x1(b.x1[place]), y1(b.y1[place]), x2(b.x2[place]), y2(b.y2[place]), area(b.area[place]);
    const Vec zero(0), one(1), limit(round_down_to<real_t>(rule_.limit())), sigma(static_cast<real_t>(rule_.sigma));
    bool any = false;
    for (int64_t j = begin; j < end; j += kLanes) {
      const int64_t count = std::min(kLanes, end - j);
      const auto load = [&](const Scratch<real_t>& values) { return Vec::loadu(values.get() + j, count); };
      const Vec width = at::vec::minimum(x2, load(b.x2)) - at::vec::maximum(x1, load(b.x1));
      const Vec height = at::vec::minimum(y2, load(b.y2)) - at::vec::maximum(y1, load(b.y1));
      const Vec intersection = at::vec::maximum(zero, width) * at::vec::maximum(zero, height);
      const Vec ratio = intersection / (area + load(b.area) - intersection);
      const Vec score = load(scores_);
      const Vec falls = (ratio > limit) & (score > zero);
      if (Vec::blendv(zero, one, falls).zero_mask() == kAll) {
        continue;
      }
      const Vec weight = rule_.gaussian ? (ratio * ratio / sigma).neg().exp() : one - ratio;
      const Vec product = score * weight;
      const Vec lowered = Vec::blendv(zero, product, product == product);  // infinity times 0 is 0
      Vec::blendv(score, lowered, falls).store(scores_.get() + j, static_cast<int>(count));
      any = true;
    }
    return any;
  }

  // The best box of a block, of equal ones the first.
  struct Best {
    real_t score;
    int64_t first, block;

    bool operator<(const Best& other) const {
      return score < other.score || (score == other.score && first > other.first);
    }
  };

  Best best_of(int64_t block) {
    stale_[block] = false;
    const int64_t begin = block * kBlock, end = std::min(begin + kBlock, count_);
    Best best{*std::max_element(scores_.get() + begin, scores_.get() + end), count_, block};
    for (int64_t place = begin; place < end; ++place) {
      if (scores_[place] == best.score) {
        best.first = std::min(best.first, index_of_[place]);
      }
    }
    return best;
  }

  const SoftRule rule_;
  const int64_t count_;
  const BoxArrays<real_t> given_;
  const BoxGrid<BoxArrays<real_t>> grid_;
  std::vector<int64_t> index_of_;  // by place in the grid
  const Scratch<real_t> scores_;   // by place in the grid
  std::vector<char> stale_;        // of each block, whether a score has fallen since it was looked at
  std::vector<Best> heap_;         // of all blocks: the best was once so good
};

// Lowers the scores of boxes of one class, given in the order of their indices: those that have an area and whose score
// is greater than 0 or NaN.
template <typename real_t>
inline void run_soft_race(
    std::vector<int64_t> ids, const BoxArrays<real_t>& boxes, const SoftRule& rule, real_t* scores) {
  while (!ids.empty()) {
    const int64_t count = static_cast<int64_t>(ids.size());
    SoftRace<real_t> race(ids, boxes, scores, rule);
    for (int64_t i = 0; i < count; ++i) {  // NaN is best of all, and cannot be lowered
      if (std::isnan(scores[ids[i]])) {
        race.take(i);
      }
    }
    // Until so many have left that it pays to put the others into a new grid.
    std::vector<int64_t> left;
    do {
      const int64_t few = std::max<int64_t>(count / 64, 64);
      for (int64_t taken = 0, i = 0; taken < few && (i = race.best()) >= 0; ++taken) {
        scores[ids[i]] = race.take(i);
      }
      left.clear();
      for (int64_t i = 0; i < count; ++i) {
        const real_t score = race.score(i);
        if (score > 0 && !rule.drops(score)) {
          left.push_back(ids[i]);
        }
      }
    } while (static_cast<int64_t>(left.size()) > count / 2);
    for (int64_t i = 0; i < count; ++i) {
      if (race.score(i) >= 0) {
        scores[ids[i]] = race.score(i);
      }
    }
    ids = std::move(left);
  }
}

// indices[N] = the boxes whose score does not fall below the least one, best first, and then -1; out[N] = their scores,
// and then 0.  Either may be null.
template <typename box_t, typename score_t>
inline void soft_nms(const ScoredBoxes<box_t, score_t>& given, const SoftRule& rule, int64_t* indices, score_t* out) {
  constexpr bool kDouble = std::is_same_v<box_t, double> || std::is_same_v<score_t, double>;
  using real_t = std::conditional_t<kDouble, double, float>;
  const int64_t count = given.count;
  const BoxArrays<real_t> boxes(count);
  std::vector<real_t> scores(count);
  std::vector<uint64_t> keys;
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < count; ++i) {
    const box_t* box = given.boxes + i * given.row;
    boxes.read(i, [&](int64_t column) { return static_cast<real_t>(box[column * given.column]); });
    scores[i] = static_cast<real_t>(given.score(i));
    if (!(scores[i] <= 0) && !rule.drops(scores[i]) && boxes.is_proper(i)) {
      keys.push_back(given.class_of(i));
      ids.push_back(i);
    }
  }
  if (!std::isnan(rule.limit())) {
    constexpr int64_t kAlone = std::numeric_limits<int64_t>::max();  // a class is not shared among threads
    for_each_class(std::move(keys), std::move(ids), kAlone, [&](std::vector<int64_t> of_class, bool) {
      run_soft_race(std::move(of_class), boxes, rule, scores.data());
    });
  }

  keys.clear();
  ids.clear();
  for (int64_t i = 0; i < count; ++i) {
    if (!rule.drops(scores[i])) {
      keys.push_back(~ordered_bits(scores[i]));
      ids.push_back(i);
    }
  }
  sort_by_key(keys, ids);
  const int64_t kept = static_cast<int64_t>(ids.size());
  if (indices != nullptr) {
    std::fill(std::copy(ids.begin(), ids.end(), indices), indices + count, int64_t{-1});
  }
  for (int64_t i = 0; i < count && out != nullptr; ++i) {
    out[i] = static_cast<score_t>(i < kept ? scores[ids[i]] : real_t(0));
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_SOFT_NMS_H
