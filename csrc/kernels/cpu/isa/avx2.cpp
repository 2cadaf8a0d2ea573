#if defined(__x86_64__)

#define FASTLANE_TARGET_AVX2
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/generic/entry-inl.h"

namespace fastlane {

const KernelTable* avx2_kernels() {
  static constexpr KernelTable table{"avx2",         gemm,         epilogue,      preactivation_grad,
                                     layer_backward, mlp_backward, stack_forward, stack_backward};
  return &table;
}

}  // namespace fastlane

#else

#include "kernels/cpu/dispatch.h"

namespace fastlane {
const KernelTable* avx2_kernels() { return nullptr; }
}  // namespace fastlane

#endif
