#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../gelu.h"
#include "dispatch.h"
#include "half.h"
#include "scratch.h"

namespace fastlane {
namespace {
#include "vec_scalar.h"
#include "kernels.inc"
}  // namespace

const KernelTable* scalar_kernels() {
  static constexpr KernelTable table{"scalar", gemm, preactivation_grad};
  return &table;
}

}  // namespace fastlane
