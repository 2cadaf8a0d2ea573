// The CUDA key runs on the current stream. A product takes a Hopper kernel if one fits, otherwise the library's GEMM
// and one pass around it.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "kernels/cuda/elementwise/elementwise.h"
#include "kernels/cuda/hopper/hopper.h"
#include "ops/backend/cuda_stack.h"
#include "ops/dense/backend.h"
#include "ops/register.h"

namespace fastlane {
namespace {

// A kernel may cut fp32 operands to TF32's 10 bits only where torch may too.
bool may_be_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

at::Tensor empty_bytes(int64_t bytes) { return at::empty({bytes}, at::TensorOptions(at::kCUDA).dtype(at::kByte)); }

struct HopperChoice {
  cuda::HopperKind kind;
  cuda::HopperTile tile;
  int multiprocessors;
};

// nullopt means the library's product.
std::optional<HopperChoice> hopper_choice(const GemmProblem& p) {
  const std::optional<Path> forced = forced_path();
  if (forced == Path::library || !cuda::has_hopper_kernels()) return std::nullopt;
  const cuda::HopperKind kind = cuda::hopper_kind(p);
  if (kind == cuda::HopperKind::none || (p.dtype == DType::f32 && !may_be_tf32())) return std::nullopt;
  const cuda::Gpu gpu = cuda::current_gpu();
  const bool takes = forced ? cuda::runs_hopper_kernels(gpu) : cuda::is_worth_a_hopper_kernel(p, gpu);
  if (!takes) return std::nullopt;
  return HopperChoice{kind, cuda::hopper_tile(p, kind, gpu, forced_hopper_tile_cols()), gpu.multiprocessors};
}

bool takes_dgrad(const GemmProblem& p) { return hopper_choice(p).has_value(); }

TakenPath gemm(const GemmProblem& p) {
  const std::optional<HopperChoice> choice = hopper_choice(p);
  if (!choice) return std::nullopt;
  const int64_t bytes = cuda::hopper_workspace(p, choice->tile);
  const at::Tensor workspace = bytes > 0 ? empty_bytes(bytes) : at::Tensor();
  void* const sums = workspace.defined() ? workspace.mutable_data_ptr() : nullptr;
  const bool ran = cuda::hopper_gemm(p, choice->kind, choice->tile, choice->multiprocessors, sums,
                                     c10::cuda::getCurrentCUDAStream());
  return ran ? TakenPath(Path::hopper) : std::nullopt;
}

TakenPath forward(const GemmProblem& p) {
  const TakenPath taken = gemm(p);
  TORCH_CHECK_NOT_IMPLEMENTED(taken || forced_path() != Path::fused,
                              "FASTLANE_PATH=fused: got a CUDA product that no fused kernel takes",
                              cuda::has_hopper_kernels() ? "" : " in this build (build_info()['hopper_reason'])",
                              ", expected 16-bit or TF32 operands on a GPU of capability 9.0, in rows aligned to 16 "
                              "bytes; unset it or use library");
  return taken;
}

// CUDA has no kernel for a whole backward or a whole MLP: its products are separate kernels.
TakenPath layer_backward(const LayerBackwardProblem&) { return std::nullopt; }
TakenPath mlp_forward(const MlpProblem&) { return std::nullopt; }
TakenPath mlp_backward(const MlpBackwardProblem&) { return std::nullopt; }

void epilogue(const EpilogueProblem& p) { cuda::epilogue(p, c10::cuda::getCurrentCUDAStream()); }

void preactivation_grad(const PreActivationGradProblem& p) {
  const at::Tensor workspace = empty_bytes(static_cast<int64_t>(cuda::preactivation_grad_workspace(p)));
  cuda::preactivation_grad(p, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
}

}  // namespace

const Backend& cuda_backend() {
  static constexpr Backend backend{
      .gemm = forward,
      .layer_backward = layer_backward,
      .dgrad = gemm,
      .takes_dgrad = takes_dgrad,
      .mlp_forward = mlp_forward,
      .mlp_backward = mlp_backward,
      .epilogue = epilogue,
      .preactivation_grad = preactivation_grad,
      .is_one_kernel = cuda_is_one_kernel,
      .stack_forward = cuda_stack_forward,
      .stack_backward = cuda_stack_backward,
  };
  return backend;
}

TORCH_LIBRARY_IMPL(fastlane, CUDA, m) {
  register_layer_operators(m);
  register_stack_operators(m);
  register_mlp_operators(m);
}

}  // namespace fastlane
