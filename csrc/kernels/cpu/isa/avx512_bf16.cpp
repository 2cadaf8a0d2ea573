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
#define FASTLANE_DEFINE_PRODUCT(name, ...)                                             \
  constexpr Kernel<__VA_ARGS__> name = [](const auto& problem, const auto&... more) {  \
    if (problem.dtype != DType::bf16) return avx512_kernels()->name(problem, more...); \
    return run_##name<BFloat16>(problem, more...);                                     \
  };
#define FASTLANE_DEFINE_PASS(name, ...) \
  constexpr Kernel<__VA_ARGS__> name = [](const auto&... arguments) { avx512_kernels()->name(arguments...); };
FASTLANE_PRODUCTS(FASTLANE_DEFINE_PRODUCT)
FASTLANE_PASSES(FASTLANE_DEFINE_PASS)
#undef FASTLANE_DEFINE_PRODUCT
#undef FASTLANE_DEFINE_PASS

FASTLANE_END_TARGET

namespace fastlane {

const KernelTable* avx512_bf16_kernels() {
  static constexpr KernelTable table = FASTLANE_KERNEL_TABLE("avx512_bf16");
  return &table;
}

}  // namespace fastlane

#else

#include "kernels/cpu/dispatch.h"

namespace fastlane {
const KernelTable* avx512_bf16_kernels() { return nullptr; }
}  // namespace fastlane

#endif
