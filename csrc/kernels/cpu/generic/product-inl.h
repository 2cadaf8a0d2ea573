// How a step of the inner product is formed. A unit is what one lane takes in one step: a value of the compute
// type or, where the CPU multiplies bf16 pairs (vec_avx512_bf16.h), two neighbours along k.
//
// A product drops a value if it takes the value for zero: products of pairs drop denormals. While a kernel packs or
// reads its operands, it looks for such values. If it finds one, its `run` returns false and its results are
// worthless; exact_product then runs it again with products that widen.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

template <class T>
struct WideningProduct {
  using C = compute_t<T>;
  using V = typename VecOf<C>::type;
  using Unit = C;
  static constexpr int k_per_step = 1;
  // Operands that are stored as they are multiplied need no packing.
  static constexpr bool reads_storage = std::is_same_v<T, C>;
  static constexpr bool drops_denormals = false;

  static FASTLANE_INLINE V lanes(const Unit* p) { return load(p); }
  static FASTLANE_INLINE auto broadcast(const void* p) { return every_lane(static_cast<const Unit*>(p)); }
  template <class Factor>
  static FASTLANE_INLINE V multiply_add(Factor a, V b, V sum) {
    return fma(a, b, sum);
  }

  static FASTLANE_INLINE void store_units(Unit* p, V a) { store(p, a); }
  // V::width units that follow each other along k.
  static FASTLANE_INLINE V units_along_k(const T* p) { return load(p); }
  // The same from `count` values; absent values are zero.
  static FASTLANE_INLINE V units_along_k(const T* p, int64_t count) { return load_first(p, count); }
  // V::width lanes of one step.
  static FASTLANE_INLINE V units_along_strip(const T* p, int64_t) { return load(p); }
  // `count` lanes of one step, with `k_left` values left along k.
  static FASTLANE_INLINE V units_along_strip(const T* p, int64_t, int64_t /*k_left*/, int64_t count) {
    return load_first(p, count);
  }
  // Looks for values that the product drops.
  struct Watch {
    FASTLANE_INLINE void see(V) {}
    bool found() const { return false; }
  };
  static FASTLANE_INLINE Unit unit(const T* p, int64_t, int64_t) { return widen(*p); }

  // The values of `kUnitsOfTwo` units, or of `count` units if fewer, as two vectors.
  static constexpr int64_t kUnitsOfTwo = 2 * V::width;
  static FASTLANE_INLINE void load_values(const Unit* p, int64_t count, V (&v)[2]) {
    v[0] = load_first(p, count);
    v[1] = load_first(p + V::width, std::max<int64_t>(0, count - V::width));
  }
  static FASTLANE_INLINE void store_values(Unit* p, const V (&v)[2], int64_t count) {
    store_first(p, v[0], count);
    store_first(p + V::width, v[1], std::max<int64_t>(0, count - V::width));
  }
};

template <class T>
struct ProductOf {
  using type = WideningProduct<T>;
};
#if defined(FASTLANE_BF16_PAIRS)
template <>
struct ProductOf<BFloat16> {
  using type = Bf16PairProduct;
};
#endif
template <class T>
using product_t = typename ProductOf<T>::type;

// Calls run(P{}) with the fastest product P and, if that returns false, with the product that drops nothing.
template <class T, class Run>
void exact_product(Run run) {
  [[maybe_unused]] const bool dropped = !run(product_t<T>{});
  if constexpr (product_t<T>::drops_denormals)
    if (dropped) run(WideningProduct<T>{});
}

FASTLANE_END_TARGET
