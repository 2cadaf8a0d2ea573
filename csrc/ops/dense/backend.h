// The operators' needs of a kind of device. A problem's pointers lead into the memory of the current device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "ops/path.h"

namespace fastlane {

// The path of a problem that a backend ran. Nothing if the backend did nothing: then the caller runs the library's
// product and the passes around it.
using TakenPath = std::optional<Path>;

struct Backend {
  // `dgrad` is called for a backward that layer_backward did not take.
  TakenPath (*gemm)(const GemmProblem&);
  TakenPath (*layer_backward)(const LayerBackwardProblem&);
  TakenPath (*dgrad)(const GemmProblem&);
  // Whether `dgrad` would run the problem. A caller asks this before it allocates memory for a result.
  bool (*takes_dgrad)(const GemmProblem&);
  // If the library runs one of an MLP's products, it runs all of them, layer by layer.
  TakenPath (*mlp_forward)(const MlpProblem&);
  TakenPath (*mlp_backward)(const MlpBackwardProblem&);
  // The passes around the library's products.
  void (*epilogue)(const EpilogueProblem&);
  void (*preactivation_grad)(const PreActivationGradProblem&);
  // A narrow stack as one kernel. Forward and backward both ask `is_one_kernel` and must get the same answer: it may
  // depend on nothing that can change between them.
  bool (*is_one_kernel)(const StackProblem&);
  void (*stack_forward)(const StackProblem&);
  void (*stack_backward)(const StackProblem&);
  // `stats()` counts a call of the library's product and the passes around it under this path.
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
