// Sums of a matrix's columns. Each short run of rows is summed in the compute type, and the runs are added in double;
// what these additions lose is summed too. The problem alone decides which rows are a run, so that the bits do not
// depend on the threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/parallel.h"

FASTLANE_BEGIN_TARGET

// A chunk's column sums: `cols` sums, then what each sum lost by rounding.
inline int64_t column_sums_size(int64_t cols) { return 2 * cols; }

// Knuth's TwoSum: fp64 has no wider type to add in.
inline void add_column(double term, double& sum, double& lost) {
  const double total = sum + term, added = total - sum;
  lost += (sum - (total - added)) + (term - added);
  sum = total;
}

// Stores db from the chunks' sums, which lie `chunk_stride` apart.
template <class T>
void store_column_sums(const double* sums, int64_t chunks, int64_t chunk_stride, int64_t cols, T* db) {
  using V = typename VecOf<compute_t<T>>::type;
  for (int64_t col = 0; col < cols; col += V::width) {
    const int64_t count = std::min<int64_t>(V::width, cols - col);
    compute_t<T> lanes[V::width] = {};
    for (int64_t j = 0; j < count; ++j) {
      double total = 0, lost = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const double* const own = sums + chunk * chunk_stride + col + j;
        add_column(own[0], total, lost);
        lost += own[cols];
      }
      // If the sum is infinite, `lost` is NaN.
      lanes[j] = static_cast<compute_t<T>>(std::isfinite(total) ? total + lost : total);
    }
    store_first(db + col, load(lanes), count);
  }
}

// The same from the sums of `runs` runs of rows. Each run has n sums, and the runs lie one after the other.
template <class T>
void store_run_sums(const compute_t<T>* run_sums, int64_t runs, int64_t n, T* column_sums, Parallel parallel) {
  constexpr int64_t kStrip = 256;
  if (runs * n < kSerialElements) parallel.threads = 1;
  parallel.for_each(ceil_div(n, kStrip), [&](int64_t strip) {
    const int64_t col = strip * kStrip, cols = std::min(kStrip, n - col);
    double sums[2 * kStrip] = {};
    for (int64_t run = 0; run < runs; ++run)
      for (int64_t j = 0; j < cols; ++j) add_column(run_sums[run * n + col + j], sums[j], sums[cols + j]);
    store_column_sums(sums, 1, column_sums_size(cols), cols, column_sums + col);
  });
}

FASTLANE_END_TARGET
