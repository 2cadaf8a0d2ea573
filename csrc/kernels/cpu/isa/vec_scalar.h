// One lane. Every other instruction set is checked against this one, which runs on any CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cpu/half.h"
#include "kernels/cpu/isa/target.h"

FASTLANE_BEGIN_TARGET

#define FASTLANE_INLINE inline __attribute__((always_inline))

template <class E>
struct ScalarVec {
  using elem = E;
  static constexpr int width = 1;
  E v;

  static FASTLANE_INLINE ScalarVec set(E x) { return {x}; }
};

template <class E>
FASTLANE_INLINE ScalarVec<E> operator+(ScalarVec<E> a, ScalarVec<E> b) {
  return {a.v + b.v};
}
template <class E>
FASTLANE_INLINE ScalarVec<E> operator-(ScalarVec<E> a, ScalarVec<E> b) {
  return {a.v - b.v};
}
template <class E>
FASTLANE_INLINE ScalarVec<E> operator*(ScalarVec<E> a, ScalarVec<E> b) {
  return {a.v * b.v};
}
template <class E>
FASTLANE_INLINE ScalarVec<E> operator/(ScalarVec<E> a, ScalarVec<E> b) {
  return {a.v / b.v};
}

// Two roundings here: without the instruction, std::fma would be a slow library call.
template <class E>
FASTLANE_INLINE ScalarVec<E> fma(ScalarVec<E> a, ScalarVec<E> b, ScalarVec<E> c) {
  return {a.v * b.v + c.v};
}
template <class E>
FASTLANE_INLINE ScalarVec<E> negated_multiply_add(ScalarVec<E> a, ScalarVec<E> b, ScalarVec<E> c) {
  return {c.v - a.v * b.v};
}
// ab − c without rounding the product, as in the other sets, where a wider type holds the product.
FASTLANE_INLINE ScalarVec<float> multiply_subtract(ScalarVec<float> a, ScalarVec<float> b, ScalarVec<float> c) {
  return {static_cast<float>(double{a.v} * double{b.v} - double{c.v})};
}
FASTLANE_INLINE ScalarVec<double> multiply_subtract(ScalarVec<double> a, ScalarVec<double> b, ScalarVec<double> c) {
  return {a.v * b.v - c.v};
}
// min and max return the second operand where either is NaN, as the x86 instructions do.
template <class E>
FASTLANE_INLINE ScalarVec<E> min(ScalarVec<E> a, ScalarVec<E> b) {
  return {a.v < b.v ? a.v : b.v};
}
template <class E>
FASTLANE_INLINE ScalarVec<E> max(ScalarVec<E> a, ScalarVec<E> b) {
  return {a.v > b.v ? a.v : b.v};
}
template <class E>
FASTLANE_INLINE ScalarVec<E> abs(ScalarVec<E> a) {
  return {std::fabs(a.v)};
}
template <class E>
FASTLANE_INLINE ScalarVec<E> round(ScalarVec<E> a) {
  return {std::nearbyint(a.v)};
}
template <class E>
FASTLANE_INLINE ScalarVec<E> select_negative(ScalarVec<E> z, ScalarVec<E> a, ScalarVec<E> b) {
  return {z.v < E(0) ? a.v : b.v};
}
// x · 2ⁿ, denormal results included; n is a small whole number.
template <class E>
FASTLANE_INLINE ScalarVec<E> scale_by_power(ScalarVec<E> x, ScalarVec<E> n) {
  return {n.v == n.v ? std::ldexp(x.v, static_cast<int>(n.v)) : n.v};
}

template <class E>
FASTLANE_INLINE void transpose(ScalarVec<E> (&)[1]) {}

using VecF = ScalarVec<float>;
using VecD = ScalarVec<double>;

FASTLANE_INLINE VecF load(const float* p) { return {*p}; }
FASTLANE_INLINE VecD load(const double* p) { return {*p}; }
FASTLANE_INLINE VecF load(const BFloat16* p) { return {to_float(*p)}; }
FASTLANE_INLINE VecF load(const Half* p) { return {to_float(*p)}; }
FASTLANE_INLINE void store(float* p, VecF a) { *p = a.v; }
FASTLANE_INLINE void store(double* p, VecD a) { *p = a.v; }
FASTLANE_INLINE void store(BFloat16* p, VecF a) { *p = to_bfloat16(a.v); }
FASTLANE_INLINE void store(Half* p, VecF a) { *p = to_half(a.v); }

constexpr int kTileRows = 4;
constexpr int kTileVecs = 4;

FASTLANE_END_TARGET
