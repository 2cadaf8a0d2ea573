// AVX2 + FMA + F16C: 8 floats or 4 doubles.
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
  static constexpr int width = 8;
  __m256 v;

  static FASTLANE_INLINE VecF set(float x) { return {_mm256_set1_ps(x)}; }
};
struct VecD {
  using elem = double;
  static constexpr int width = 4;
  __m256d v;

  static FASTLANE_INLINE VecD set(double x) { return {_mm256_set1_pd(x)}; }
};

FASTLANE_INLINE VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTLANE_INLINE VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTLANE_INLINE VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTLANE_INLINE VecF operator/(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
FASTLANE_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTLANE_INLINE VecF multiply_subtract(VecF a, VecF b, VecF c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
FASTLANE_INLINE VecF negated_multiply_add(VecF a, VecF b, VecF c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
FASTLANE_INLINE VecF min(VecF a, VecF b) { return {_mm256_min_ps(a.v, b.v)}; }
FASTLANE_INLINE VecF max(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }
FASTLANE_INLINE VecF abs(VecF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
FASTLANE_INLINE VecF round(VecF a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FASTLANE_INLINE VecF select_negative(VecF z, VecF a, VecF b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(z.v, _mm256_setzero_ps(), _CMP_LT_OQ))};
}
// x · 2ⁿ in two steps, because 2ⁿ itself may be below the smallest normal number.
FASTLANE_INLINE VecF scale_by_power(VecF x, VecF n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))};
}

FASTLANE_INLINE VecD operator+(VecD a, VecD b) { return {_mm256_add_pd(a.v, b.v)}; }
FASTLANE_INLINE VecD operator-(VecD a, VecD b) { return {_mm256_sub_pd(a.v, b.v)}; }
FASTLANE_INLINE VecD operator*(VecD a, VecD b) { return {_mm256_mul_pd(a.v, b.v)}; }
FASTLANE_INLINE VecD operator/(VecD a, VecD b) { return {_mm256_div_pd(a.v, b.v)}; }
FASTLANE_INLINE VecD fma(VecD a, VecD b, VecD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
FASTLANE_INLINE VecD multiply_subtract(VecD a, VecD b, VecD c) { return {_mm256_fmsub_pd(a.v, b.v, c.v)}; }
FASTLANE_INLINE VecD negated_multiply_add(VecD a, VecD b, VecD c) { return {_mm256_fnmadd_pd(a.v, b.v, c.v)}; }
FASTLANE_INLINE VecD min(VecD a, VecD b) { return {_mm256_min_pd(a.v, b.v)}; }
FASTLANE_INLINE VecD max(VecD a, VecD b) { return {_mm256_max_pd(a.v, b.v)}; }
FASTLANE_INLINE VecD abs(VecD a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
FASTLANE_INLINE VecD round(VecD a) { return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FASTLANE_INLINE VecD select_negative(VecD z, VecD a, VecD b) {
  return {_mm256_blendv_pd(b.v, a.v, _mm256_cmp_pd(z.v, _mm256_setzero_pd(), _CMP_LT_OQ))};
}
FASTLANE_INLINE __m256d power_of_two(__m128i exponent) {
  const __m256i biased = _mm256_cvtepi32_epi64(_mm_add_epi32(exponent, _mm_set1_epi32(1023)));
  return _mm256_castsi256_pd(_mm256_slli_epi64(biased, 52));
}
FASTLANE_INLINE VecD scale_by_power(VecD x, VecD n) {
  const __m128i whole = _mm256_cvtpd_epi32(n.v), half = _mm_srai_epi32(whole, 1);
  return {_mm256_mul_pd(_mm256_mul_pd(x.v, power_of_two(half)), power_of_two(_mm_sub_epi32(whole, half)))};
}

FASTLANE_INLINE VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
FASTLANE_INLINE VecD load(const double* p) { return {_mm256_loadu_pd(p)}; }
FASTLANE_INLINE VecF load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
FASTLANE_INLINE VecF load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
FASTLANE_INLINE void store(float* p, VecF a) { _mm256_storeu_ps(p, a.v); }
FASTLANE_INLINE void store(double* p, VecD a) { _mm256_storeu_pd(p, a.v); }
FASTLANE_INLINE void store(BFloat16* p, VecF a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet_nan = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i bits = _mm256_blendv_epi8(rounded, quiet_nan, is_nan);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
FASTLANE_INLINE void store(Half* p, VecF a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Access to the first `count` elements, fewer than a vector. Absent elements read as 0.
FASTLANE_INLINE __m256i first_floats(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTLANE_INLINE __m256i first_doubles(int64_t count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
FASTLANE_INLINE VecF load_part(const float* p, int64_t count) { return {_mm256_maskload_ps(p, first_floats(count))}; }
FASTLANE_INLINE VecD load_part(const double* p, int64_t count) {
  return {_mm256_maskload_pd(p, first_doubles(count))};
}
FASTLANE_INLINE void store_part(float* p, VecF a, int64_t count) { _mm256_maskstore_ps(p, first_floats(count), a.v); }
FASTLANE_INLINE void store_part(double* p, VecD a, int64_t count) {
  _mm256_maskstore_pd(p, first_doubles(count), a.v);
}

FASTLANE_INLINE void transpose(VecF (&r)[8]) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    pairs[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  const auto lo = [](__m256 a, __m256 b) {
    return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
  };
  const auto hi = [](__m256 a, __m256 b) {
    return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
  };
  for (int i = 0; i < 2; ++i) {
    quads[4 * i] = lo(pairs[4 * i], pairs[4 * i + 2]);
    quads[4 * i + 1] = hi(pairs[4 * i], pairs[4 * i + 2]);
    quads[4 * i + 2] = lo(pairs[4 * i + 1], pairs[4 * i + 3]);
    quads[4 * i + 3] = hi(pairs[4 * i + 1], pairs[4 * i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    r[j].v = _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x20);
    r[4 + j].v = _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x31);
  }
}
FASTLANE_INLINE void transpose(VecD (&r)[4]) {
  __m256d pairs[4];
  for (int i = 0; i < 2; ++i) {
    pairs[2 * i] = _mm256_unpacklo_pd(r[2 * i].v, r[2 * i + 1].v);
    pairs[2 * i + 1] = _mm256_unpackhi_pd(r[2 * i].v, r[2 * i + 1].v);
  }
  for (int j = 0; j < 2; ++j) {
    r[j].v = _mm256_permute2f128_pd(pairs[j], pairs[2 + j], 0x20);
    r[2 + j].v = _mm256_permute2f128_pd(pairs[j], pairs[2 + j], 0x31);
  }
}

// 12 accumulators, 2 vectors of B, 1 broadcast of A: 15 of 16 registers.
constexpr int kTileRows = 6;
constexpr int kTileVecs = 2;

FASTLANE_END_TARGET
