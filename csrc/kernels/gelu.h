// GELU and its derivative: the one definition, for host and device, right to the last bits of double.
//
//   exact:  gelu(z) = z Φ(z),                 Φ(z) = ½ erfc(−z/√2)
//   tanh:   gelu(z) = ½ z (1 + tanh u) = z σ(2u),  u = √(2/π) (z + 0.044715 z³)
//
// Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415. erfc has no cancellation in the
// negative tail, where 1 + erf loses every digit; σ written with exp(−|2u|) has none either.
#pragma once

#include <cmath>

#include "problem.h"

#if defined(__CUDACC__)
#define FASTLANE_HOST_DEVICE __host__ __device__
#else
#define FASTLANE_HOST_DEVICE
#endif

namespace fastlane {
namespace gelu_constants {

constexpr double log2_e = 1.44269504088896340736;
constexpr double sqrt_half = 0.70710678118654752440;
constexpr double inv_sqrt_2pi = 0.39894228040143267794;
constexpr double tanh_cubic = 0.044715;
constexpr double two_sqrt_2_over_pi = 1.59576912160573071176;  // 2 √(2/π)

// Beyond it Φ is 0 or 1 in double; clamping there keeps ±inf from becoming inf · 0.
constexpr double saturation = 40.0;

}  // namespace gelu_constants

FASTLANE_HOST_DEVICE inline double clamp_to_saturation(double z) {
  const double limit = gelu_constants::saturation;
  return z < -limit ? -limit : (z > limit ? limit : z);
}

FASTLANE_HOST_DEVICE inline double normal_cdf(double z) { return 0.5 * std::erfc(-z * gelu_constants::sqrt_half); }

FASTLANE_HOST_DEVICE inline double gelu(double z) {
  const double from_below = z < -gelu_constants::saturation ? -gelu_constants::saturation : z;
  return from_below * normal_cdf(clamp_to_saturation(z));
}

FASTLANE_HOST_DEVICE inline double gelu_derivative(double z) {
  const double c = clamp_to_saturation(z);
  return normal_cdf(c) + c * gelu_constants::inv_sqrt_2pi * std::exp(-0.5 * c * c);
}

// exp(−|2u|): σ(2u) is 1/(1 + e) for z ≥ 0 and e/(1 + e) below.
FASTLANE_HOST_DEVICE inline double tanh_gelu_exp(double z) {
  const double two_u = gelu_constants::two_sqrt_2_over_pi * z * (1.0 + gelu_constants::tanh_cubic * z * z);
  return std::exp(-std::fabs(two_u));
}

FASTLANE_HOST_DEVICE inline double gelu_tanh(double z) {
  const double from_below = z < -gelu_constants::saturation ? -gelu_constants::saturation : z;
  const double e = tanh_gelu_exp(clamp_to_saturation(z));
  return (z < 0 ? from_below * e : from_below) / (1.0 + e);
}

FASTLANE_HOST_DEVICE inline double gelu_tanh_derivative(double z) {
  const double c = clamp_to_saturation(z);
  const double e = tanh_gelu_exp(c);
  const double inverse = 1.0 / (1.0 + e);
  const double slope = gelu_constants::two_sqrt_2_over_pi * (1.0 + 3.0 * gelu_constants::tanh_cubic * c * c);
  return (z < 0 ? e * inverse : inverse) + c * slope * e * inverse * inverse;
}

}  // namespace fastlane
