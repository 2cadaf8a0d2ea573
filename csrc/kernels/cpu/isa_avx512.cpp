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

// GCC 12 takes the deliberately undefined pass-through operand of its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

namespace fastlane {
namespace {
#include "vec_avx512.h"
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

const KernelTable* avx512_kernels() {
  static constexpr KernelTable table{"avx512",       gemm,         epilogue,      preactivation_grad,
                                     layer_backward, mlp_backward, stack_forward, stack_backward};
  return &table;
}

}  // namespace fastlane

#else

namespace fastlane {
const KernelTable* avx512_kernels() { return nullptr; }
}  // namespace fastlane

#endif
