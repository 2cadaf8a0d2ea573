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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")
#endif

namespace fastlane {
namespace {
#include "vec_avx512.h"
#include "vec_avx512_bf16.h"
#include "kernels.inc"

// Everything but products of bf16 matrices is AVX-512's.
void gemm(const GemmProblem& p, const Parallel& parallel) {
  if (p.dtype != DType::bf16) return avx512_kernels()->gemm(p, parallel);
  run_gemm<BFloat16>(p, parallel);
}

void epilogue(const GemmProblem& p, const ConstRowMajor& product, const Parallel& parallel) {
  avx512_kernels()->epilogue(p, product, parallel);
}

void preactivation_grad(const PreActivationGradProblem& p, const Parallel& parallel) {
  avx512_kernels()->preactivation_grad(p, parallel);
}

bool layer_backward(const LayerBackwardProblem& p, const Parallel& parallel) {
  return p.dtype == DType::bf16 ? run_layer_backward<BFloat16>(p, parallel)
                                : avx512_kernels()->layer_backward(p, parallel);
}

bool mlp_backward(const MlpBackwardProblem& p, const Parallel& parallel) {
  return p.dtype == DType::bf16 ? run_mlp_backward<BFloat16>(p, parallel)
                                : avx512_kernels()->mlp_backward(p, parallel);
}

void stack_forward(const StackProblem& p, const Parallel& parallel) {
  if (p.dtype != DType::bf16) return avx512_kernels()->stack_forward(p, parallel);
  run_stack_forward<BFloat16>(p, parallel);
}

void stack_backward(const StackProblem& p, const Parallel& parallel) {
  if (p.dtype != DType::bf16) return avx512_kernels()->stack_backward(p, parallel);
  run_stack_backward<BFloat16>(p, parallel);
}
}  // namespace
}  // namespace fastlane

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fastlane {

const KernelTable* avx512_bf16_kernels() {
  static constexpr KernelTable table{"avx512_bf16",  gemm,         epilogue,      preactivation_grad,
                                     layer_backward, mlp_backward, stack_forward, stack_backward};
  return &table;
}

}  // namespace fastlane

#else

namespace fastlane {
const KernelTable* avx512_bf16_kernels() { return nullptr; }
}  // namespace fastlane

#endif
