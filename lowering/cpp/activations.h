// Functions of each element between two products, as vectors.  Each propagates NaN.
//
//   apply(x)       the function
//   both(x, grad)  the function, and the gradient of x from that of the result: aten's, at kinks and for NaN too
//
// Parameters are types with a constexpr function for each parameter, so that these are constants in the code.  Only a
// slope that is a tensor is known when the kernel runs alone; the others have no state.
#ifndef INDUCTOR_VISION_ACTIVATIONS_H
#define INDUCTOR_VISION_ACTIVATIONS_H

#include "base.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

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

// Parameters: negative_slope.
template <typename Parameters>
struct LeakyRelu {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return scaled(x, x);
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    return {apply(x), scaled(grad, x)};
  }

 private:
  template <typename acc_t>
  static Vectorized<acc_t> scaled(const Vectorized<acc_t>& value, const Vectorized<acc_t>& x) {
    const Vectorized<acc_t> zero(0), slope(static_cast<acc_t>(Parameters::negative_slope()));
    return Vectorized<acc_t>::blendv(value * slope, value, x > zero);
  }
};

// The slope is a parameter of a model, read from memory once a call.
struct Prelu {
  double slope;

  template <typename acc_t>
  Vectorized<acc_t> apply(const Vectorized<acc_t>& x) const {
    return scaled(x, x);
  }
  template <typename acc_t>
  ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) const {
    return {apply(x), scaled(grad, x)};
  }
  // What an element adds to the gradient of the slope.
  template <typename acc_t>
  static Vectorized<acc_t> of_slope(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> zero(0);
    return Vectorized<acc_t>::blendv(grad * x, zero, x > zero);
  }

 private:
  template <typename acc_t>
  Vectorized<acc_t> scaled(const Vectorized<acc_t>& value, const Vectorized<acc_t>& x) const {
    const Vectorized<acc_t> zero(0), factor(static_cast<acc_t>(slope));
    return Vectorized<acc_t>::blendv(value * factor, value, x > zero);
  }
};

// Parameters: min_val, max_val.
template <typename Parameters>
struct Hardtanh {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return at::vec::clamp(x, low<acc_t>(), high<acc_t>());
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> zero(0);
    return {apply(x), Vectorized<acc_t>::blendv(grad, zero, (x <= low<acc_t>()) | (x >= high<acc_t>()))};
  }

 private:
  template <typename acc_t>
  static Vectorized<acc_t> low() {
    return Vectorized<acc_t>(static_cast<acc_t>(Parameters::min_val()));
  }
  template <typename acc_t>
  static Vectorized<acc_t> high() {
    return Vectorized<acc_t>(static_cast<acc_t>(Parameters::max_val()));
  }
};

// Parameters: alpha.
template <typename Parameters>
struct Elu {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    const Vectorized<acc_t> zero(0), alpha(static_cast<acc_t>(Parameters::alpha()));
    return Vectorized<acc_t>::blendv(x, alpha * x.expm1(), x <= zero);
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> zero(0), alpha(static_cast<acc_t>(Parameters::alpha()));
    return {apply(x), Vectorized<acc_t>::blendv(grad, grad * alpha * x.exp(), x <= zero)};
  }
};

struct Selu {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return Vectorized<acc_t>(scale<acc_t>()) * Unscaled::apply(x);
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    return {apply(x), Unscaled::both(x, grad * Vectorized<acc_t>(scale<acc_t>())).gradient};
  }

 private:
  struct Parameters {
    static constexpr double alpha() {
      return 1.6732632423543772848170429916717;
    }
  };
  using Unscaled = Elu<Parameters>;
  template <typename acc_t>
  static constexpr acc_t scale() {
    return static_cast<acc_t>(1.0507009873554804934193349852946);
  }
};

// Parameters: alpha.  Elu of x / alpha with a slope of 1 on both sides of zero.
template <typename Parameters>
struct Celu {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    const Vectorized<acc_t> alpha(static_cast<acc_t>(Parameters::alpha()));
    return Vectorized<acc_t>::blendv(x, alpha * (x / alpha).expm1(), x <= Vectorized<acc_t>(0));
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> alpha(static_cast<acc_t>(Parameters::alpha()));
    return {apply(x), Vectorized<acc_t>::blendv(grad, grad * (x / alpha).exp(), x <= Vectorized<acc_t>(0))};
  }
};

// Parameters: beta, threshold.  log(1 + exp(beta * x)) / beta, and x itself where beta * x is above the threshold.
template <typename Parameters>
struct Softplus {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    const Vectorized<acc_t> beta(static_cast<acc_t>(Parameters::beta())), scaled = x * beta;
    return Vectorized<acc_t>::blendv(scaled.exp().log1p() / beta, x, scaled > threshold<acc_t>());
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> beta(static_cast<acc_t>(Parameters::beta())), scaled = x * beta;
    const Vectorized<acc_t> e = scaled.exp(), below = grad * e / (e + Vectorized<acc_t>(1));
    return {apply(x), Vectorized<acc_t>::blendv(below, grad, scaled > threshold<acc_t>())};
  }

 private:
  template <typename acc_t>
  static Vectorized<acc_t> threshold() {
    return Vectorized<acc_t>(static_cast<acc_t>(Parameters::threshold()));
  }
};

struct Softsign {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return x / (Vectorized<acc_t>(1) + x.abs());
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> divisor = Vectorized<acc_t>(1) + x.abs();
    return {apply(x), grad / (divisor * divisor)};
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

struct Sigmoid {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    const Vectorized<acc_t> one(1);
    return one / (one + x.neg().exp());
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> value = apply(x);
    return {value, grad * (Vectorized<acc_t>(1) - value) * value};
  }
};

struct Tanh {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return x.tanh();
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> value = apply(x);
    return {value, grad * (Vectorized<acc_t>(1) - value * value)};
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

// x * tanh(log(1 + e)) with e = exp(x), where tanh(log(1 + e)) = n / (n + 2) with n = e * (e + 2).  From x = 20 on this
// is 1, to the last bit, and its derivative nothing beside it.
struct Mish {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    const Vectorized<acc_t> two(2), e = bounded(x).exp(), n = e * (e + two);
    return x * (n / (n + two));
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> one(1), two(2), four(4), e = bounded(x).exp(), n = e * (e + two);
    const Vectorized<acc_t> factor = n / (n + two), slope = four * e * (one + e) / ((n + two) * (n + two));
    return {x * factor, grad * (factor + bounded(x) * slope)};
  }

 private:
  template <typename acc_t>
  static Vectorized<acc_t> bounded(const Vectorized<acc_t>& x) {
    return at::vec::clamp_max(x, Vectorized<acc_t>(20));
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

// x * (1 + tanh(y)) / 2 with y = sqrt(2 / pi) * (x + 0.044715 * x^3), where (1 + tanh(y)) / 2 is the sigmoid of 2 * y.
// From |x| = 30 on this is 0 or 1 to the last bit, and its derivative 0, which infinite powers of x would make NaN.
struct GeluTanh {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return x * below(bounded(x));
  }
  template <typename acc_t>
  static ValueAndGradient<acc_t> both(const Vectorized<acc_t>& x, const Vectorized<acc_t>& grad) {
    const Vectorized<acc_t> one(1), twice(kTwice<acc_t>), triple(acc_t(3) * kCube<acc_t>);
    const Vectorized<acc_t> b = bounded(x), part = below(b), slope = twice * (one + triple * b * b);
    return {x * part, grad * (part + b * part * (one - part) * slope)};
  }

 private:
  template <typename acc_t>
  static constexpr acc_t kTwice = acc_t(1.5957691216057307117);  // 2 * sqrt(2 / pi)
  template <typename acc_t>
  static constexpr acc_t kCube = acc_t(0.044715);
  template <typename acc_t>
  static Vectorized<acc_t> bounded(const Vectorized<acc_t>& x) {
    return at::vec::clamp(x, Vectorized<acc_t>(-30), Vectorized<acc_t>(30));
  }
  template <typename acc_t>
  static Vectorized<acc_t> below(const Vectorized<acc_t>& x) {
    const Vectorized<acc_t> one(1), twice(kTwice<acc_t>), cube(kCube<acc_t>);
    return one / (one + (twice * x * (one + cube * x * x)).neg().exp());
  }
};

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_ACTIVATIONS_H
