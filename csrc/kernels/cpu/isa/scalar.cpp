#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/generic/entry-inl.h"

namespace fastlane {

const KernelTable* scalar_kernels() {
  static constexpr KernelTable table{"scalar",       gemm,         epilogue,      preactivation_grad,
                                     layer_backward, mlp_backward, stack_forward, stack_backward};
  return &table;
}

}  // namespace fastlane
