// A kernel set's table: from the problem's dtype to the template.
#pragma once

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/generic/epilogue-inl.h"
#include "kernels/cpu/generic/gemm-inl.h"
#include "kernels/cpu/generic/layer_backward-inl.h"
#include "kernels/cpu/generic/mlp_backward-inl.h"
#include "kernels/cpu/generic/preactivation_grad-inl.h"
#include "kernels/cpu/generic/stack_backward-inl.h"
#include "kernels/cpu/generic/stack_forward-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/parallel.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

// f of a value of the type that `dtype` names.
template <class F>
auto with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::bf16: return f(BFloat16{});
    case DType::f16: return f(Half{});
    case DType::f32: break;
  }
  return f(float{});
}

#define FASTLANE_DEFINE_KERNEL(name, ...)                                                                        \
  constexpr Kernel<__VA_ARGS__> name = [](const auto& problem, const auto&... more) {                            \
    return with_dtype(problem.dtype, [&](auto value) { return run_##name<decltype(value)>(problem, more...); }); \
  };
FASTLANE_KERNELS(FASTLANE_DEFINE_KERNEL)
#undef FASTLANE_DEFINE_KERNEL

FASTLANE_END_TARGET
