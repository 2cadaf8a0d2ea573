// GELU and its derivative where the result is stored in 16 bits, or is of TF32 operands: 9 to 17 instructions
// without a branch, where gelu.h's take 40 to 63. An epilogue costs a GEMM's time by its instructions.
//
//   exact:  gelu(z) = max(z, 0) − t Φ(−t),   gelu′(z) = S for z < 0, 1 − S for z ≥ 0,   t = |z|, S = Φ(−t) − t φ(t)
//   tanh:   gelu.h's, with the GPU's own reciprocal and power of 2
//
// log₂ Φ(−t) is a polynomial, so that the tail keeps its digits. Largest relative errors of gelu and, against
// Φ + |z| φ, of gelu′: 1e-5 up to |z| = 6, 8e-5 up to 10, 7e-4 beyond; half a unit of float16, which ends at 5.9, is
// 2.4e-4, and of bfloat16 2e-3. A gelu′ below 2⁻¹¹⁸ may be 0.
#pragma once

#include <limits>

#include "../gelu.h"

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

// The GPU's functions give 0 for a denormal, which bfloat16 stores. So gelu's Φ and σ are computed 2²⁴ times too
// large; the product that puts them right may be one.
constexpr float kShift = 24, kUnshift = 0x1p-24f;

// Where Φ(−t), and σ(−2u(t)), are 0 in bfloat16. Clamping there keeps ∞ from becoming ∞ · 0; written so that NaN
// stays.
constexpr float kTailEnd = 14.5f, kLogisticEnd = 12;
FASTLANE_HOST_DEVICE inline float at_most(float z, float limit) { return z > limit ? limit : z; }
FASTLANE_HOST_DEVICE inline float at_least(float z, float limit) { return z < limit ? limit : z; }

// shift + log₂ Φ(−t) for 0 ≤ t ≤ kTailEnd: minimax, tighter by ten below 6 and by ten more below 10.
FASTLANE_HOST_DEVICE inline float log2_normal_tail(float t, float shift) {
  constexpr float kCoefficients[] = {-0.999990523f,  -1.15136397f,    -0.45804289f,   -0.0545447655f,
                                     0.00890007243f, -0.00107249699f, 9.02581378e-5f, -4.95034055e-6f,
                                     1.57527964e-7f, -2.19229146e-9f};
  float sum = kCoefficients[9];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 8; i > 0; --i) sum = std::fma(sum, t, kCoefficients[i]);
  return std::fma(sum, t, kCoefficients[0] + shift);
}

FASTLANE_HOST_DEVICE inline float gelu(float z) {
  const float t = at_most(std::fabs(z), kTailEnd);
  return std::fma(-t, kUnshift * exp2_approx(log2_normal_tail(t, kShift)), std::fmax(z, 0.0f));
}

FASTLANE_HOST_DEVICE inline float gelu_derivative(float z) {
  constexpr float kScale = static_cast<float>(-0.5 * gelu_constants::log2_e);
  constexpr float kLog2InvSqrt2Pi = -1.3257480647361593f;
  const float t = at_most(std::fabs(z), kTailEnd);
  const float density = exp2_approx(std::fma(kScale * t, t, kLog2InvSqrt2Pi));
  const float below = std::fma(-t, density, exp2_approx(log2_normal_tail(t, 0)));
  return z < 0 ? below : 1 - below;
}

// −2u(z) log₂ e + shift
FASTLANE_HOST_DEVICE inline float logistic_exponent(float z, float square, float shift) {
  constexpr double kLinear = -gelu_constants::two_sqrt_2_over_pi * gelu_constants::log2_e;
  constexpr double kCubic = kLinear * gelu_constants::tanh_cubic;
  const float factor = std::fma(square, static_cast<float>(kCubic), static_cast<float>(kLinear));
  return std::fma(factor, z, shift);
}

FASTLANE_HOST_DEVICE inline float gelu_tanh(float z) {
  const float c = at_least(z, -kLogisticEnd);
  const float e = exp2_approx(logistic_exponent(c, c * c, -kShift));
  return c * (kUnshift * reciprocal_approx(e + kUnshift));
}

FASTLANE_HOST_DEVICE inline float gelu_tanh_derivative(float z) {
  constexpr double kLinear = gelu_constants::two_sqrt_2_over_pi, kCubic = 3 * kLinear * gelu_constants::tanh_cubic;
  const float c = at_most(at_least(z, -kLogisticEnd), kLogisticEnd), square = c * c;
  const float sigma = reciprocal_approx(exp2_approx(logistic_exponent(c, square, 0)) + 1);
  const float slope = c * std::fma(square, static_cast<float>(kCubic), static_cast<float>(kLinear));
  return sigma * std::fma(slope, 1 - sigma, 1.0f);
}

}  // namespace fastlane::bits16
