// Non-maximum suppression of boxes that are turned about their centres: nms.h with another overlap.
#ifndef INDUCTOR_VISION_NMS_ROTATED_H
#define INDUCTOR_VISION_NMS_ROTATED_H

#include "nms.h"
#include "rotated.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

inline double overlap(const RotatedBoxArrays& a, int64_t i, const RotatedBoxArrays& b, int64_t j) {
  double result = 0;
  visit_overlaps(a, i, b, j, j + 1, 0, [](int64_t) { return true; }, [&](int64_t, double iou) { result = iou; });
  return result;
}

inline void suppress(
    const RotatedBoxArrays& a, int64_t i, const RotatedBoxArrays& b, int64_t begin, int64_t end, double threshold,
    double* suppressed) {
  visit_overlaps(
      a, i, b, begin, end, threshold, [&](int64_t j) { return !is_set(suppressed[j]); },
      [&](int64_t j, double iou) {
        if (iou > threshold) {
          std::memset(suppressed + j, 0xff, sizeof(double));
        }
      });
}

template <typename box_t, typename score_t>
inline void nms_rotated(const ScoredBoxes<box_t, score_t>& given, double threshold, int64_t* out) {
  suppress_greedily<RotatedBoxArrays>(given, threshold, out);
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_NMS_ROTATED_H
