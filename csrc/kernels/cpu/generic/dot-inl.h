// A product with few rows whose operands both run along k in memory, by inner products of rows.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "kernels/cpu/generic/epilogue-inl.h"
#include "kernels/cpu/generic/few_rows-inl.h"
#include "kernels/cpu/generic/pack-inl.h"
#include "kernels/cpu/generic/tile-inl.h"
#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

// With more rows tiles take over, earlier where vectors are short. Measured at 768 to 3072 features; at 25 to 48 rows
// either may win.
template <class P>
constexpr int64_t kDotMaxRows = P::V::width == 1  ? 0
                                : P::V::width < 8 ? 16
                                                  : 24;

template <class T, class P>
class DotGemm {
  using C = typename P::C;
  using V = typename P::V;
  static constexpr int W = V::width;
  static constexpr int64_t kStep = W * P::k_per_step;  // values that a vector takes along k

 public:
  DotGemm(const GemmProblem& problem, const Parallel& parallel) : p_(problem), parallel_(parallel) {}

  static bool suits(const GemmProblem& p) {
    return p.m <= kDotMaxRows<P> && multiplies_as_stored(p) && !p.ends_in_gradient &&
           (p.a.col_stride == 1 || p.k <= 1) && (p.b.row_stride == 1 || p.k <= 1);
  }

  // False if the product dropped a value (product-inl.h).
  bool run() {
    if (p_.m == 0 || p_.n == 0) return true;
    for_columns(p_, W, kTaskCols, parallel_, [&](int64_t col, int64_t cols) { run_columns(col, cols); });
    const Strips<T> a{static_cast<const T*>(p_.a.data), p_.m, p_.a.row_stride, 1};
    return !dropped_.load() && !drops_any<P>(a, 0, p_.m, 0, p_.k);
  }

 private:
  static constexpr int64_t kTaskCols = 256;
  static constexpr int kMaxRows = std::min(4, W);

  void run_columns(int64_t col, int64_t cols) {
    const int64_t stride = ceil_div(cols, W) * W;
    const Scratch scratch(ScratchSlot::task_sums, static_cast<size_t>(p_.m * stride) * sizeof(C));
    C* const sums = scratch.as<C>();
    for (int64_t j = 0; j < cols; j += W)
      for (int64_t i = 0; i < p_.m;) {
        const int64_t left = p_.m - i;
        C* const block = sums + i * stride + j;
        i += left >= 3   ? dot_rows<kMaxRows>(i, col + j, block, stride)
             : left == 2 ? dot_rows<std::min(2, kMaxRows)>(i, col + j, block, stride)
                         : dot_rows<1>(i, col + j, block, stride);
      }
    finish<T>(p_.epilogue, {0, col, p_.m, cols}, sums, stride);
  }

  // The next W rows of B are fetched ahead into L2, since the hardware does not foresee them. Three tiles of rows ask
  // for the whole rows, since requests get lost where memory is busy. One or two rows have no time to ask for more
  // than a row's beginning; the hardware follows from there.
  static constexpr int64_t kFetchingRows = 12;
  static constexpr int64_t kBeginning = 4 * kLineBytes / static_cast<int64_t>(sizeof(T));
  struct Ahead {
    int64_t offset, count;  // in elements, of a row's beginning
  };
  Ahead ahead_of(int64_t row, int64_t rows, int64_t col) const {
    if (row >= kFetchingRows || col + 2 * W > p_.n) return {0, 0};
    return {W * p_.b.col_stride, rows >= 3 ? p_.k : std::min(p_.k, kBeginning)};
  }

  // Computes kRows rows × W columns, W / kRows columns at a time. That gives W sums, one in each lane after a
  // transposition. Absent rows and columns repeat the last one.
  template <int kRows>
  int64_t dot_rows(int64_t row, int64_t col, C* sums, int64_t stride) {
    constexpr int kCols = W / kRows;
    const int64_t rows = std::min<int64_t>(kRows, p_.m - row);
    const Ahead ahead = ahead_of(row, kRows, col);
    const T* a[kRows];
    for (int i = 0; i < kRows; ++i)
      a[i] = static_cast<const T*>(p_.a.data) + std::min<int64_t>(row + i, p_.m - 1) * p_.a.row_stride;
    for (int j = 0; j < W; j += kCols) {
      const T* b[kCols];
      for (int c = 0; c < kCols; ++c)
        b[c] = static_cast<const T*>(p_.b.data) + std::min(col + j + c, p_.n - 1) * p_.b.col_stride;
      C lanes[W];
      const bool first_use = row == 0;
      store(lanes, P::drops_denormals && first_use ? dot_products<kRows, kCols, true>(a, b, ahead)
                                                   : dot_products<kRows, kCols, false>(a, b, ahead));
      for (int64_t i = 0; i < rows; ++i)
        for (int c = 0; c < kCols; ++c) sums[i * stride + j + c] = lanes[i * kCols + c];
    }
    return rows;
  }

  // Rows of B that are whole pages apart share a set of L1, which has eight ways or a few more.
  static constexpr int kMaxStreams = 8;

  // A lane's chain of additions is cut after kChain steps, like a tile's.
  template <int kRows, int kCols, bool kWatches>
  FASTLANE_INLINE V dot_products(const T* const (&a)[kRows], const T* const (&b)[kCols], Ahead ahead) {
    constexpr int kStreams = std::min(kCols, kMaxStreams);
    typename P::Watch watch;
    V total = V::set(0);
    for (int64_t begin = 0; begin < p_.k; begin += kChain * kStep) {
      const int64_t end = std::min(p_.k, begin + kChain * kStep);
      V acc[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) acc[i] = V::set(0);
#pragma GCC unroll 2
      for (int first = 0; first < kCols; first += kStreams) {
        int64_t k = begin;
        const auto watched = [&](V column) {
          if (kWatches) watch.see(column);
          return column;
        };
        for (; k + kStep <= end; k += kStep) {
          if (k < ahead.count)
            for (int c = first; c < first + kStreams; ++c) __builtin_prefetch(b[c] + ahead.offset + k, 0, 2);
          accumulate<kRows, kCols, kStreams>(
              acc, first, [&](int i) { return P::units_along_k(a[i] + k); },
              [&](int c) { return watched(P::units_along_k(b[c] + k)); });
        }
        if (k < end)
          accumulate<kRows, kCols, kStreams>(
              acc, first, [&](int i) { return P::units_along_k(a[i] + k, end - k); },
              [&](int c) { return watched(P::units_along_k(b[c] + k, end - k)); });
      }
      transpose(acc);
      V sum = acc[0];
#pragma GCC unroll 16
      for (int i = 1; i < W; ++i) sum = sum + acc[i];
      total = total + sum;
    }
    if (kWatches && watch.found()) dropped_ = true;
    return total;
  }

  template <int kRows, int kCols, int kStreams, class LoadA, class LoadB>
  static FASTLANE_INLINE void accumulate(V (&acc)[W], int first, LoadA load_a, LoadB load_b) {
    V rows[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) rows[i] = load_a(i);
#pragma GCC unroll 8
    for (int c = first; c < first + kStreams; ++c) {
      const V column = load_b(c);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) acc[i * kCols + c] = P::multiply_add(rows[i], column, acc[i * kCols + c]);
    }
  }

  const GemmProblem& p_;
  Parallel parallel_;
  std::atomic<bool> dropped_{false};
};

FASTLANE_END_TARGET
