// Boxes that are turned about their centres, and how much two of them overlap.
//
//   x, y                  the centre
//   u = (cosine, -sine)   the direction of a box's width; y points down, and angles are counter-clockwise to the eye
//   v = (sine, cosine)    that of its height
//
// In the frame of a box `a` of half sides w and h, the intersection with a box `b` is an integral along b's edges:
//
//   |a and b| = | sum over the edges of b of the integral of clamp(y, -h, h) dx, x clamped to [-w, w] |
//
// It has no cases, is continuous in all numbers, and off by roundings of |a| at most.  All is computed in double.
#ifndef INDUCTOR_VISION_ROTATED_H
#define INDUCTOR_VISION_ROTATED_H

#include "boxes.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

struct RotatedBoxArrays {
  using value_t = double;
  Scratch<double> x, y, half_width, half_height, cosine, sine, area;
  Scratch<double> extent_x, extent_y;  // half the sides of the upright box around; infinite and negative if not proper

  explicit RotatedBoxArrays(int64_t count)
      : x(count),
        y(count),
        half_width(count),
        half_height(count),
        cosine(count),
        sine(count),
        area(count),
        extent_x(count),
        extent_y(count) {
  }
  // at(0), ..., at(4): x, y, width, height, angle in degrees.
  template <typename At>
  void read(int64_t i, const At& at) const {
    x[i] = at(0);
    y[i] = at(1);
    half_width[i] = std::abs(at(2)) / 2;
    half_height[i] = std::abs(at(3)) / 2;
    area[i] = at(2) * at(3);
    set_angle(i, at(4));
    extent_x[i] = half_width[i] * std::abs(cosine[i]) + half_height[i] * std::abs(sine[i]);
    extent_y[i] = half_width[i] * std::abs(sine[i]) + half_height[i] * std::abs(cosine[i]);
    // Sides of opposite signs, or none; a number that is not finite, or too large to compute with.
    if (!(area[i] > 0) || !std::isfinite(x[i] + y[i]) || !std::isfinite(area[i] + extent_x[i] + extent_y[i])) {
      extent_x[i] = extent_y[i] = -std::numeric_limits<double>::infinity();
    }
  }
  void set(int64_t i, const RotatedBoxArrays& other, int64_t j) const {
    x[i] = other.x[j];
    y[i] = other.y[j];
    half_width[i] = other.half_width[j];
    half_height[i] = other.half_height[j];
    cosine[i] = other.cosine[j];
    sine[i] = other.sine[j];
    area[i] = other.area[j];
    extent_x[i] = other.extent_x[j];
    extent_y[i] = other.extent_y[j];
  }
  // Whether the box can overlap any.
  bool is_proper(int64_t i) const {
    return extent_x[i] >= 0;
  }
  double centre(int axis, int64_t i) const {
    return axis == 0 ? x[i] : y[i];
  }
  double length(int axis, int64_t i) const {
    return 2 * (axis == 0 ? extent_x[i] : extent_y[i]);
  }

  // As for upright boxes, but of what overlaps by a threshold only so much of the length along an axis need be shared:
  // a part f of that, measured from its end, holds at most f of the area if f is up to 1/2, otherwise at most
  // 1 - 2 (1 - f)^2, as in a square on its corner.
  static double reach(double threshold) {
    const double shared = threshold <= 0.5 ? threshold : 1 - std::sqrt(std::max(1 - threshold, 0.0) / 2);
    return BoxArrays<double>::reach(shared);
  }

 private:
  // Exactly 0 and 1 for right angles.
  void set_angle(int64_t i, double degrees) const {
    constexpr double kPerDegree = 3.14159265358979323846 / 180;
    const double turn = std::fmod(degrees, 360.0), quarters = std::nearbyint(turn / 90);
    const double rest = (turn - 90 * quarters) * kPerDegree, c = std::cos(rest), s = std::sin(rest);
    const bool odd = std::abs(quarters) == 1 || std::abs(quarters) == 3;
    const bool half = std::abs(quarters) == 2, negative = quarters == 1 || quarters == -3;
    cosine[i] = odd ? (negative ? -s : s) : (half ? -c : c);
    sine[i] = odd ? (negative ? c : -c) : (half ? -s : s);
  }
};

// Some boxes beside a fixed one, in the frame of that.
class RotatedOverlap {
 public:
  using Vec = Vectorized<double>;

  RotatedOverlap(const RotatedBoxArrays& a, int64_t i)
      : x_(a.x[i]),
        y_(a.y[i]),
        w_(a.half_width[i]),
        h_(a.half_height[i]),
        cosine_(a.cosine[i]),
        sine_(a.sine[i]),
        area_(a.area[i]),
        extent_x_(a.extent_x[i]),
        extent_y_(a.extent_y[i]) {
  }

  // Whether boxes can overlap by more than the limit, as judged by the upright boxes around them; all bits, or none.
  Vec may_exceed(
      const Vec& x, const Vec& y, const Vec& extent_x, const Vec& extent_y, const Vec& area, const Vec& limit) const {
    const Vec zero(0), slack(1 + 1e-9), little(1e-300);  // for areas that are denormal
    const Vec width = extent_x_ + extent_x - (x - x_).abs(), height = extent_y_ + extent_y - (y - y_).abs();
    const Vec most = lesser(width * height, lesser(area, area_)) * slack + little;
    return (width > zero) & (height > zero) & (most >= limit * (area_ + area - most));
  }

  // Intersection over union; 0 where it cannot be computed.
  Vec iou(const Vec& x, const Vec& y, const Vec& w, const Vec& h, const Vec& cosine, const Vec& sine, const Vec& area)
      const {
    const Vec dx = x - x_, dy = y - y_, zero(0);
    const Vec px = dx * cosine_ - dy * sine_, py = dx * sine_ + dy * cosine_;
    const Vec c = cosine * cosine_ + sine * sine_, s = sine * cosine_ - cosine * sine_;
    const Vec ux = w * c, uy = zero - w * s, vx = h * s, vy = h * c;  // half of the sides
    const Vec u_slope = slope(ux, uy), v_slope = slope(vx, vy);
    const Vec x0 = px - ux - vx, y0 = py - uy - vy;  // the corners, in order
    const Vec x1 = px + ux - vx;
    const Vec x2 = px + ux + vx, y2 = py + uy + vy;
    const Vec x3 = px - ux + vx;
    const Vec bottom = below(x0, y0, x1, u_slope) + below(x2, y2, x3, u_slope);
    const Vec side = below(x2, y2, x1, v_slope) + below(x0, y0, x3, v_slope);
    const Vec intersection = lesser((bottom - side).abs(), lesser(area, area_));
    const Vec ratio = intersection / (area_ + area - intersection);
    // What is left of an integral that should be 0 is not: boxes are apart if they are along a side of either.
    const Vec qx = dx * cosine - dy * sine, qy = dx * sine + dy * cosine;
    const Vec meet = (px.abs() < w_ + ux.abs() + vx.abs()) & (py.abs() < h_ + uy.abs() + vy.abs()) &
                     (qx.abs() < w + w_ * c.abs() + h_ * s.abs()) & (qy.abs() < h + w_ * s.abs() + h_ * c.abs());
    return Vec::blendv(zero, ratio, (ratio > zero) & meet);
  }

 private:
  // One instruction; at::vec::minimum has several, for NaN.
  static Vec lesser(const Vec& a, const Vec& b) {
    return at::vec::clamp_max(a, b);
  }
  static Vec greater(const Vec& a, const Vec& b) {
    return at::vec::clamp_min(a, b);
  }
  // Of an upright edge it does not matter, but must not be infinite.
  static Vec slope(const Vec& x, const Vec& y) {
    return at::vec::clamp(y / x, Vec(-1e200), Vec(1e200));
  }

  // The integral of clamp(y) along a line from (x, y) to x = `to`, within the fixed box's width.
  Vec below(const Vec& x, const Vec& y, const Vec& to, const Vec& slope) const {
    const Vec zero(0), half(0.5), low = zero - h_;
    const Vec begin = at::vec::clamp(x, zero - w_, w_), end = at::vec::clamp(to, zero - w_, w_);
    const Vec ya = y + (begin - x) * slope, yb = y + (end - x) * slope;
    const Vec ma = at::vec::clamp(ya, low, h_), mb = at::vec::clamp(yb, low, h_);
    // The integral over y; above and below the box as differences that are exact where y hardly changes.
    const Vec above = greater(yb, h_) - greater(ya, h_), under = lesser(yb, low) - lesser(ya, low);
    const Vec sum = (mb - ma) * (mb + ma) * half + h_ * (above - under), rise = yb - ya;
    const Vec mean = Vec::blendv(sum / rise, ma, rise == zero);
    return (end - begin) * mean;
  }

  const Vec x_, y_, w_, h_, cosine_, sine_, area_, extent_x_, extent_y_;
};

// found(j, IoU) for the boxes j of `b`, begin <= j < end, that wanted(j), and of which box i of `a` may overlap more
// than the limit, which is at least 0.
template <typename Wanted, typename Found>
inline void visit_overlaps(
    const RotatedBoxArrays& a, int64_t i, const RotatedBoxArrays& b, int64_t begin, int64_t end, double limit,
    const Wanted& wanted, const Found& found) {
  using Vec = Vectorized<double>;
  constexpr int64_t kLanes = Vec::size();
  const RotatedOverlap overlap(a, i);
  const Vec least(limit), zero(0), one(1);
  std::array<int64_t, 2 * kLanes> waiting;
  int64_t count = 0;

  const auto compute = [&](int64_t first, int64_t lanes) {
    const auto gather = [&](const Scratch<double>& values) {
      std::array<double, kLanes> lane;
      for (int64_t l = 0; l < kLanes; ++l) {
        lane[l] = values[waiting[first + (l < lanes ? l : 0)]];
      }
      return Vec::loadu(lane.data());
    };
    std::array<double, kLanes> ious;
    overlap
        .iou(
            gather(b.x), gather(b.y), gather(b.half_width), gather(b.half_height), gather(b.cosine), gather(b.sine),
            gather(b.area))
        .store(ious.data());
    for (int64_t l = 0; l < lanes; ++l) {
      found(waiting[first + l], ious[l]);
    }
  };
  for (int64_t j = begin; j < end; j += kLanes) {
    const int64_t lanes = std::min(kLanes, end - j);
    const auto load = [&](const Scratch<double>& values) { return Vec::loadu(values.get() + j, lanes); };
    const Vec may = overlap.may_exceed(load(b.x), load(b.y), load(b.extent_x), load(b.extent_y), load(b.area), least);
    unsigned bits = ~static_cast<unsigned>(Vec::blendv(zero, one, may).zero_mask()) & ((1u << lanes) - 1);
    for (int64_t next = j; bits != 0; bits >>= 1, ++next) {
      if ((bits & 1) != 0 && wanted(next)) {
        waiting[count++] = next;
      }
    }
    if (count >= kLanes) {
      count -= kLanes;
      compute(count, kLanes);
    }
  }
  if (count > 0) {
    compute(0, count);
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_ROTATED_H
