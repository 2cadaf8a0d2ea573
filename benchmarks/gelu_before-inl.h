// GELU as this project first had it, kept to be measured against: cdf and pdf apart, fp64 lane by lane through libm.
#pragma once

#include <cmath>

#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/activation.h"

FASTLANE_BEGIN_TARGET
namespace before {

// exp(s − correction) for s ≤ 0; `correction` is a tiny low-order part of s.
FASTLANE_INLINE VecF exp_nonpositive(VecF s, VecF correction) {
  const VecF n = round(s * VecF::set(1.44269504f));
  VecF r = fma(n, VecF::set(-0.693359375f), s);
  r = fma(n, VecF::set(2.12194440e-4f), r) - correction;
  VecF p = fma(VecF::set(1.38145400e-3f), r, VecF::set(8.36874512e-3f));
  p = fma(p, r, VecF::set(4.16683908e-2f));
  p = fma(p, r, VecF::set(1.66665204e-1f));
  p = fma(p, r, VecF::set(4.99999934e-1f));
  p = fma(p * r, r, r) + VecF::set(1.0f);
  return scale_by_power(p, n);
}

constexpr float kTailEnd = 14.5f;
constexpr float kSaturation = 40.0f;

struct NormalParts {
  VecF cdf;  // Φ(z)
  VecF gaussian;  // exp(−z²/2)
};

FASTLANE_INLINE NormalParts normal_parts(VecF z) {
  const VecF t = min(VecF::set(kTailEnd), abs(z));
  const VecF half_square = t * t * VecF::set(0.5f);
  const VecF lost = fma(t * VecF::set(0.5f), t, VecF::set(0.0f) - half_square);
  const VecF gaussian = exp_nonpositive(VecF::set(0.0f) - half_square, lost);
  const VecF q = fma(VecF::set(-6.0f), VecF::set(1.0f) / (t + VecF::set(3.0f)), VecF::set(1.0f));
  VecF ratio = fma(VecF::set(5.31618696e-5f), q, VecF::set(1.15013673e-4f));
  ratio = fma(ratio, q, VecF::set(-3.39012797e-4f));
  ratio = fma(ratio, q, VecF::set(-9.83288217e-4f));
  ratio = fma(ratio, q, VecF::set(2.90438736e-3f));
  ratio = fma(ratio, q, VecF::set(6.13194229e-3f));
  ratio = fma(ratio, q, VecF::set(-4.62132636e-2f));
  ratio = fma(ratio, q, VecF::set(1.23225041e-1f));
  ratio = fma(ratio, q, VecF::set(-2.06402620e-1f));
  ratio = fma(ratio, q, VecF::set(1.21513948e-1f));
  const VecF tail = gaussian * ratio;
  return {select_negative(z, tail, VecF::set(1.0f) - tail), gaussian};
}

struct TanhParts {
  VecF e;  // exp(−|2u|)
  VecF slope;  // d(2u)/dz
};

FASTLANE_INLINE TanhParts tanh_parts(VecF z) {
  constexpr float k = static_cast<float>(gelu_constants::two_sqrt_2_over_pi);
  constexpr float kc = static_cast<float>(gelu_constants::two_sqrt_2_over_pi * gelu_constants::tanh_cubic);
  constexpr float k_low = static_cast<float>(gelu_constants::two_sqrt_2_over_pi - double{k});
  constexpr float kc_low =
      static_cast<float>(gelu_constants::two_sqrt_2_over_pi * gelu_constants::tanh_cubic - double{kc});
  const VecF zero = VecF::set(0.0f);
  const VecF t = min(VecF::set(11.0f), abs(z));
  const VecF square = t * t;
  const VecF square_low = fma(t, t, zero - square);
  const VecF cubic = VecF::set(kc) * square;
  const VecF factor = cubic + VecF::set(k);
  const VecF factor_low = fma(VecF::set(kc), square, zero - cubic) + (VecF::set(k) - (factor - cubic)) +
                          fma(VecF::set(kc), square_low, fma(VecF::set(kc_low), square, VecF::set(k_low)));
  const VecF two_u = t * factor;
  const VecF two_u_low = fma(t, factor, zero - two_u) + t * factor_low;
  return {exp_nonpositive(zero - two_u, two_u_low), fma(VecF::set(3.0f * kc), square, VecF::set(k))};
}

FASTLANE_INLINE VecF from_below(VecF z) { return max(VecF::set(-kSaturation), z); }
FASTLANE_INLINE VecF from_both_sides(VecF z) { return min(VecF::set(kSaturation), from_below(z)); }

template <double (*Function)(double)>
FASTLANE_INLINE VecD lane_by_lane(VecD a) {
  double lanes[VecD::width];
  store(lanes, a);
  for (double& lane : lanes) lane = Function(lane);
  return load(lanes);
}

struct ExactGelu {
  static FASTLANE_INLINE VecF value(VecF z) { return from_below(z) * normal_parts(z).cdf; }
  static FASTLANE_INLINE VecF derivative(VecF z) {
    const NormalParts parts = normal_parts(z);
    const VecF pdf = parts.gaussian * VecF::set(static_cast<float>(gelu_constants::inv_sqrt_2pi));
    return fma(from_both_sides(z), pdf, parts.cdf);
  }
  static FASTLANE_INLINE VecD value(VecD z) { return lane_by_lane<Definition<Activation::gelu>::value<double>>(z); }
  static FASTLANE_INLINE VecD derivative(VecD z) {
    return lane_by_lane<Definition<Activation::gelu>::derivative<double>>(z);
  }
};

struct TanhGelu {
  static FASTLANE_INLINE VecF value(VecF z) {
    const VecF e = tanh_parts(z).e, bounded = from_below(z);
    return select_negative(z, bounded * e, bounded) / (VecF::set(1.0f) + e);
  }
  static FASTLANE_INLINE VecF derivative(VecF z) {
    const TanhParts parts = tanh_parts(z);
    const VecF one = VecF::set(1.0f), inverse = one / (one + parts.e), small = parts.e * inverse;
    return fma(from_both_sides(z) * parts.slope, small * inverse, select_negative(z, small, inverse));
  }
  static FASTLANE_INLINE VecD value(VecD z) {
    return lane_by_lane<Definition<Activation::gelu_tanh>::value<double>>(z);
  }
  static FASTLANE_INLINE VecD derivative(VecD z) {
    return lane_by_lane<Definition<Activation::gelu_tanh>::derivative<double>>(z);
  }
};

}  // namespace before
FASTLANE_END_TARGET
