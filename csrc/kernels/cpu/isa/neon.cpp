#if defined(__aarch64__)

#define FASTLANE_TARGET_NEON
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/generic/entry-inl.h"

namespace fastlane {

const KernelTable* neon_kernels() {
  static constexpr KernelTable table = FASTLANE_KERNEL_TABLE("neon");
  return &table;
}

}  // namespace fastlane

#else

#include "kernels/cpu/dispatch.h"

namespace fastlane {
const KernelTable* neon_kernels() { return nullptr; }
}  // namespace fastlane

#endif
