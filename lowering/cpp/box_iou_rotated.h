// The overlaps of boxes that are turned about their centres, all of one list with all of another.
//
//   out[i, j] = IoU(boxes1[i], boxes2[j])
#ifndef INDUCTOR_VISION_BOX_IOU_ROTATED_H
#define INDUCTOR_VISION_BOX_IOU_ROTATED_H

#include "rotated.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// Rows of (x, y, width, height, angle).
template <typename box_t>
struct RotatedBoxes {
  const box_t* boxes;
  int64_t row, column;
  int64_t count;

  RotatedBoxArrays read() const {
    RotatedBoxArrays arrays(count);
    for (int64_t i = 0; i < count; ++i) {
      arrays.read(i, [&](int64_t c) { return static_cast<double>(boxes[i * row + c * column]); });
    }
    return arrays;
  }
};

// out[N, M], contiguous.
template <typename box_t>
inline void box_iou_rotated(const RotatedBoxes<box_t>& boxes1, const RotatedBoxes<box_t>& boxes2, box_t* out) {
  constexpr int64_t kColumns = 2048;  // their numbers stay in the second-level cache
  const int64_t rows = boxes1.count, columns = boxes2.count, parts = divide_up(columns, kColumns);
  const RotatedBoxArrays a = boxes1.read(), b = boxes2.read();
  prepare_output(out, rows * columns * static_cast<int64_t>(sizeof(box_t)));
  const int64_t few = std::max<int64_t>(kColumns / std::max<int64_t>(columns, 1), 1);
#pragma omp parallel for schedule(dynamic, few) if (rows * columns > kColumns)
  for (int64_t task = 0; task < parts * rows; ++task) {
    const int64_t i = task % rows, begin = task / rows * kColumns, end = std::min(begin + kColumns, columns);
    box_t* row = out + i * columns;
    std::fill(row + begin, row + end, box_t(0));
    visit_overlaps(
        a, i, b, begin, end, 0, [](int64_t) { return true; },
        [&](int64_t j, double iou) { row[j] = static_cast<box_t>(iou); });
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_BOX_IOU_ROTATED_H
