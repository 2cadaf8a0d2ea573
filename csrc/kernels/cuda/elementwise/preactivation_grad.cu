#include "kernels/cuda/elementwise/preactivation_grad.cuh"

#include "kernels/cuda/elementwise/elementwise.h"
#include "kernels/cuda/common/launch.cuh"

namespace fastlane::cuda {
namespace {

int64_t grad_access(const PreActivationGradProblem& p) { return access_elements(p.cols, p.dtype, p.dy, p.z, p.dz); }

}  // namespace

size_t preactivation_grad_workspace(const PreActivationGradProblem& p) {
  if (!p.db || p.cols == 0) return 0;
  const int64_t sum_size = p.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return static_cast<size_t>(column_sum_geometry(p.rows, p.cols, grad_access(p)).chunks * p.cols * sum_size);
}

void preactivation_grad(const PreActivationGradProblem& problem, void* workspace, Stream stream) {
  if (problem.cols == 0) return;
  const int64_t access = grad_access(problem);
  const ColumnSumGeometry g = column_sum_geometry(problem.rows, problem.cols, access);
  with_types(problem.dtype, access, problem.activation, [&](auto stored, auto activation) {
    using T = typename decltype(stored)::type;
    using R = compute_t<T>;
    constexpr int N = decltype(stored)::access;
    R* const partial_db = problem.db ? static_cast<R*>(workspace) : nullptr;
    if (problem.rows > 0) {
      const GradOperands<T> operands{problem.rows,
                                     problem.cols,
                                     g.chunk_rows,
                                     g.chunks,
                                     static_cast<const T*>(problem.dy.data),
                                     static_cast<const T*>(problem.z.data),
                                     static_cast<T*>(problem.dz.data),
                                     partial_db,
                                     problem.dy.row_stride,
                                     problem.z.row_stride,
                                     problem.dz.row_stride};
      const dim3 grid(static_cast<unsigned>(g.grid_cols), static_cast<unsigned>(g.grid_rows));
      const dim3 block(g.block_cols, g.block_rows);
      preactivation_grad_kernel<T, decltype(activation), N><<<grid, block, 0, stream>>>(operands);
      FASTLANE_CHECK_LAUNCH("preactivation_grad");
    }
  });
  if (problem.db) sum_rows({workspace, problem.cols}, g.chunks, problem.cols, problem.dtype, problem.db, stream);
}

void sum_rows(const ConstRowMajor& partial, int64_t rows, int64_t cols, DType dtype, void* sums, Stream stream) {
  const auto blocks = static_cast<unsigned>(std::min(kMaxGridCols, ceil_div(cols, kSumCols)));
  with_types(dtype, /*access=*/1, Activation::none, [&](auto stored, auto) {
    using T = typename decltype(stored)::type;
    sum_rows_kernel<T><<<blocks, dim3(kSumCols, kSumRows), 0, stream>>>(
        static_cast<const compute_t<T>*>(partial.data), rows, cols, partial.row_stride, static_cast<T*>(sums));
    FASTLANE_CHECK_LAUNCH("sum_rows");
  });
}

}  // namespace fastlane::cuda
