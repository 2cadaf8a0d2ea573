// Everything that may use the wider registers lies between push and pop and in an anonymous namespace: no inline
// function of this file can be picked by the linker for code that runs on an older CPU.
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

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace fastlane {
namespace {
#include "vec_avx2.h"
#include "kernels.inc"
#include "entry.inc"
}  // namespace
}  // namespace fastlane

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fastlane {

const KernelTable* avx2_kernels() {
  static constexpr KernelTable table{"avx2",         gemm,         epilogue,      preactivation_grad,
                                     layer_backward, mlp_backward, stack_forward, stack_backward};
  return &table;
}

}  // namespace fastlane

#else

namespace fastlane {
const KernelTable* avx2_kernels() { return nullptr; }
}  // namespace fastlane

#endif
