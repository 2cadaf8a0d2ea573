// GELU and its derivative: the definition, for host and device, in float or double. Faster forms:
// cpu/generic/activation-inl.h for vectors, cuda/common/gelu16.h for 16-bit results.
//
//   exact:  gelu(z) = z Φ(z),                 Φ(z) = ½ erfc(−z/√2)
//   tanh:   gelu(z) = ½ z (1 + tanh u) = z σ(2u),  u = √(2/π) (z + 0.044715 z³)
//
// Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415. erfc has no cancellation in the negative
// tail, where 1 + erf loses every digit. σ written with exp(−|2u|) has no cancellation either.
#pragma once

#include <cmath>

#include "kernels/problem.h"

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

// Beyond this |z|, Φ is 0 or 1 in double. Clamping z there keeps ±inf from becoming inf · 0.
constexpr double saturation = 40.0;

}  // namespace gelu_constants

template <class R>
FASTLANE_HOST_DEVICE inline R clamp_to_saturation(R z) {
  constexpr R limit = R(gelu_constants::saturation);
  return z < -limit ? -limit : (z > limit ? limit : z);
}

template <class R>
FASTLANE_HOST_DEVICE inline R normal_cdf(R z) {
  return R(0.5) * std::erfc(-z * R(gelu_constants::sqrt_half));
}

template <class R>
FASTLANE_HOST_DEVICE inline R gelu(R z) {
  const R from_below = z < -R(gelu_constants::saturation) ? -R(gelu_constants::saturation) : z;
  return from_below * normal_cdf(clamp_to_saturation(z));
}

template <class R>
FASTLANE_HOST_DEVICE inline R gelu_derivative(R z) {
  const R c = clamp_to_saturation(z);
  return normal_cdf(c) + c * R(gelu_constants::inv_sqrt_2pi) * std::exp(R(-0.5) * c * c);
}

// e = exp(−|2u|). σ(2u) is 1/(1 + e) for z ≥ 0 and e/(1 + e) for z < 0.
template <class R>
FASTLANE_HOST_DEVICE inline R tanh_gelu_exp(R z) {
  const R two_u = R(gelu_constants::two_sqrt_2_over_pi) * z * (R(1) + R(gelu_constants::tanh_cubic) * z * z);
  return std::exp(-std::fabs(two_u));
}

template <class R>
FASTLANE_HOST_DEVICE inline R gelu_tanh(R z) {
  const R from_below = z < -R(gelu_constants::saturation) ? -R(gelu_constants::saturation) : z;
  const R e = tanh_gelu_exp(clamp_to_saturation(z));
  return (z < 0 ? from_below * e : from_below) / (R(1) + e);
}

template <class R>
FASTLANE_HOST_DEVICE inline R gelu_tanh_derivative(R z) {
  const R c = clamp_to_saturation(z);
  const R e = tanh_gelu_exp(c);
  const R inverse = R(1) / (R(1) + e);
  const R slope = R(gelu_constants::two_sqrt_2_over_pi) * (R(1) + R(3 * gelu_constants::tanh_cubic) * c * c);
  return (z < 0 ? e * inverse : inverse) + c * slope * e * inverse * inverse;
}

}  // namespace fastlane
