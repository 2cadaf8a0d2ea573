// The device's formulas, gelu.h in float, compiled for the host: against the same formulas in long double.
#include "kernels/gelu.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"

using namespace fastlane;
using Real = long double;

namespace {

struct Largest {
  double error = 0;
  void add(double e) { error = std::isnan(e) ? INFINITY : std::max(error, e); }
};

Real cdf(Real z) { return std::erfc(-z * std::sqrt(Real{0.5})) / 2; }
Real density(Real z) { return std::exp(-z * z / 2) * Real{0.398942280401432677939946L}; }
Real sigma(Real v) { return v < 0 ? std::exp(v) / (1 + std::exp(v)) : 1 / (1 + std::exp(-v)); }
Real two_u(Real z) { return Real{1.59576912160573071176L} * (z + Real{0.044715L} * z * z * z); }

template <class R>
void test_errors(double step, double tolerance) {
  Largest exact, exact_slope, tanh_form, tanh_slope;
  for (double at = -10; at <= 10; at += step) {
    const R z = static_cast<R>(at);
    const Real x = z;
    if (x == 0) continue;
    const Real value = x * cdf(x);
    exact.add(static_cast<double>(std::fabs((gelu(z) - value) / value)));
    // Against Φ + |x|φ: the derivative has a zero.
    exact_slope.add(static_cast<double>(std::fabs(gelu_derivative(z) - (cdf(x) + x * density(x))) /
                                        (cdf(x) + std::fabs(x) * density(x))));
    const Real s = sigma(two_u(x)), two_u_slope = Real{1.59576912160573071176L} * (1 + 3 * Real{0.044715L} * x * x);
    if (std::fabs(x) < 8) {
      tanh_form.add(static_cast<double>(std::fabs((gelu_tanh(z) - x * s) / (x * s))));
      tanh_slope.add(static_cast<double>(std::fabs(gelu_tanh_derivative(z) - (s + x * s * (1 - s) * two_u_slope)) /
                                         (s + std::fabs(x) * s * (1 - s) * two_u_slope)));
    }
  }
  std::printf("largest errors: gelu %.2g, its slope %.2g, tanh form %.2g, its slope %.2g\n", exact.error,
              exact_slope.error, tanh_form.error, tanh_slope.error);
  for (const Largest& largest : {exact, exact_slope, tanh_form, tanh_slope}) CHECK(largest.error <= tolerance);
}

template <class R>
void test_extremes() {
  const R infinity = std::numeric_limits<R>::infinity(), nan = std::numeric_limits<R>::quiet_NaN();
  for (const auto value : {gelu<R>, gelu_tanh<R>}) {
    CHECK(value(infinity) == infinity);
    CHECK(value(-infinity) == 0);
    CHECK(value(R(0)) == 0 && !std::signbit(value(R(0))));
    CHECK(std::signbit(value(R(-0.0))));
    CHECK(std::isnan(value(nan)));
    CHECK(value(R(1000)) == R(1000));
  }
  for (const auto slope : {gelu_derivative<R>, gelu_tanh_derivative<R>}) {
    CHECK(slope(infinity) == 1);
    CHECK(slope(-infinity) == 0);
    CHECK(slope(R(0)) == R(0.5));
    CHECK(std::isnan(slope(nan)));
  }
}

}  // namespace

int main() {
  test_errors<float>(1e-4, 1e-5);
  test_errors<double>(1e-4, 2e-14);
  test_extremes<float>();
  test_extremes<double>();
  return failures != 0;
}
