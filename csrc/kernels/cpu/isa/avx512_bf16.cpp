#if defined(__x86_64__)

#define FASTLANE_TARGET_AVX512_BF16
// GCC 12 warns of the pass-through operand that its own intrinsics leave undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/generic/gemm-inl.h"
#include "kernels/cpu/generic/layer_backward-inl.h"
#include "kernels/cpu/generic/mlp_backward-inl.h"
#include "kernels/cpu/generic/stack_backward-inl.h"
#include "kernels/cpu/generic/stack_forward-inl.h"

FASTLANE_BEGIN_TARGET

// Functions that multiply bf16 matrices are compiled here. All others call the AVX-512 set.
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

FASTLANE_END_TARGET

namespace fastlane {

const KernelTable* avx512_bf16_kernels() {
  static constexpr KernelTable table{"avx512_bf16",  gemm,         epilogue,      preactivation_grad,
                                     layer_backward, mlp_backward, stack_forward, stack_backward};
  return &table;
}

}  // namespace fastlane

#else

#include "kernels/cpu/dispatch.h"

namespace fastlane {
const KernelTable* avx512_bf16_kernels() { return nullptr; }
}  // namespace fastlane

#endif
