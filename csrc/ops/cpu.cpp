// The CPU key: kernels of the chosen instruction set, on torch's thread pool.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

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

void run_gemm(const GemmProblem& p) { kernels().gemm(p, torch_threads()); }
Path gemm(const GemmProblem& p) {
  const Path path = cpu_forward_path({p.m, p.k, p.n, p.dtype});
  if (path == Path::fused) run_gemm(p);
  return path;
}
void epilogue(const GemmProblem& p, const ConstRowMajor& product) { kernels().epilogue(p, product, torch_threads()); }
void preactivation_grad(const PreActivationGradProblem& p) { kernels().preactivation_grad(p, torch_threads()); }

// Two products after the elementwise pass, with dz in kept work memory: the page faults of a fresh tensor would cost
// as much as the pass itself.
void layer_backward_in_passes(const LayerBackwardProblem& b) {
  const Scratch memory(ScratchSlot::dz,
                       static_cast<size_t>(forms_dz(b) ? b.rows * b.out_features * element_size(b.dtype) : 0));
  const ConstRowMajor dz = run_preactivation_grad(b, memory.as<void>(), preactivation_grad);
  const ConstMatrix dz_matrix{dz.data, dz.row_stride, 1};
  if (b.dx.data) run_gemm(dgrad_gemm(shape_of(b), dz_matrix, b.weight, b.shortcut_grad, b.dx));
  if (b.dweight.data) run_gemm(wgrad_gemm(shape_of(b), dz_matrix, b.x, b.dweight_transposed, b.dweight));
}
Path layer_backward(const LayerBackwardProblem& b) {
  const Path path = cpu_backward_path(shape_of(b));
  if (path == Path::fused && !kernels().layer_backward(b, torch_threads())) layer_backward_in_passes(b);
  return path;
}

// Where the library has the backward it has all of it.
Path dgrad(const GemmProblem&) { return Path::library; }

bool is_one_kernel(const StackProblem& p) {
  const auto is_fused = [&](const StackLayer& l) {
    return cpu_forward_path({p.rows, l.in_features, l.out_features, p.dtype}) == Path::fused;
  };
  return std::all_of(p.layers, p.layers + p.count, is_fused) && is_narrow(p, caches());
}
void stack_forward(const StackProblem& p) { kernels().stack_forward(p, torch_threads()); }
void stack_backward(const StackProblem& p) { kernels().stack_backward(p, torch_threads()); }

}  // namespace

const Backend& cpu_backend() {
  static constexpr Backend backend{gemm,          layer_backward, dgrad,         epilogue, preactivation_grad,
                                   is_one_kernel, stack_forward,  stack_backward};
  return backend;
}

TORCH_LIBRARY_IMPL(fastlane, CPU, m) {
  register_layer_operators(m);
  register_stack_operators(m);
}

}  // namespace fastlane
