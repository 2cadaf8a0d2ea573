// The CPU key runs kernels of the chosen instruction set on torch's thread pool.
#include <torch/library.h>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/narrow_stack.h"
#include "kernels/cpu/schedule.h"
#include "kernels/mlp.h"
#include "ops/backend/torch_threads.h"
#include "ops/dense/backend.h"
#include "ops/register.h"

namespace fastlane {
namespace {

// Lends a kernel torch's thread pool, and tells it this machine's caches.
Parallel torch_threads() {
  Parallel parallel;
  parallel.threads = at::get_num_threads();
  parallel.caches = caches();
  parallel.run = &on_torch_threads;
  return parallel;
}

TakenPath fused_if(bool takes) { return takes ? TakenPath(Path::fused) : std::nullopt; }

TakenPath gemm(const GemmProblem& p) {
  const bool takes = p.b_panels.data || fuses_forward({p.m, p.k, p.n, p.dtype});
  if (takes) kernels().gemm(p, torch_threads());
  return fused_if(takes);
}
void epilogue(const EpilogueProblem& p) { kernels().epilogue(p, torch_threads()); }
void preactivation_grad(const PreActivationGradProblem& p) { kernels().preactivation_grad(p, torch_threads()); }

TakenPath layer_backward(const LayerBackwardProblem& p) {
  const bool takes = fuses_backward(shape_of(p));
  if (takes) fastlane::layer_backward(kernels(), p, torch_threads());
  return fused_if(takes);
}

// If the library runs a layer's backward, it runs all of its products.
TakenPath dgrad(const GemmProblem&) { return std::nullopt; }
bool takes_dgrad(const GemmProblem&) { return false; }

TakenPath mlp_forward(const MlpProblem& p) {
  const bool has_panels = p.fc1_weight.panels.data && p.fc2_weight.panels.data;
  const bool takes = has_panels || fuses_mlp_forward(fc1_shape(p), fc2_shape(p));
  if (takes) fastlane::mlp_forward(kernels(), p, torch_threads());
  return fused_if(takes);
}
TakenPath mlp_backward(const MlpBackwardProblem& p) {
  const bool takes = fuses_mlp_backward(fc1_shape(p), fc2_shape(p));
  if (takes) fastlane::mlp_backward(kernels(), p, torch_threads());
  return fused_if(takes);
}

bool is_one_kernel(const StackProblem& p) { return is_narrow(p, caches()) && fuses_stack(p); }
void stack_forward(const StackProblem& p) { kernels().stack_forward(p, torch_threads()); }
void stack_backward(const StackProblem& p) { kernels().stack_backward(p, torch_threads()); }

}  // namespace

const Backend& cpu_backend() {
  static constexpr Backend backend{
      .gemm = gemm,
      .layer_backward = layer_backward,
      .dgrad = dgrad,
      .takes_dgrad = takes_dgrad,
      .mlp_forward = mlp_forward,
      .mlp_backward = mlp_backward,
      .epilogue = epilogue,
      .preactivation_grad = preactivation_grad,
      .is_one_kernel = is_one_kernel,
      .stack_forward = stack_forward,
      .stack_backward = stack_backward,
  };
  return backend;
}

TORCH_LIBRARY_IMPL(fastlane, CPU, m) {
  register_layer_operators(m);
  register_stack_operators(m);
  register_mlp_operators(m);
}

}  // namespace fastlane
