// What AVX512_BF16 adds to vec_avx512.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <immintrin.h>

#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec_avx512.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

#define FASTLANE_BF16_PAIRS

// Two neighbours along k.
struct Bf16Pair {
  BFloat16 first, second;
};

// vdpbf16ps adds the products of 16 pairs to 16 floats. The instruction takes denormal operands for zero, so Watch
// looks for them (product-inl.h). The instruction also takes products and sums below 2⁻¹²⁶ for zero; nothing looks
// for these.
struct Bf16PairProduct {
  using C = float;
  using V = VecF;
  using Unit = Bf16Pair;
  static constexpr int k_per_step = 2;
  static constexpr bool reads_storage = true;
  static constexpr bool drops_denormals = true;

  struct Watch {
    __m512i least;  // the least of magnitude − 1, where a magnitude of 0 wraps to the largest number

    FASTLANE_INLINE Watch() : least(_mm512_set1_epi16(-1)) {}
    FASTLANE_INLINE void see(V units) {
      const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(units.v), _mm512_set1_epi16(0x7fff));
      least = _mm512_min_epu16(least, _mm512_sub_epi16(magnitude, _mm512_set1_epi16(1)));
    }
    bool found() const { return _mm512_cmplt_epu16_mask(least, _mm512_set1_epi16(0x7f)) != 0; }
  };
  static FASTLANE_INLINE bool drops_any(const BFloat16* p, int64_t count) {
    Watch watch;
    for (; count > 0; count -= 32, p += 32) watch.see(units_along_k(p, count));
    return watch.found();
  }

  static FASTLANE_INLINE V lanes(const Unit* p) { return {_mm512_loadu_ps(p)}; }
  static FASTLANE_INLINE V broadcast(const void* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return {_mm512_castsi512_ps(_mm512_set1_epi32(pair))};
  }
  static FASTLANE_INLINE V multiply_add(V a, V b, V sum) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }

  static FASTLANE_INLINE void store_units(Unit* p, V a) { _mm512_storeu_ps(p, a.v); }
  static FASTLANE_INLINE V units_along_k(const BFloat16* p) { return {_mm512_loadu_ps(p)}; }
  static FASTLANE_INLINE V units_along_k(const BFloat16* p, int64_t count) {
    const __mmask32 present = count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(present, p))};
  }
  static FASTLANE_INLINE V units_along_strip(const BFloat16* p, int64_t k_stride) {
    return pairs(widen_bits(p), widen_bits(p + k_stride));
  }
  static FASTLANE_INLINE V units_along_strip(const BFloat16* p, int64_t k_stride, int64_t k_left, int64_t count) {
    return pairs(widen_bits(p, count), k_left > 1 ? widen_bits(p + k_stride, count) : _mm512_setzero_si512());
  }
  static FASTLANE_INLINE Unit unit(const BFloat16* p, int64_t k_stride, int64_t k_left) {
    return {*p, k_left > 1 ? p[k_stride] : BFloat16{0}};
  }

  static constexpr int64_t kUnitsOfTwo = V::width;
  static FASTLANE_INLINE void load_values(const Unit* p, int64_t count, V (&v)[2]) {
    const __m512i pairs = _mm512_maskz_loadu_epi32(first_lanes(count), p);
    v[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
    v[1] = {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
  }
  static FASTLANE_INLINE void store_values(Unit* p, const V (&v)[2], int64_t count) {
    const __m512i first = round_bits(v[0]), second = _mm512_slli_epi32(round_bits(v[1]), 16);
    _mm512_mask_storeu_epi32(p, first_lanes(count), _mm512_or_si512(first, second));
  }

 private:
  static FASTLANE_INLINE __mmask16 first_lanes(int64_t count) {
    return count >= V::width ? static_cast<__mmask16>(~0u) : static_cast<__mmask16>((1u << count) - 1);
  }
  static FASTLANE_INLINE __m512i round_bits(V a) {
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
  }
  static FASTLANE_INLINE __m512i widen_bits(const BFloat16* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static FASTLANE_INLINE __m512i widen_bits(const BFloat16* p, int64_t count) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), p));
  }
  static FASTLANE_INLINE V pairs(__m512i first, __m512i second) {
    return {_mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32(second, 16)))};
  }
};

FASTLANE_END_TARGET
