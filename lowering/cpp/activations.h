// Functions of each element between two products, as vectors.  Each propagates NaN.
#ifndef INDUCTOR_VISION_ACTIVATIONS_H
#define INDUCTOR_VISION_ACTIVATIONS_H

#include "base.h"

namespace inductor_vision {

struct Identity {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return x;
  }
};

struct Relu {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return at::vec::clamp_min(x, Vectorized<acc_t>(0));
  }
};

struct Relu6 {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return at::vec::clamp(x, Vectorized<acc_t>(0), Vectorized<acc_t>(6));
  }
};

struct LeakyRelu {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    const Vectorized<acc_t> zero(0);
    return Vectorized<acc_t>::blendv(x * Vectorized<acc_t>(acc_t(0.01)), x, x > zero);
  }
};

struct Hardsigmoid {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    const Vectorized<acc_t> zero(0), three(3), six(6);
    return at::vec::clamp(x + three, zero, six) / six;
  }
};

struct Hardswish {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return x * Hardsigmoid::apply(x);
  }
};

struct Silu {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    return x / (Vectorized<acc_t>(1) + x.neg().exp());
  }
};

struct Gelu {
  template <typename acc_t>
  static Vectorized<acc_t> apply(const Vectorized<acc_t>& x) {
    const Vectorized<acc_t> half(acc_t(0.5)), one(1), root(acc_t(0.70710678118654752440));
    return x * half * (one + (x * root).erf());
  }
};

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_ACTIVATIONS_H
