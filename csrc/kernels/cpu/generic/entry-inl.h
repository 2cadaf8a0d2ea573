// The kernel table's functions: from the problem's dtype to the template.
#pragma once

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

void gemm(const GemmProblem& p, const Parallel& parallel) {
  switch (p.dtype) {
    case DType::f32: return run_gemm<float>(p, parallel);
    case DType::f64: return run_gemm<double>(p, parallel);
    case DType::bf16: return run_gemm<BFloat16>(p, parallel);
    case DType::f16: return run_gemm<Half>(p, parallel);
  }
}

void epilogue(const GemmProblem& p, const ConstRowMajor& product, const Parallel& parallel) {
  switch (p.dtype) {
    case DType::f32: return run_epilogue<float>(p, product, parallel);
    case DType::f64: return run_epilogue<double>(p, product, parallel);
    case DType::bf16: return run_epilogue<BFloat16>(p, product, parallel);
    case DType::f16: return run_epilogue<Half>(p, product, parallel);
  }
}

void preactivation_grad(const PreActivationGradProblem& p, const Parallel& parallel) {
  switch (p.dtype) {
    case DType::f32: return run_preactivation_grad<float>(p, parallel);
    case DType::f64: return run_preactivation_grad<double>(p, parallel);
    case DType::bf16: return run_preactivation_grad<BFloat16>(p, parallel);
    case DType::f16: return run_preactivation_grad<Half>(p, parallel);
  }
}

bool layer_backward(const LayerBackwardProblem& p, const Parallel& parallel) {
  switch (p.dtype) {
    case DType::f32: return run_layer_backward<float>(p, parallel);
    case DType::f64: return run_layer_backward<double>(p, parallel);
    case DType::bf16: return run_layer_backward<BFloat16>(p, parallel);
    case DType::f16: return run_layer_backward<Half>(p, parallel);
  }
  return false;
}

bool mlp_backward(const MlpBackwardProblem& p, const Parallel& parallel) {
  switch (p.dtype) {
    case DType::f32: return run_mlp_backward<float>(p, parallel);
    case DType::f64: return run_mlp_backward<double>(p, parallel);
    case DType::bf16: return run_mlp_backward<BFloat16>(p, parallel);
    case DType::f16: return run_mlp_backward<Half>(p, parallel);
  }
  return false;
}

void stack_forward(const StackProblem& p, const Parallel& parallel) {
  switch (p.dtype) {
    case DType::f32: return run_stack_forward<float>(p, parallel);
    case DType::f64: return run_stack_forward<double>(p, parallel);
    case DType::bf16: return run_stack_forward<BFloat16>(p, parallel);
    case DType::f16: return run_stack_forward<Half>(p, parallel);
  }
}

void stack_backward(const StackProblem& p, const Parallel& parallel) {
  switch (p.dtype) {
    case DType::f32: return run_stack_backward<float>(p, parallel);
    case DType::f64: return run_stack_backward<double>(p, parallel);
    case DType::bf16: return run_stack_backward<BFloat16>(p, parallel);
    case DType::f16: return run_stack_backward<Half>(p, parallel);
  }
}

FASTLANE_END_TARGET
