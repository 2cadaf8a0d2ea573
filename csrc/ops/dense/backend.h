// What the operators need of a kind of device. The problems carry pointers into the memory of the current one.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/path.h"

namespace fastlane {

struct Backend {
  // These run their problem and say by which path, or do nothing and return Path::library: then the library's product
  // and the passes around it shall run. `dgrad` is asked where the library has the backward.
  Path (*gemm)(const GemmProblem&);
  Path (*layer_backward)(const LayerBackwardProblem&);
  Path (*dgrad)(const GemmProblem&);
  // Whether `dgrad` would run it: to be asked before memory is allocated for a result.
  bool (*takes_dgrad)(const GemmProblem&);
  // Where the library has any of an MLP's products it has all of them, layer by layer.
  Path (*mlp_forward)(const MlpProblem&);
  Path (*mlp_backward)(const MlpBackwardProblem&);
  // The passes around the library's products. The product may lie in z or out.
  void (*epilogue)(const GemmProblem&, const ConstRowMajor& product);
  void (*preactivation_grad)(const PreActivationGradProblem&);
  // A narrow stack as one kernel. Backward must find what forward found: decided by what no one changes in between.
  bool (*is_one_kernel)(const StackProblem&);
  void (*stack_forward)(const StackProblem&);
  void (*stack_backward)(const StackProblem&);
  // `stats()` counts the library's product and the passes around it under this path.
  Path in_passes = Path::library;

  Path counted(Path path) const { return path == Path::library ? in_passes : path; }
};

const Backend& cpu_backend();
const Backend& cuda_backend();
// The backend of a CPU without vector kernels: torch's own operators are its passes.
const Backend& torch_backend();

inline const Backend& backend_of(const at::Tensor& t) {
  if (!t.is_cpu()) return cuda_backend();
  return torch_runs_on_cpu() ? torch_backend() : cpu_backend();
}

}  // namespace fastlane
