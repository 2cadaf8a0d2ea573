// dz = dy ⊙ act′(z), with the column sums of dz taken from registers in the same pass.
//
// Rows are cut into chunks of a fixed size, whatever the number of threads. Within a chunk a short run of rows is
// summed in the compute type, then added to the chunk's sum in double. Chunks are added in their order. What the
// additions in double lose is summed too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cpu/generic/activation-inl.h"
#include "kernels/cpu/generic/column_sums-inl.h"
#include "kernels/cpu/generic/pack-inl.h"
#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

constexpr int64_t kChunkRows = 128;
// fp64 has no wider type in which to sum exactly, so fewer fp64 rows are summed without keeping what is lost.
template <class C>
constexpr int64_t kRunRows = std::is_same_v<C, double> ? 4 : 16;
constexpr int64_t kStripCols = 256;

// Z is the type in which z is stored. With GivenSlope the operand z holds act′(z) instead, stored as Z.
template <class T, class Act, class Z = T>
class PreActivationGrad {
  using C = compute_t<T>;
  using V = typename VecOf<C>::type;

 public:
  explicit PreActivationGrad(const PreActivationGradProblem& problem) : p_(problem) {}

  // Adds the rows' column sums to `sums`.
  __attribute__((noinline)) void compute_rows(int64_t row_begin, int64_t row_end, double* sums) const {
    for (int64_t col = 0; col < p_.cols; col += kStripCols)
      run_strip(row_begin, row_end, col, std::min(kStripCols, p_.cols - col), sums ? sums + col : nullptr);
  }

 private:
  void run_strip(int64_t row_begin, int64_t row_end, int64_t col, int64_t cols, double* sums) const {
    C run_sums[kStripCols + V::width];
    for (int64_t run = row_begin; run < row_end; run += kRunRows<C>) {
      std::fill(run_sums, run_sums + kStripCols + V::width, C(0));
      for (int64_t row = run; row < std::min(row_end, run + kRunRows<C>); ++row)
        run_row(row, col, cols, sums ? run_sums : nullptr);
      if (sums)
        for (int64_t j = 0; j < cols; ++j) add_column(run_sums[j], sums[j], sums[p_.cols + j]);
    }
  }

  void run_row(int64_t row, int64_t col, int64_t cols, C* run_sums) const {
    const T* dy = element<const T>(p_.dy, row, col);
    const Z* z = element<const Z>(p_.z, row, col);
    T* dz = element<T>(p_.dz, row, col);
    for (int64_t j = 0; j < cols; j += V::width) {
      const int64_t count = std::min<int64_t>(V::width, cols - j);
      V grad = load_first(dy + j, count);
      if constexpr (!std::is_same_v<Act, NoActivation>) grad = grad * Act::derivative(load_first(z + j, count));
      if (dz) store_first(dz + j, grad, count);
      if (run_sums) store(run_sums + j, load(run_sums + j) + grad);
    }
  }

  const PreActivationGradProblem& p_;
};

// dz of the rows [row_begin, row_end), whose column sums are added to `sums`, if given.
template <class T>
void form_preactivation_grad(const PreActivationGradProblem& p, int64_t row_begin, int64_t row_end, double* sums) {
  with_activation<T>(
      p.activation, [&](auto act) { PreActivationGrad<T, decltype(act)>(p).compute_rows(row_begin, row_end, sums); });
}

template <class T>
void run_preactivation_grad(const PreActivationGradProblem& p, Parallel parallel) {
  if (p.rows * p.cols < kSerialElements) parallel.threads = 1;
  const int64_t chunks = ceil_div(p.rows, kChunkRows), chunk_sums = column_sums_size(p.cols);
  const Scratch column_sums(ScratchSlot::column_sums, bytes_of<double>(p.db ? chunks * chunk_sums : 0));
  double* const sums = p.db ? column_sums.as<double>() : nullptr;
  parallel.for_each(chunks, [&](int64_t chunk) {
    double* const own = sums ? sums + chunk * chunk_sums : nullptr;
    if (own) std::fill_n(own, chunk_sums, 0.0);
    form_preactivation_grad<T>(p, chunk * kChunkRows, std::min(p.rows, (chunk + 1) * kChunkRows), own);
  });
  if (p.db) store_column_sums(sums, chunks, chunk_sums, p.cols, static_cast<T*>(p.db));
}

FASTLANE_END_TARGET
