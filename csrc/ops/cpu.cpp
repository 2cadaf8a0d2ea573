// The CPU key: kernels of the chosen instruction set, on torch's thread pool.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../kernels/cpu/dispatch.h"
#include "../kernels/cpu/scratch.h"
#include "../kernels/stack.h"
#include "backend.h"
#include "register.h"

namespace fastlane {
namespace {

// torch's thread pool and this machine's caches, lent to a kernel.
Parallel torch_threads() {
  Parallel parallel;
  parallel.threads = at::get_num_threads();
  parallel.caches = caches();
  parallel.run = [](int64_t tasks, Parallel::Body body, void* context) {
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return parallel;
}

void gemm(const GemmProblem& p) { kernels().gemm(p, torch_threads()); }
void epilogue(const GemmProblem& p, const ConstRowMajor& product) { kernels().epilogue(p, product, torch_threads()); }
void preactivation_grad(const PreActivationGradProblem& p) { kernels().preactivation_grad(p, torch_threads()); }

// Two products after the elementwise pass, with dz in kept work memory: the page faults of a fresh tensor would cost
// as much as the pass itself.
void layer_backward_in_passes(const LayerBackwardProblem& b) {
  const Scratch memory(ScratchSlot::dz,
                       static_cast<size_t>(forms_dz(b) ? b.rows * b.out_features * element_size(b.dtype) : 0));
  const ConstRowMajor dz = run_preactivation_grad(b, memory.as<void>(), preactivation_grad);
  const LayerShape shape{b.rows, b.in_features, b.out_features, b.dtype};
  const ConstMatrix dz_matrix{dz.data, dz.row_stride, 1};
  if (b.dx.data) gemm(dgrad_gemm(shape, dz_matrix, b.weight, b.shortcut_grad, b.dx));
  if (b.dweight.data) gemm(wgrad_gemm(shape, dz_matrix, b.x, b.dweight_transposed, b.dweight));
}
void layer_backward(const LayerBackwardProblem& b) {
  if (!kernels().layer_backward(b, torch_threads())) layer_backward_in_passes(b);
}

bool is_narrow_here(const StackProblem& p) { return is_narrow(p, caches()); }
void stack_forward(const StackProblem& p) { kernels().stack_forward(p, torch_threads()); }
void stack_backward(const StackProblem& p) { kernels().stack_backward(p, torch_threads()); }

}  // namespace

const Backend& cpu_backend() {
  static constexpr Backend backend{cpu_forward_path,   cpu_backward_path, gemm,          layer_backward, epilogue,
                                   preactivation_grad, is_narrow_here,    stack_forward, stack_backward};
  return backend;
}

TORCH_LIBRARY_IMPL(fastlane, CPU, m) {
  register_layer_operators(m);
  register_stack_operators(m);
}

}  // namespace fastlane
