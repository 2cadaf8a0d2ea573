// The device's formulas, the definitions in float and gelu16.h, compiled for the host, against long double.
#include "kernels/cuda/common/gelu16.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "check.h"

using namespace fastlane;
using Real = long double;
using Exact = Definition<Activation::gelu>;
using Tanh = Definition<Activation::gelu_tanh>;
using Quick = Definition<Activation::quick_gelu>;

namespace {

struct Largest {
  double error = 0;
  void add(double e) { error = std::isnan(e) ? INFINITY : std::max(error, e); }
};

Real cdf(Real z) { return std::erfc(-z * std::sqrt(Real{0.5})) / 2; }
Real density(Real z) { return std::exp(-z * z / 2) * Real{0.398942280401432677939946L}; }
Real sigma(Real v) { return v < 0 ? std::exp(v) / (1 + std::exp(v)) : 1 / (1 + std::exp(-v)); }
constexpr Real kQuickScale = 1.702L;
Real two_u(Real z) { return Real{1.59576912160573071176L} * (z + Real{0.044715L} * z * z * z); }

template <class R>
void test_errors(double step, double tolerance) {
  Largest exact, exact_slope, tanh_form, tanh_slope, quick, quick_slope;
  for (double at = -10; at <= 10; at += step) {
    const R z = static_cast<R>(at);
    const Real x = z;
    if (x == 0) continue;
    const Real value = x * cdf(x);
    exact.add(static_cast<double>(std::fabs((Exact::value(z) - value) / value)));
    // Relative to Φ + |x|φ, because the derivative has a zero.
    exact_slope.add(static_cast<double>(std::fabs(Exact::derivative(z) - (cdf(x) + x * density(x))) /
                                        (cdf(x) + std::fabs(x) * density(x))));
    const Real q = sigma(kQuickScale * x), tilt = kQuickScale * x * q * (1 - q);
    quick.add(static_cast<double>(std::fabs((Quick::value(z) - x * q) / (x * q))));
    quick_slope.add(static_cast<double>(std::fabs(Quick::derivative(z) - (q + tilt)) / (q + std::fabs(tilt))));
    const Real s = sigma(two_u(x)), two_u_slope = Real{1.59576912160573071176L} * (1 + 3 * Real{0.044715L} * x * x);
    if (std::fabs(x) < 8) {
      tanh_form.add(static_cast<double>(std::fabs((Tanh::value(z) - x * s) / (x * s))));
      tanh_slope.add(static_cast<double>(std::fabs(Tanh::derivative(z) - (s + x * s * (1 - s) * two_u_slope)) /
                                         (s + std::fabs(x) * s * (1 - s) * two_u_slope)));
    }
  }
  std::printf(
      "largest errors: gelu %.2g, its slope %.2g, tanh form %.2g, its slope %.2g, quick %.2g, its slope %.2g\n",
      exact.error, exact_slope.error, tanh_form.error, tanh_slope.error, quick.error, quick_slope.error);
  for (const Largest& largest : {exact, exact_slope, tanh_form, tanh_slope, quick, quick_slope})
    CHECK(largest.error <= tolerance);
}

// Half a unit in the last place of a value that is stored with `bits` bits behind the leading one. Denormals count
// too.
double half_unit(double value, int bits, int least_exponent) {
  const int exponent = value == 0 ? least_exponent : std::max(std::ilogb(value), least_exponent);
  return std::ldexp(1, exponent - bits - 1);
}

// The errors that gelu16.h adds to the rounding of its results, in halves of a unit in their last place. The
// derivatives are not stored but multiplied, so their errors are relative to Φ + |x|φ.
template <class Tail>
void test_errors_of_16_bits(const char* name, int bits, double tolerance) {
  // A little below 2⁻¹⁰⁰ the functions begin to lose digits.
  const int least_exponent = std::is_same_v<Tail, bits16::Float16Tail> ? -14 : -100;
  Largest exact, exact_slope, tanh_form, tanh_slope, quick, quick_slope;
  const auto test_at = [&](float z) {
    const Real x = z, s = sigma(two_u(x)),
               two_u_slope = two_u(1) / Real{1.044715L} * (1 + 3 * Real{0.044715L} * x * x);
    const auto add = [&](Largest& largest, float got, Real want, Real size) {
      largest.add(static_cast<double>(std::fabs(got - want)) /
                  half_unit(static_cast<double>(size), bits, least_exponent));
    };
    add(exact, bits16::gelu<Tail>(z), x * cdf(x), x * cdf(x));
    add(tanh_form, bits16::gelu_tanh(z), x * s, x * s);
    add(exact_slope, bits16::gelu_derivative<Tail>(z), cdf(x) + x * density(x), cdf(x) + std::fabs(x) * density(x));
    const Real other = x * s * (1 - s) * two_u_slope;
    add(tanh_slope, bits16::gelu_tanh_derivative(z), s + other, s + std::fabs(other));
    const Real q = sigma(kQuickScale * x), tilt = kQuickScale * x * q * (1 - q);
    add(quick, bits16::quick_gelu(z), x * q, x * q);
    add(quick_slope, bits16::quick_gelu_derivative(z), q + tilt, q + std::fabs(tilt));
  };
  for (double at = 0; at <= 15; at += 1e-4) test_at(static_cast<float>(at)), test_at(static_cast<float>(-at));
  for (float at = std::numeric_limits<float>::min(); at < 1e30f; at *= 1.01f) test_at(at), test_at(-at);
  std::printf("%s: largest errors in half units: gelu %.2g, its slope %.2g, tanh form %.2g, its slope %.2g, ", name,
              exact.error, exact_slope.error, tanh_form.error, tanh_slope.error);
  std::printf("quick %.2g, its slope %.2g\n", quick.error, quick_slope.error);
  for (const Largest& largest : {exact, exact_slope, tanh_form, tanh_slope, quick, quick_slope})
    CHECK(largest.error <= tolerance);
}

template <class R>
using Functions = std::initializer_list<R (*)(R)>;

template <class R>
void test_extremes(Functions<R> values, Functions<R> slopes, R error_at_0) {
  const R infinity = std::numeric_limits<R>::infinity(), nan = std::numeric_limits<R>::quiet_NaN();
  for (const auto value : values) {
    CHECK(value(infinity) == infinity);
    CHECK(value(-infinity) == 0);
    CHECK(value(R(0)) == 0 && !std::signbit(value(R(0))));
    CHECK(value(R(-0.0)) == 0 && (error_at_0 > 0 || std::signbit(value(R(-0.0)))));
    CHECK(std::isnan(value(nan)));
    CHECK(value(R(1000)) == R(1000));
  }
  for (const auto slope : slopes) {
    CHECK(slope(infinity) == 1);
    CHECK(slope(-infinity) == 0);
    CHECK(std::fabs(slope(R(0)) - R(0.5)) <= error_at_0);
    CHECK(std::isnan(slope(nan)));
  }
}

template <class Tail>
void test_extremes_of_16_bits(float error_at_0) {
  test_extremes<float>({bits16::gelu<Tail>, bits16::gelu_tanh, bits16::quick_gelu},
                       {bits16::gelu_derivative<Tail>, bits16::gelu_tanh_derivative, bits16::quick_gelu_derivative},
                       error_at_0);
}

}  // namespace

int main() {
  test_errors<float>(1e-4, 1e-5);
  test_errors<double>(1e-4, 2e-14);
  test_errors_of_16_bits<bits16::Bfloat16Tail>("bfloat16", 7, 0.28);
  test_errors_of_16_bits<bits16::Float16Tail>("float16", 10, 0.08);
  test_errors_of_16_bits<bits16::Tf32Tail>("TF32", 10, 2.2);
  test_extremes<float>({Exact::value, Tanh::value, Quick::value},
                       {Exact::derivative, Tanh::derivative, Quick::derivative}, 0);
  test_extremes<double>({Exact::value, Tanh::value, Quick::value},
                        {Exact::derivative, Tanh::derivative, Quick::derivative}, 0);
  test_extremes_of_16_bits<bits16::Bfloat16Tail>(1e-3f);
  test_extremes_of_16_bits<bits16::Float16Tail>(2e-5f);
  test_extremes_of_16_bits<bits16::Tf32Tail>(6e-5f);
  return failures != 0;
}
