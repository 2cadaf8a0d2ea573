// AVX-512 F, BW, DQ, VL: 16 floats or 8 doubles.
#pragma once

#include <cmath>
#include <cstdint>
#include <immintrin.h>

#include "kernels/cpu/half.h"
#include "kernels/cpu/isa/target.h"

FASTLANE_BEGIN_TARGET

#define FASTLANE_INLINE inline __attribute__((always_inline))

struct VecF {
  using elem = float;
  static constexpr int width = 16;
  __m512 v;

  static FASTLANE_INLINE VecF set(float x) { return {_mm512_set1_ps(x)}; }
};
struct VecD {
  using elem = double;
  static constexpr int width = 8;
  __m512d v;

  static FASTLANE_INLINE VecD set(double x) { return {_mm512_set1_pd(x)}; }
};

FASTLANE_INLINE VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTLANE_INLINE VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTLANE_INLINE VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTLANE_INLINE VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTLANE_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FASTLANE_INLINE VecF multiply_subtract(VecF a, VecF b, VecF c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
FASTLANE_INLINE VecF negated_multiply_add(VecF a, VecF b, VecF c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
FASTLANE_INLINE VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
FASTLANE_INLINE VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
FASTLANE_INLINE VecF abs(VecF a) { return {_mm512_abs_ps(a.v)}; }
FASTLANE_INLINE VecF round(VecF a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FASTLANE_INLINE VecF select_negative(VecF z, VecF a, VecF b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(z.v, _mm512_setzero_ps(), _CMP_LT_OQ), b.v, a.v)};
}
// x · 2ⁿ, denormal results included.
FASTLANE_INLINE VecF scale_by_power(VecF x, VecF n) { return {_mm512_scalef_ps(x.v, n.v)}; }

FASTLANE_INLINE VecD operator+(VecD a, VecD b) { return {_mm512_add_pd(a.v, b.v)}; }
FASTLANE_INLINE VecD operator-(VecD a, VecD b) { return {_mm512_sub_pd(a.v, b.v)}; }
FASTLANE_INLINE VecD operator*(VecD a, VecD b) { return {_mm512_mul_pd(a.v, b.v)}; }
FASTLANE_INLINE VecD operator/(VecD a, VecD b) { return {_mm512_div_pd(a.v, b.v)}; }
FASTLANE_INLINE VecD fma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
FASTLANE_INLINE VecD multiply_subtract(VecD a, VecD b, VecD c) { return {_mm512_fmsub_pd(a.v, b.v, c.v)}; }
FASTLANE_INLINE VecD negated_multiply_add(VecD a, VecD b, VecD c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
FASTLANE_INLINE VecD min(VecD a, VecD b) { return {_mm512_min_pd(a.v, b.v)}; }
FASTLANE_INLINE VecD max(VecD a, VecD b) { return {_mm512_max_pd(a.v, b.v)}; }
FASTLANE_INLINE VecD abs(VecD a) { return {_mm512_abs_pd(a.v)}; }
FASTLANE_INLINE VecD round(VecD a) {
  return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FASTLANE_INLINE VecD select_negative(VecD z, VecD a, VecD b) {
  return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(z.v, _mm512_setzero_pd(), _CMP_LT_OQ), b.v, a.v)};
}
FASTLANE_INLINE VecD scale_by_power(VecD x, VecD n) { return {_mm512_scalef_pd(x.v, n.v)}; }

FASTLANE_INLINE VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
FASTLANE_INLINE VecD load(const double* p) { return {_mm512_loadu_pd(p)}; }
FASTLANE_INLINE VecF widen_bf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
FASTLANE_INLINE VecF load(const BFloat16* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTLANE_INLINE VecF load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
FASTLANE_INLINE void store(float* p, VecF a) { _mm512_storeu_ps(p, a.v); }
FASTLANE_INLINE void store(double* p, VecD a) { _mm512_storeu_pd(p, a.v); }
// Rounds by hand, because the AVX512_BF16 conversion flushes denormals.
FASTLANE_INLINE __m256i narrow_bf16(VecF a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i high = _mm512_srli_epi32(u, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i bits = _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(bits);
}
FASTLANE_INLINE __m256i narrow_half(VecF a) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTLANE_INLINE void store(BFloat16* p, VecF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a));
}
FASTLANE_INLINE void store(Half* p, VecF a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_half(a)); }

// Access to the first `count` elements, fewer than a vector. Absent elements read as 0.
FASTLANE_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
FASTLANE_INLINE VecF load_part(const float* p, int64_t count) {
  return {_mm512_maskz_loadu_ps(first_lanes(count), p)};
}
FASTLANE_INLINE VecD load_part(const double* p, int64_t count) {
  return {_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(count)), p)};
}
FASTLANE_INLINE VecF load_part(const BFloat16* p, int64_t count) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
FASTLANE_INLINE VecF load_part(const Half* p, int64_t count) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p))};
}
FASTLANE_INLINE void store_part(float* p, VecF a, int64_t count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), a.v);
}
FASTLANE_INLINE void store_part(double* p, VecD a, int64_t count) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(count)), a.v);
}
FASTLANE_INLINE void store_part(BFloat16* p, VecF a, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), narrow_bf16(a));
}
FASTLANE_INLINE void store_part(Half* p, VecF a, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), narrow_half(a));
}

// Transposes the 4×4 matrix of 128-bit lanes held by four registers.
FASTLANE_INLINE void transpose_lanes(__m512 a, __m512 b, __m512 c, __m512 d, __m512 (&out)[4]) {
  const __m512 ab_low = _mm512_shuffle_f32x4(a, b, 0x44), ab_high = _mm512_shuffle_f32x4(a, b, 0xee);
  const __m512 cd_low = _mm512_shuffle_f32x4(c, d, 0x44), cd_high = _mm512_shuffle_f32x4(c, d, 0xee);
  out[0] = _mm512_shuffle_f32x4(ab_low, cd_low, 0x88);
  out[1] = _mm512_shuffle_f32x4(ab_low, cd_low, 0xdd);
  out[2] = _mm512_shuffle_f32x4(ab_high, cd_high, 0x88);
  out[3] = _mm512_shuffle_f32x4(ab_high, cd_high, 0xdd);
}
FASTLANE_INLINE __m512 unpack_low_pairs(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
FASTLANE_INLINE __m512 unpack_high_pairs(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

FASTLANE_INLINE void transpose(VecF (&r)[16]) {
  __m512 pairs[16], quads[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    pairs[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    pairs[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    quads[4 * i] = unpack_low_pairs(pairs[4 * i], pairs[4 * i + 2]);
    quads[4 * i + 1] = unpack_high_pairs(pairs[4 * i], pairs[4 * i + 2]);
    quads[4 * i + 2] = unpack_low_pairs(pairs[4 * i + 1], pairs[4 * i + 3]);
    quads[4 * i + 3] = unpack_high_pairs(pairs[4 * i + 1], pairs[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512 out[4];
    transpose_lanes(quads[j], quads[4 + j], quads[8 + j], quads[12 + j], out);
#pragma GCC unroll 4
    for (int lane = 0; lane < 4; ++lane) r[4 * lane + j].v = out[lane];
  }
}
FASTLANE_INLINE void transpose(VecD (&r)[8]) {
  __m512 pairs[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_castpd_ps(r[2 * i].v), b = _mm512_castpd_ps(r[2 * i + 1].v);
    pairs[2 * i] = unpack_low_pairs(a, b);
    pairs[2 * i + 1] = unpack_high_pairs(a, b);
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    __m512 out[4];
    transpose_lanes(pairs[j], pairs[2 + j], pairs[4 + j], pairs[6 + j], out);
#pragma GCC unroll 4
    for (int lane = 0; lane < 4; ++lane) r[2 * lane + j].v = _mm512_castps_pd(out[lane]);
  }
}

// 24 accumulators, 2 vectors of B, broadcasts of A: within 32 registers, and enough independent
// chains for two FMA units of latency 4.
constexpr int kTileRows = 12;
constexpr int kTileVecs = 2;

FASTLANE_END_TARGET
