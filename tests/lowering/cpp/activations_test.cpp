// Runs the functions between two products and their gradients over numbers of all sizes, against double.
//
// Prints the largest errors, relative to one and the value.
#include "separable_convolutions.h"

#include <cinttypes>
#include <cstdio>
#include <cstdlib>

namespace {

using namespace harness;

struct Errors {
  int64_t numbers = 0;
  double float_error = 0, double_error = 0;
};

// Also where both are the same infinity, or NaN.
double difference(double got, double expected) {
  const bool same = got == expected || (got != got && expected != expected);
  return same ? 0 : std::abs(got - expected) / (1 + std::abs(expected));
}

template <typename Activation, typename acc_t>
void check(const char* type, const std::vector<double>& numbers, double allowed, double& error) {
  using Vec = at::vec::Vectorized<acc_t>;
  const Function function = function_of<Activation>();
  const auto activation = make<Activation>();
  const auto compare = [&](const char* what, acc_t x, double got, double expected) {
    const double of_this = difference(got, expected);
    if (!(of_this <= allowed)) {
      std::printf("%s %s, %s of %.17g: %.17g, not %.17g\n", function.name, type, what, double(x), got, expected);
      std::abort();
    }
    error = std::max(error, of_this);
  };
  for (double number : numbers) {
    acc_t in[Vec::size()], grad[Vec::size()], value[Vec::size()], out[Vec::size()], gradient[Vec::size()];
    for (int64_t i = 0; i < Vec::size(); ++i) {
      in[i] = static_cast<acc_t>(number);
      grad[i] = acc_t(i) - acc_t(1.5);
    }
    activation.apply(Vec::loadu(in)).store(value);
    const auto both = activation.both(Vec::loadu(in), Vec::loadu(grad));
    both.value.store(out);
    both.gradient.store(gradient);
    for (int64_t i = 0; i < Vec::size(); ++i) {
      compare("value", in[i], value[i], function.of(in[i]));
      compare("value beside the gradient", in[i], out[i], function.of(in[i]));
      if (!std::isinf(in[i])) {
        compare("gradient", in[i], gradient[i], function.gradient(in[i], grad[i]));
      }
    }
  }
}

template <typename... Activations>
void check_all(const std::vector<double>& numbers, Errors& errors) {
  (check<Activations, float>("float", numbers, 2e-6, errors.float_error), ...);
  (check<Activations, double>("double", numbers, 1e-13, errors.double_error), ...);
  errors.numbers += static_cast<int64_t>(numbers.size());
}

}  // namespace

int main() {
  std::vector<double> numbers{kNaN, kInf, -kInf, 1e30, -1e30, 1e-30, -1e-30, 0.0, -0.0, 88.5, -88.5, 700, -700};
  for (int i = -200; i <= 200; ++i) {  // kinks are among them
    numbers.push_back(i / 8.0);
  }
  Random random(1);
  for (int i = 0; i < 1000; ++i) {
    numbers.push_back(random.uniform(-30, 30));
  }
  Errors errors;
  check_all<
      Identity, Relu, Relu6, LeakyRelu, Prelu, Hardtanh, Elu, Selu, Celu, Softplus, Softsign, Hardsigmoid, Hardswish,
      Sigmoid, Tanh, Silu, Mish, Gelu, GeluTanh>(numbers, errors);
  std::printf(
      "lanes=%d numbers=%" PRId64 " float_error=%g double_error=%g\n",
      static_cast<int>(at::vec::Vectorized<float>::size()), errors.numbers, errors.float_error, errors.double_error);
  return 0;
}
