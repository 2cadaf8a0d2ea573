// GELU and its derivative for results that are stored in 16 bits or come from TF32 operands. These functions take 8
// to 16 instructions without a branch; the definitions of kernels/activation.h take 40 to 63. In a GEMM's epilogue
// every instruction costs time.
//
//   exact:  gelu(z) = max(z, 0) − t Φ(−t),   gelu′(z) = S for z < 0, 1 − S for z ≥ 0,   t = |z|, S = Φ(−t) − t φ(t)
//   tanh, quick:  the definition, with the GPU's own reciprocal and power of 2
//
// log₂ Φ(−t) is a polynomial, so that the tail keeps its digits, with as many terms as the result's digits need. The
// GPU's functions return 0 instead of a denormal, so below 2⁻¹¹⁸ a result has fewer digits or is 0.
#pragma once

#include <limits>

#include "kernels/activation.h"

namespace fastlane::bits16 {

#if defined(__CUDA_ARCH__)
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
inline float without_denormals(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? 0 : x; }
inline float exp2_approx(float x) { return without_denormals(std::exp2(x)); }
inline float reciprocal_approx(float x) { return without_denormals(1 / x); }
#endif

// At kTailEnd Φ(−t) and φ(t) have become 0, at kLogisticEnd σ(−2u(t)), at kQuickEnd σ(−1.702 t). Clamping there keeps
// ∞ from becoming ∞ · 0. The comparisons are written so that NaN stays.
constexpr float kTailEnd = 13.2f, kLogisticEnd = 12, kQuickEnd = 60;
FASTLANE_HOST_DEVICE inline float at_most(float z, float limit) { return z > limit ? limit : z; }
FASTLANE_HOST_DEVICE inline float at_least(float z, float limit) { return z < limit ? limit : z; }

FASTLANE_HOST_DEVICE inline float polynomial(float, float last) { return last; }
template <class... Rest>
FASTLANE_HOST_DEVICE float polynomial(float t, float first, Rest... rest) {
  return std::fma(polynomial(t, rest...), t, first);
}

// For each kind of result: log₂ Φ(−t) for 0 ≤ t ≤ kTailEnd, with minimax coefficients. The errors are the largest
// relative errors of gelu, and of gelu′ relative to Φ + |z| φ.
//
// Error: 5.2e-4. Half a unit of bfloat16 is at least 2e-3.
struct Bfloat16Tail {
  static FASTLANE_HOST_DEVICE float log2(float t) {
    return polynomial(t, -1.00072908f, -1.14341259f, -0.472251445f, -0.0447753929f, 0.00554739079f, -0.000429960288f,
                      1.85255522e-05f, -3.36470492e-07f);
  }
};
// Error: 2e-5 up to t = 6, where float16 ends. Half a unit of float16 is at least 2.4e-4.
struct Float16Tail {
  static FASTLANE_HOST_DEVICE float log2(float t) {
    return polynomial(t, -1.0000211f, -1.15092182f, -0.459242076f, -0.0532473847f, 0.00819277577f, -0.000858614338f,
                      5.34442624e-05f, -1.47141236e-06f);
  }
};
// Error: 6e-5 up to t = 6, 3e-4 up to 10, 6e-4 beyond. Half a unit of TF32 is at least 2.4e-4, and gelu(−t) enlarges
// a relative error of z about t²-fold.
struct Tf32Tail {
  static FASTLANE_HOST_DEVICE float log2(float t) {
    return polynomial(t, -1.00007367f, -1.15030038f, -0.460419029f, -0.0524671637f, 0.00798706058f, -0.000847749005f,
                      5.79579028e-05f, -2.26575753e-06f, 3.81983831e-08f);
  }
};

template <class Tail>
FASTLANE_HOST_DEVICE float gelu(float z) {
  const float t = at_most(std::fabs(z), kTailEnd);
  return std::fma(-t, exp2_approx(Tail::log2(t)), std::fmax(z, 0.0f));
}

template <class Tail>
FASTLANE_HOST_DEVICE float gelu_derivative(float z) {
  constexpr float kScale = static_cast<float>(-0.5 * gelu_constants::log2_e);
  constexpr float kLog2InvSqrt2Pi = -1.3257480647361593f;
  const float t = at_most(std::fabs(z), kTailEnd);
  const float density = exp2_approx(std::fma(kScale * t, t, kLog2InvSqrt2Pi));
  const float below = std::fma(-t, density, exp2_approx(Tail::log2(t)));
  return z < 0 ? below : 1 - below;
}

// −2u(z) log₂ e
FASTLANE_HOST_DEVICE inline float logistic_exponent(float z, float square) {
  constexpr double kLinear = -gelu_constants::two_sqrt_2_over_pi * gelu_constants::log2_e;
  constexpr double kCubic = kLinear * gelu_constants::tanh_cubic;
  return std::fma(square, static_cast<float>(kCubic), static_cast<float>(kLinear)) * z;
}

FASTLANE_HOST_DEVICE inline float gelu_tanh(float z) {
  const float c = at_least(z, -kLogisticEnd);
  return c * reciprocal_approx(exp2_approx(logistic_exponent(c, c * c)) + 1);
}

FASTLANE_HOST_DEVICE inline float gelu_tanh_derivative(float z) {
  constexpr double kLinear = gelu_constants::two_sqrt_2_over_pi, kCubic = 3 * kLinear * gelu_constants::tanh_cubic;
  const float c = at_most(at_least(z, -kLogisticEnd), kLogisticEnd), square = c * c;
  const float sigma = reciprocal_approx(exp2_approx(logistic_exponent(c, square)) + 1);
  const float slope = c * std::fma(square, static_cast<float>(kCubic), static_cast<float>(kLinear));
  return sigma * std::fma(slope, 1 - sigma, 1.0f);
}

FASTLANE_HOST_DEVICE inline float quick_sigma(float z) {
  constexpr float kExponent = static_cast<float>(-quick_gelu_constants::scale * gelu_constants::log2_e);
  return reciprocal_approx(exp2_approx(kExponent * z) + 1);
}
FASTLANE_HOST_DEVICE inline float quick_gelu(float z) {
  const float c = at_least(z, -kQuickEnd);
  return c * quick_sigma(c);
}
FASTLANE_HOST_DEVICE inline float quick_gelu_derivative(float z) {
  const float c = at_most(at_least(z, -kQuickEnd), kQuickEnd), sigma = quick_sigma(c);
  return sigma * std::fma(static_cast<float>(quick_gelu_constants::scale) * c, 1 - sigma, 1.0f);
}

}  // namespace fastlane::bits16
