#if defined(__x86_64__)

#define FASTLANE_TARGET_AVX2
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/generic/entry-inl.h"

namespace fastlane {

const KernelTable* avx2_kernels() {
  static constexpr KernelTable table = FASTLANE_KERNEL_TABLE("avx2");
  return &table;
}

}  // namespace fastlane

#else

#include "kernels/cpu/dispatch.h"

namespace fastlane {
const KernelTable* avx2_kernels() { return nullptr; }
}  // namespace fastlane

#endif
