// What happens to finished sums while they lie in L1: bias, the store of z, activation, addend, one rounding, the
// store of the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cpu/generic/activation-inl.h"
#include "kernels/cpu/generic/tile-inl.h"
#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/parallel.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

// S is the type in which the sums are stored.
template <class T, class S>
struct FinishRows {
  const S* sums;
  const T* addend;
  T* z;
  compute_t<T>* slope;
  T* out;
  int64_t rows;
  int64_t sums_stride, addend_stride, z_stride, slope_stride, out_stride;

  FASTLANE_INLINE FinishRows at(int64_t col) const {
    FinishRows r = *this;
    r.sums += col;
    if (r.addend) r.addend += col;
    if (r.z) r.z += col;
    if (r.slope) r.slope += col;
    r.out += col;
    return r;
  }
};

// Finishes kVecs vectors of every row; the last vector holds `last_count` columns.
template <class Act, int kVecs, bool kWithSlope, class T, class S>
FASTLANE_INLINE void finish_columns(FinishRows<T, S> r, const T* bias, int64_t last_count) {
  using V = typename VecOf<compute_t<T>>::type;
  const auto count = [&](int v) { return v + 1 < kVecs ? V::width : last_count; };
  V b[kVecs];
  // Adding −0 changes no value.
  for (int v = 0; v < kVecs; ++v) b[v] = bias ? load_first(bias + v * V::width, count(v)) : V::set(-0.0);
  for (int64_t i = 0; i < r.rows; ++i) {
    VecBlock<V, kVecs> value;
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) value.v[v] = load_first(r.sums + v * V::width, count(v)) + b[v];
    if (r.z) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store_first(r.z + v * V::width, value.v[v], count(v));
      r.z += r.z_stride;
    }
    if constexpr (kWithSlope) {
      const ValueAndSlope<VecBlock<V, kVecs>> both = Act::both(value);
      value = both.value;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store_first(r.slope + v * V::width, both.slope.v[v], count(v));
      r.slope += r.slope_stride;
    } else {
      value = Act::value(value);
    }
    if (r.addend) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) value.v[v] = value.v[v] + load_first(r.addend + v * V::width, count(v));
      r.addend += r.addend_stride;
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store_first(r.out + v * V::width, value.v[v], count(v));
    r.out += r.out_stride;
    r.sums += r.sums_stride;
  }
}

// The same with out = sums ⊙ act′(preactivation), and the sums of out over these rows.
template <class Act, int kVecs, class T, class S>
FASTLANE_INLINE void finish_gradient_columns(const GradientEpilogue& e, const Region& region, const S* sums,
                                             int64_t stride, int64_t col, int64_t last_count,
                                             compute_t<T>* row_sums) {
  using V = typename VecOf<compute_t<T>>::type;
  const auto count = [&](int v) { return v + 1 < kVecs ? V::width : last_count; };
  auto total = VecBlock<V, kVecs>::set(0);
  for (int64_t i = 0; i < region.rows; ++i) {
    const T* const z = element<const T>(e.preactivation, region.row + i, region.col + col);
    T* const out = element<T>(e.out, region.row + i, region.col + col);
    VecBlock<V, kVecs> grad;
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) grad.v[v] = load_first(sums + i * stride + col + v * V::width, count(v));
    if constexpr (!std::is_same_v<Act, NoActivation>) {
      VecBlock<V, kVecs> at;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) at.v[v] = load_first(z + v * V::width, count(v));
      grad = grad * Act::derivative(at);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store_first(out + v * V::width, grad.v[v], count(v));
    total = total + grad;
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) store_first(row_sums + region.col + col + v * V::width, total.v[v], count(v));
}

// `sums` holds the region's sums row by row; rows lie `stride` apart. `row_sums` has n elements and gets out's column
// sums over these rows; see column_sums-inl.h.
template <class T, class Act, class S>
__attribute__((noinline)) void finish_gradient_as(const GradientEpilogue& e, const Region& region, const S* sums,
                                                  int64_t stride, compute_t<T>* row_sums) {
  constexpr int64_t width = VecOf<compute_t<T>>::type::width;
  int64_t col = 0;
  for (; col + 2 * width <= region.cols; col += 2 * width)
    finish_gradient_columns<Act, 2, T>(e, region, sums, stride, col, width, row_sums);
  for (; col < region.cols; col += width)
    finish_gradient_columns<Act, 1, T>(e, region, sums, stride, col, std::min(width, region.cols - col), row_sums);
}

template <class T, class S>
void finish_gradient(const GradientEpilogue& e, const Region& region, const S* sums, int64_t stride,
                     compute_t<T>* row_sums) {
  with_activation<T>(e.activation,
                     [&](auto act) { finish_gradient_as<T, decltype(act)>(e, region, sums, stride, row_sums); });
}

template <class T, class Act, class S>
__attribute__((noinline)) void finish_as(const Epilogue& e, const Region& region, const S* sums, int64_t stride) {
  constexpr int64_t width = VecOf<compute_t<T>>::type::width;
  const auto* bias = e.bias ? static_cast<const T*>(e.bias) + region.col : nullptr;
  const FinishRows<T, S> rows{sums,
                              element<const T>(e.addend, region.row, region.col),
                              element<T>(e.z, region.row, region.col),
                              element<compute_t<T>>(e.slope, region.row, region.col),
                              element<T>(e.out, region.row, region.col),
                              region.rows,
                              stride,
                              e.addend.row_stride,
                              e.z.row_stride,
                              e.slope.row_stride,
                              e.out.row_stride};
  const auto finish_rows = [&](auto with_slope) {
    constexpr bool kWithSlope = decltype(with_slope)::value;
    int64_t col = 0;
    for (; col + 2 * width <= region.cols; col += 2 * width)
      finish_columns<Act, 2, kWithSlope>(rows.at(col), bias ? bias + col : nullptr, width);
    for (; col < region.cols; col += width)
      finish_columns<Act, 1, kWithSlope>(rows.at(col), bias ? bias + col : nullptr,
                                         std::min(width, region.cols - col));
  };
  rows.slope ? finish_rows(std::true_type{}) : finish_rows(std::false_type{});
}

template <class T, class S>
void finish(const Epilogue& e, const Region& region, const S* sums, int64_t stride) {
  with_activation<T>(e.activation, [&](auto act) { finish_as<T, decltype(act)>(e, region, sums, stride); });
}

// For sums that lie column by column: calls finish_rows(part, sums, stride) with each part's sums row by row. Beyond
// the region's columns there may be no sums.
template <class C, class FinishRows>
void finish_transposed(const Region& region, const C* sums, int64_t stride, FinishRows finish_rows) {
  using V = typename VecOf<C>::type;
  constexpr int W = V::width;
  alignas(64) C block[W * W];
  for (int64_t col = 0; col < region.cols; col += W)
    for (int64_t row = 0; row < region.rows; row += W) {
      V t[W];
#pragma GCC unroll 16
      for (int v = 0; v < W; ++v) t[v] = load(sums + std::min<int64_t>(col + v, region.cols - 1) * stride + row);
      transpose(t);
#pragma GCC unroll 16
      for (int v = 0; v < W; ++v) store(block + v * W, t[v]);
      finish_rows({region.row + row, region.col + col, std::min<int64_t>(W, region.rows - row),
                   std::min<int64_t>(W, region.cols - col)},
                  block, W);
    }
}

// Finishes a product that something else computed.
template <class T>
void run_epilogue(const EpilogueProblem& p, Parallel parallel) {
  constexpr int64_t kTaskRows = 4;
  if (p.m * p.n < kSerialElements) parallel.threads = 1;
  parallel.for_each(ceil_div(p.m, kTaskRows), [&](int64_t task) {
    const int64_t row = task * kTaskRows;
    finish<T>(p.epilogue, {row, 0, std::min(kTaskRows, p.m - row), p.n}, element<const T>(p.product, row, 0),
              p.product.row_stride);
  });
}

FASTLANE_END_TARGET
