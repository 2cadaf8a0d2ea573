#if defined(__x86_64__)

#define FASTLANE_TARGET_AVX512
// GCC 12 warns of the pass-through operand that its own intrinsics leave undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/generic/entry-inl.h"

namespace fastlane {

const KernelTable* avx512_kernels() {
  static constexpr KernelTable table = FASTLANE_KERNEL_TABLE("avx512");
  return &table;
}

}  // namespace fastlane

#else

#include "kernels/cpu/dispatch.h"

namespace fastlane {
const KernelTable* avx512_kernels() { return nullptr; }
}  // namespace fastlane

#endif
