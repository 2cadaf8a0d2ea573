// The CUDA key of a build without CUDA kernels. A CUDA tensor raises one sentence that says how to get the kernels.
#include <torch/library.h>

#include "ops/dense/backend.h"

namespace fastlane {
namespace {

void raise_no_cuda(const c10::OperatorHandle& op, c10::Stack*) {
  C10_THROW_ERROR(NotImplementedError,
                  op.schema().name() + ": got a CUDA tensor, but this build of fastlane_ext has CPU kernels only (" +
                      FASTLANE_CUDA_REASON +
                      "); move the tensors to the CPU, or rebuild with: "
                      "FASTLANE_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .");
}

}  // namespace

const Backend& cuda_backend() { TORCH_INTERNAL_ASSERT(false, "no CUDA kernels in this build"); }

TORCH_LIBRARY_IMPL(fastlane, CUDA, m) {
  for (const char* op :
       {"linear_gelu_residual", "linear_gelu_concat", "linear_gelu_forward", "linear_gelu_backward", "residual_stack",
        "residual_stack_forward", "residual_stack_backward", "mlp_residual", "mlp_forward", "mlp_backward"})
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&raise_no_cuda>());
}

}  // namespace fastlane
