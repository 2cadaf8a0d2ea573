#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/generic/entry-inl.h"

namespace fastlane {

const KernelTable* scalar_kernels() {
  static constexpr KernelTable table = FASTLANE_KERNEL_TABLE("scalar");
  return &table;
}

}  // namespace fastlane
