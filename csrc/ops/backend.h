// What the operators need of a kind of device. The problems carry pointers into the memory of the current one.
#pragma once

#include <ATen/core/Tensor.h>

#include "../kernels/problem.h"
#include "path.h"

namespace fastlane {

struct Backend {
  Path (*forward_path)(const LayerShape&);
  Path (*backward_path)(const LayerShape&);
  // The fused path.
  void (*gemm)(const GemmProblem&);
  void (*layer_backward)(const LayerBackwardProblem&);
  // The passes around the library's products. The product may lie in z or out.
  void (*epilogue)(const GemmProblem&, const ConstRowMajor& product);
  void (*preactivation_grad)(const PreActivationGradProblem&);
  // A narrow stack as one kernel.
  bool (*is_narrow)(const StackProblem&);
  void (*stack_forward)(const StackProblem&);
  void (*stack_backward)(const StackProblem&);
};

const Backend& cpu_backend();
const Backend& cuda_backend();

inline const Backend& backend_of(const at::Tensor& t) { return t.is_cpu() ? cpu_backend() : cuda_backend(); }

}  // namespace fastlane
