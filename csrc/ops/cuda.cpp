// The CUDA key: the library's GEMM and one pass around it, on the current stream.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../kernels/cuda/elementwise.h"
#include "backend.h"
#include "register.h"

namespace fastlane {
namespace {

Path library_path(const LayerShape&) {
  TORCH_CHECK_NOT_IMPLEMENTED(forced_path() != Path::fused,
                              "FASTLANE_PATH=fused: got CUDA tensors, for which there is no fused product yet; unset "
                              "it or use library");
  return Path::library;
}

void epilogue(const GemmProblem& p, const ConstRowMajor& product) {
  cuda::epilogue(p, product, c10::cuda::getCurrentCUDAStream());
}

void preactivation_grad(const PreActivationGradProblem& p) {
  const auto bytes = static_cast<int64_t>(cuda::preactivation_grad_workspace(p));
  const at::Tensor workspace = at::empty({bytes}, at::TensorOptions(at::kCUDA).dtype(at::kByte));
  cuda::preactivation_grad(p, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
}

bool never(const StackProblem&) { return false; }

}  // namespace

const Backend& cuda_backend() {
  static constexpr Backend backend{library_path,       library_path, nullptr, nullptr, epilogue,
                                   preactivation_grad, never,        nullptr, nullptr};
  return backend;
}

TORCH_LIBRARY_IMPL(fastlane, CUDA, m) {
  register_layer_operators(m);
  register_stack_operators(m);
}

}  // namespace fastlane
