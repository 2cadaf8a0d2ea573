#include "kernels/cuda/elementwise/epilogue.cuh"

#include "kernels/cuda/elementwise/elementwise.h"
#include "kernels/cuda/common/launch.cuh"

namespace fastlane::cuda {

void epilogue(const EpilogueProblem& problem, Stream stream) {
  if (problem.m == 0 || problem.n == 0) return;
  const ConstRowMajor& product = problem.product;
  const Epilogue& e = problem.epilogue;
  const int64_t access = access_elements(problem.n, problem.dtype, product, e.addend, e.z, e.out);
  const Geometry g = elementwise_geometry(problem.m, problem.n, access, kRowsAtOnce);
  with_types(problem.dtype, access, e.activation, [&](auto stored, auto activation) {
    using T = typename decltype(stored)::type;
    const EpilogueOperands<T> operands{problem.m,
                                       problem.n,
                                       static_cast<const T*>(product.data),
                                       static_cast<const T*>(e.bias),
                                       static_cast<const T*>(e.addend.data),
                                       static_cast<T*>(e.z.data),
                                       static_cast<T*>(e.out.data),
                                       product.row_stride,
                                       e.addend.row_stride,
                                       e.z.row_stride,
                                       e.out.row_stride};
    const dim3 grid(static_cast<unsigned>(g.grid_cols), static_cast<unsigned>(g.grid_rows));
    const dim3 block(g.block_cols, g.block_rows);
    epilogue_kernel<T, decltype(activation), decltype(stored)::access><<<grid, block, 0, stream>>>(operands);
    FASTLANE_CHECK_LAUNCH("epilogue");
  });
}

}  // namespace fastlane::cuda
