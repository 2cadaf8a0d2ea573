// NEON of 64-bit Arm: 4 floats or 2 doubles. Every such CPU has it.
#pragma once

#include <arm_neon.h>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/half.h"
#include "kernels/cpu/isa/target.h"

FASTLANE_BEGIN_TARGET

#define FASTLANE_INLINE inline __attribute__((always_inline))

struct VecF {
  using elem = float;
  static constexpr int width = 4;
  float32x4_t v;

  static FASTLANE_INLINE VecF set(float x) { return {vdupq_n_f32(x)}; }
};
struct VecD {
  using elem = double;
  static constexpr int width = 2;
  float64x2_t v;

  static FASTLANE_INLINE VecD set(double x) { return {vdupq_n_f64(x)}; }
};

FASTLANE_INLINE VecF operator+(VecF a, VecF b) { return {vaddq_f32(a.v, b.v)}; }
FASTLANE_INLINE VecF operator-(VecF a, VecF b) { return {vsubq_f32(a.v, b.v)}; }
FASTLANE_INLINE VecF operator*(VecF a, VecF b) { return {vmulq_f32(a.v, b.v)}; }
FASTLANE_INLINE VecF operator/(VecF a, VecF b) { return {vdivq_f32(a.v, b.v)}; }
FASTLANE_INLINE VecF fma(VecF a, VecF b, VecF c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
FASTLANE_INLINE VecF multiply_subtract(VecF a, VecF b, VecF c) { return {vfmaq_f32(vnegq_f32(c.v), a.v, b.v)}; }
FASTLANE_INLINE VecF negated_multiply_add(VecF a, VecF b, VecF c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
// min and max return the second operand where either is NaN. Arm's fmin returns NaN, and fminnm the number.
FASTLANE_INLINE VecF min(VecF a, VecF b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
FASTLANE_INLINE VecF max(VecF a, VecF b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
FASTLANE_INLINE VecF abs(VecF a) { return {vabsq_f32(a.v)}; }
FASTLANE_INLINE VecF round(VecF a) { return {vrndnq_f32(a.v)}; }
FASTLANE_INLINE VecF select_negative(VecF z, VecF a, VecF b) { return {vbslq_f32(vcltzq_f32(z.v), a.v, b.v)}; }
// x · 2ⁿ in two steps, because 2ⁿ itself may be below the smallest normal number.
FASTLANE_INLINE VecF scale_by_power(VecF x, VecF n) {
  const int32x4_t whole = vcvtq_s32_f32(n.v), half = vshrq_n_s32(whole, 1), bias = vdupq_n_s32(127);
  const int32x4_t first = vshlq_n_s32(vaddq_s32(half, bias), 23);
  const int32x4_t second = vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23);
  return {vmulq_f32(vmulq_f32(x.v, vreinterpretq_f32_s32(first)), vreinterpretq_f32_s32(second))};
}

FASTLANE_INLINE VecD operator+(VecD a, VecD b) { return {vaddq_f64(a.v, b.v)}; }
FASTLANE_INLINE VecD operator-(VecD a, VecD b) { return {vsubq_f64(a.v, b.v)}; }
FASTLANE_INLINE VecD operator*(VecD a, VecD b) { return {vmulq_f64(a.v, b.v)}; }
FASTLANE_INLINE VecD operator/(VecD a, VecD b) { return {vdivq_f64(a.v, b.v)}; }
FASTLANE_INLINE VecD fma(VecD a, VecD b, VecD c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
FASTLANE_INLINE VecD multiply_subtract(VecD a, VecD b, VecD c) { return {vfmaq_f64(vnegq_f64(c.v), a.v, b.v)}; }
FASTLANE_INLINE VecD negated_multiply_add(VecD a, VecD b, VecD c) { return {vfmsq_f64(c.v, a.v, b.v)}; }
FASTLANE_INLINE VecD min(VecD a, VecD b) { return {vbslq_f64(vcltq_f64(a.v, b.v), a.v, b.v)}; }
FASTLANE_INLINE VecD max(VecD a, VecD b) { return {vbslq_f64(vcgtq_f64(a.v, b.v), a.v, b.v)}; }
FASTLANE_INLINE VecD abs(VecD a) { return {vabsq_f64(a.v)}; }
FASTLANE_INLINE VecD round(VecD a) { return {vrndnq_f64(a.v)}; }
FASTLANE_INLINE VecD select_negative(VecD z, VecD a, VecD b) { return {vbslq_f64(vcltzq_f64(z.v), a.v, b.v)}; }
FASTLANE_INLINE VecD scale_by_power(VecD x, VecD n) {
  const int64x2_t whole = vcvtq_s64_f64(n.v), half = vshrq_n_s64(whole, 1), bias = vdupq_n_s64(1023);
  const int64x2_t first = vshlq_n_s64(vaddq_s64(half, bias), 52);
  const int64x2_t second = vshlq_n_s64(vaddq_s64(vsubq_s64(whole, half), bias), 52);
  return {vmulq_f64(vmulq_f64(x.v, vreinterpretq_f64_s64(first)), vreinterpretq_f64_s64(second))};
}

FASTLANE_INLINE VecF load(const float* p) { return {vld1q_f32(p)}; }
FASTLANE_INLINE VecD load(const double* p) { return {vld1q_f64(p)}; }
FASTLANE_INLINE VecF load(const BFloat16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
}
FASTLANE_INLINE VecF load(const Half* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
}
FASTLANE_INLINE void store(float* p, VecF a) { vst1q_f32(p, a.v); }
FASTLANE_INLINE void store(double* p, VecD a) { vst1q_f64(p, a.v); }
FASTLANE_INLINE void store(BFloat16* p, VecF a) {
  const uint32x4_t u = vreinterpretq_u32_f32(a.v), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet_nan = vorrq_u32(u, vdupq_n_u32(0x40 << 16));
  const uint32x4_t is_number = vceqq_f32(a.v, a.v);
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(is_number, rounded, quiet_nan), 16));
}
FASTLANE_INLINE void store(Half* p, VecF a) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a.v)));
}

// A factor of every lane stays one number: a multiply-add reads it from lane 0 of a register. Filling all lanes would
// cost a vector instruction; the empty assembly keeps the compiler from that.
struct EveryLaneF {
  float x;
};
struct EveryLaneD {
  double x;
};
FASTLANE_INLINE EveryLaneF every_lane(const float* p) {
  float x = *p;
  asm("" : "+w"(x));
  return {x};
}
FASTLANE_INLINE EveryLaneD every_lane(const double* p) {
  double x = *p;
  asm("" : "+w"(x));
  return {x};
}
FASTLANE_INLINE VecF fma(EveryLaneF a, VecF b, VecF c) { return {vfmaq_n_f32(c.v, b.v, a.x)}; }
FASTLANE_INLINE VecD fma(EveryLaneD a, VecD b, VecD c) { return {vfmaq_n_f64(c.v, b.v, a.x)}; }

FASTLANE_INLINE void transpose(VecF (&r)[4]) {
  const float64x2_t low01 = vreinterpretq_f64_f32(vtrn1q_f32(r[0].v, r[1].v)),
                    high01 = vreinterpretq_f64_f32(vtrn2q_f32(r[0].v, r[1].v)),
                    low23 = vreinterpretq_f64_f32(vtrn1q_f32(r[2].v, r[3].v)),
                    high23 = vreinterpretq_f64_f32(vtrn2q_f32(r[2].v, r[3].v));
  r[0].v = vreinterpretq_f32_f64(vtrn1q_f64(low01, low23));
  r[1].v = vreinterpretq_f32_f64(vtrn1q_f64(high01, high23));
  r[2].v = vreinterpretq_f32_f64(vtrn2q_f64(low01, low23));
  r[3].v = vreinterpretq_f32_f64(vtrn2q_f64(high01, high23));
}
FASTLANE_INLINE void transpose(VecD (&r)[2]) {
  const float64x2_t first = vtrn1q_f64(r[0].v, r[1].v);
  r[1].v = vtrn2q_f64(r[0].v, r[1].v);
  r[0].v = first;
}

// 24 accumulators, 3 vectors of B, and 5 registers for numbers of A.
constexpr int kTileRows = 8;
constexpr int kTileVecs = 3;

FASTLANE_END_TARGET
