#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstdint>
#include <type_traits>

#include "../gelu.h"
#include "../mlp.h"
#include "../stack_reads.h"
#include "dispatch.h"
#include "half.h"
#include "scratch.h"

namespace fastlane {
namespace {
#include "vec_scalar.h"
#include "kernels.inc"
#include "entry.inc"
}  // namespace

const KernelTable* scalar_kernels() {
  static constexpr KernelTable table{"scalar",       gemm,         epilogue,      preactivation_grad,
                                     layer_backward, mlp_backward, stack_forward, stack_backward};
  return &table;
}

}  // namespace fastlane
