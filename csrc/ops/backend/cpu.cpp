// The CPU key runs kernels of the chosen instruction set on torch's thread pool.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/narrow_stack.h"
#include "kernels/cpu/scratch.h"
#include "kernels/mlp.h"
#include "ops/dense/backend.h"
#include "ops/register.h"

namespace fastlane {
namespace {

// Lends a kernel torch's thread pool, and tells it this machine's caches.
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

// The elementwise pass, then two products. dz lies in kept work memory: the page faults of a fresh tensor would cost
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

// If the library runs a layer's backward, it runs all of its products.
Path dgrad(const GemmProblem&) { return Path::library; }
bool takes_dgrad(const GemmProblem&) { return false; }

// A block's hidden activations stay in the last-level cache, and in kept memory, from one product to the other. Each
// block packs the weights anew, and needs enough rows to make packing cheap. An even cut leaves no block of few rows.
int64_t mlp_block_rows(const MlpProblem& p) {
  constexpr int64_t kMinRows = 512;
  const int64_t row_bytes = std::max<int64_t>(1, p.hidden * element_size(p.dtype));
  const int64_t bytes = std::min(caches().last / 2, static_cast<int64_t>(kKeptScratchBytes));
  const int64_t most = std::max(kMinRows, bytes / row_bytes);
  const int64_t blocks = std::max<int64_t>(1, (p.rows + most - 1) / most);
  return (p.rows + blocks - 1) / blocks;
}
Path mlp_forward(const MlpProblem& p) {
  for (const LayerShape& shape : {fc1_shape(p), fc2_shape(p)})
    if (cpu_forward_path(shape) == Path::library) return Path::library;
  const int64_t block_rows = mlp_block_rows(p);
  const Scratch memory(ScratchSlot::hidden, static_cast<size_t>(block_rows * p.hidden * element_size(p.dtype)));
  for (int64_t row = 0; row < p.rows; row += block_rows) {
    const MlpProblem block = rows_of(p, row, std::min(block_rows, p.rows - row));
    run_gemm(fc1_gemm(block, {memory.as<void>(), p.hidden}));
    run_gemm(fc2_gemm(block, {memory.as<void>(), p.hidden}));
  }
  return Path::fused;
}

Path mlp_backward(const MlpBackwardProblem& p) {
  for (const LayerShape& shape : {fc1_shape(p), fc2_shape(p)})
    if (cpu_backward_path(shape) == Path::library) return Path::library;
  if (kernels().mlp_backward(p, torch_threads())) return Path::fused;
  if (p.dfc2_bias) {
    PreActivationGradProblem sums;
    sums.rows = p.rows, sums.cols = p.out_features, sums.dtype = p.dtype, sums.dy = p.dy, sums.db = p.dfc2_bias;
    preactivation_grad(sums);
  }
  if (p.dfc2_weight.data) run_gemm(fc2_wgrad_gemm(p));
  if (!forms_dz(p)) return Path::fused;
  // The kernel's epilogue always writes the sums, which cost next to nothing. Without a dfc1_bias they go after dz.
  const int64_t bytes = p.hidden * element_size(p.dtype);
  const Scratch memory(ScratchSlot::dz, static_cast<size_t>((p.dfc1_bias ? p.rows : p.rows + 1) * bytes));
  void* const after_dz = memory.as<char>() + p.rows * bytes;
  run_gemm(dz_gemm(p, {memory.as<void>(), p.hidden}, p.dfc1_bias ? p.dfc1_bias : after_dz));
  const ConstMatrix dz{memory.as<void>(), p.hidden, 1};
  if (p.dx.data) run_gemm(dgrad_gemm(fc1_shape(p), dz, p.fc1_weight, p.shortcut_grad, p.dx));
  if (p.dfc1_weight.data) run_gemm(wgrad_gemm(fc1_shape(p), dz, p.x, p.dfc1_transposed, p.dfc1_weight));
  return Path::fused;
}

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
