// What every instruction set's vectors share.
#pragma once

#include <cstdint>

#include "kernels/cpu/arithmetic.h"
#include "kernels/cpu/half.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

template <class E>
struct VecOf;
template <>
struct VecOf<float> {
  using type = VecF;
};
template <>
struct VecOf<double> {
  using type = VecD;
};

// N vectors side by side. Code written for one vector works on all of them step by step, so that N independent
// instructions are always at hand.
template <class V, int N>
struct VecBlock {
  using elem = typename V::elem;
  V v[N];

  static FASTLANE_INLINE VecBlock set(elem x) {
    VecBlock block;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) block.v[i] = V::set(x);
    return block;
  }
};

#define FASTLANE_ON_BLOCKS(function)                                                                  \
  template <class V, int N, class... More>                                                            \
  FASTLANE_INLINE VecBlock<V, N> function(const VecBlock<V, N>& a, const More&... more) {             \
    VecBlock<V, N> result;                                                                            \
    _Pragma("GCC unroll 4") for (int i = 0; i < N; ++i) result.v[i] = function(a.v[i], more.v[i]...); \
    return result;                                                                                    \
  }
#define FASTLANE_OPERATOR_ON_BLOCKS(op)                                                          \
  template <class V, int N>                                                                      \
  FASTLANE_INLINE VecBlock<V, N> operator op(const VecBlock<V, N>& a, const VecBlock<V, N>& b) { \
    VecBlock<V, N> result;                                                                       \
    _Pragma("GCC unroll 4") for (int i = 0; i < N; ++i) result.v[i] = a.v[i] op b.v[i];          \
    return result;                                                                               \
  }
FASTLANE_OPERATOR_ON_BLOCKS(+)
FASTLANE_OPERATOR_ON_BLOCKS(-)
FASTLANE_OPERATOR_ON_BLOCKS(*)
FASTLANE_OPERATOR_ON_BLOCKS(/)
FASTLANE_ON_BLOCKS(fma)
FASTLANE_ON_BLOCKS(multiply_subtract)
FASTLANE_ON_BLOCKS(negated_multiply_add)
FASTLANE_ON_BLOCKS(min)
FASTLANE_ON_BLOCKS(max)
FASTLANE_ON_BLOCKS(abs)
FASTLANE_ON_BLOCKS(round)
FASTLANE_ON_BLOCKS(scale_by_power)
FASTLANE_ON_BLOCKS(select_negative)
#undef FASTLANE_ON_BLOCKS
#undef FASTLANE_OPERATOR_ON_BLOCKS

// A factor of every lane, for fma. A set may have a type of its own for these factors.
template <class E>
FASTLANE_INLINE typename VecOf<E>::type every_lane(const E* p) {
  return VecOf<E>::type::set(*p);
}

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using compute_t = typename ComputeOf<T>::type;

FASTLANE_INLINE float widen(float x) { return x; }
FASTLANE_INLINE double widen(double x) { return x; }
FASTLANE_INLINE float widen(BFloat16 x) { return to_float(x); }
FASTLANE_INLINE float widen(Half x) { return to_float(x); }

// Edges are padded with zeros, so that they meet the same arithmetic as full vectors. These two copy, for types that
// the instruction set does not load in part.
template <class T>
FASTLANE_INLINE auto load_part(const T* p, int64_t count) {
  T padded[decltype(load(p))::width] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}
template <class T, class V>
FASTLANE_INLINE void store_part(T* p, V a, int64_t count) {
  T padded[V::width];
  store(padded, a);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

template <class T>
FASTLANE_INLINE auto load_first(const T* p, int64_t count) {
  return count >= decltype(load(p))::width ? load(p) : load_part(p, count);
}
template <class T, class V>
FASTLANE_INLINE void store_first(T* p, V a, int64_t count) {
  count >= V::width ? store(p, a) : store_part(p, a, count);
}

// A null matrix gives null, whatever the element.
template <class T, class Matrix>
FASTLANE_INLINE T* element(const Matrix& matrix, int64_t row, int64_t col) {
  return matrix.data ? static_cast<T*>(matrix.data) + row * matrix.row_stride + col : nullptr;
}

FASTLANE_END_TARGET
