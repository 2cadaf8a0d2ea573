#include "kernels/cuda/elementwise/epilogue.cuh"

#include "kernels/cuda/elementwise/elementwise.h"
#include "kernels/cuda/common/launch.cuh"

namespace fastlane::cuda {

void epilogue(const GemmProblem& problem, const ConstRowMajor& product, Stream stream) {
  if (problem.m == 0 || problem.n == 0) return;
  const int64_t access = access_elements(problem.n, problem.dtype, product, problem.addend, problem.z, problem.out);
  const Geometry g = elementwise_geometry(problem.m, problem.n, access, kRowsAtOnce);
  with_types(problem.dtype, access, problem.activation, [&](auto stored, auto activation) {
    using T = typename decltype(stored)::type;
    const EpilogueOperands<T> operands{problem.m,
                                       problem.n,
                                       static_cast<const T*>(product.data),
                                       static_cast<const T*>(problem.bias),
                                       static_cast<const T*>(problem.addend.data),
                                       static_cast<T*>(problem.z.data),
                                       static_cast<T*>(problem.out.data),
                                       product.row_stride,
                                       problem.addend.row_stride,
                                       problem.z.row_stride,
                                       problem.out.row_stride};
    const dim3 grid(static_cast<unsigned>(g.grid_cols), static_cast<unsigned>(g.grid_rows));
    const dim3 block(g.block_cols, g.block_rows);
    epilogue_kernel<T, decltype(activation), decltype(stored)::access><<<grid, block, 0, stream>>>(operands);
    FASTLANE_CHECK_LAUNCH("epilogue");
  });
}

}  // namespace fastlane::cuda
