// Functions of each element between two products, as vectors.  Each propagates NaN.
//
//   apply(x)       the function
//   both(x, grad)  the function, and the gradient of x from that of the result: aten's, at kinks and for NaN too
#ifndef INDUCTOR_VISION_ACTIVATIONS_H
#define INDUCTOR_VISION_ACTIVATIONS_H

#include "base.h"

namespace inductor_vision {

template <typename acc_t>
struct ValueAndGradient {
  Vectorized<acc_t> value, gradient;
};

struct Identity {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return x;
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    return {x, grad};
  }
};

struct Relu {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return at::vec::clamp_min(x, Vectorized<acc_t>(0));
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> zero(0);
    return {apply(x), Vectorized<acc_t>::blendv(grad, zero, x <= zero)};
  }
};

struct Relu6 {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return at::vec::clamp(x, Vectorized<acc_t>(0), Vectorized<acc_t>(6));
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> zero(0), six(6);
    return {apply(x), Vectorized<acc_t>::blendv(grad, zero, (x <= zero) | (x >= six))};
  }
};

struct LeakyRelu {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    const Vectorized<acc_t> zero(0);
    return Vectorized<acc_t>::blendv(x * Vectorized<acc_t>(acc_t(0.01)), x, x > zero);
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    return {apply(x), Vectorized<acc_t>::blendv(grad * Vectorized<acc_t>(acc_t(0.01)), grad, x > Vectorized<acc_t>(0))};
  }
};

struct Hardsigmoid {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    const Vectorized<acc_t> zero(0), three(3), six(6);
    return at::vec::clamp(x + three, zero, six) / six;
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> zero(0), three(3), six(6);
    return {apply(x), Vectorized<acc_t>::blendv(zero, grad / six, (x > three.neg()) & (x < three))};
  }
};

struct Hardswish {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return x * Hardsigmoid::apply(x);
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> zero(0), half(acc_t(0.5)), three(3);
    const Vectorized<acc_t> inside = Vectorized<acc_t>::blendv(grad, grad * (x / three + half), x < three);
    return {apply(x), Vectorized<acc_t>::blendv(inside, zero, x <= three.neg())};
  }
};

struct Silu {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return x / (Vectorized<acc_t>(1) + x.neg().exp());
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> one(1), sigmoid = one / (one + x.neg().exp());
    return {x * sigmoid, grad * sigmoid * (one + x * (one - sigmoid))};
  }
};

struct Gelu {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    const Vectorized<acc_t> half(acc_t(0.5)), one(1), root(acc_t(0.70710678118654752440));
    return x * half * (one + (x * root).erf());
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> half(acc_t(0.5)), one(1), root(acc_t(0.70710678118654752440));
    const Vectorized<acc_t> scale(acc_t(0.39894228040143267794));  // 1 / sqrt(2 pi)
    const Vectorized<acc_t> below = half * (one + (x * root).erf()), density = scale * (x * x * half).neg().exp();
    return {x * below, grad * (below + x * density)};
  }
};

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_ACTIVATIONS_H
