#include "kernels/cpu/schedule.h"

#include <algorithm>

#include "kernels/cpu/arithmetic.h"
#include "kernels/cpu/scratch.h"
#include "kernels/layer.h"
#include "kernels/mlp.h"

namespace fastlane {
namespace {

// A block's hidden activations stay in the last-level cache, and in kept memory, from one product to the other. Each
// block packs the weights anew, and needs enough rows to make packing cheap. An even cut leaves no block of few rows.
int64_t mlp_block_rows(const MlpProblem& p, const Caches& caches) {
  constexpr int64_t kMinRows = 512;
  const int64_t row_bytes = std::max<int64_t>(1, p.hidden * element_size(p.dtype));
  const int64_t bytes = std::min(caches.last / 2, static_cast<int64_t>(kKeptScratchBytes));
  const int64_t most = std::max(kMinRows, bytes / row_bytes);
  return ceil_div(p.rows, std::max<int64_t>(1, ceil_div(p.rows, most)));
}

// The elementwise pass, then two products. dz lies in kept work memory: the page faults of a fresh tensor would cost
// as much as the pass itself.
void layer_backward_in_passes(const KernelTable& kernels, const LayerBackwardProblem& b, const Parallel& parallel) {
  const Scratch memory(ScratchSlot::dz,
                       static_cast<size_t>(forms_dz(b) ? b.rows * b.out_features * element_size(b.dtype) : 0));
  const ConstRowMajor dz = form_dz(
      b, memory.as<void>(), [&](const PreActivationGradProblem& p) { kernels.preactivation_grad(p, parallel); });
  const ConstMatrix dz_matrix{dz.data, dz.row_stride, 1};
  if (b.dx.data) kernels.gemm(dgrad_gemm(shape_of(b), dz_matrix, b.weight, b.shortcut_grad, b.dx), parallel);
  if (b.dweight.data)
    kernels.gemm(wgrad_gemm(shape_of(b), dz_matrix, b.x, b.dweight_transposed, b.dweight), parallel);
}

void mlp_backward_in_products(const KernelTable& kernels, const MlpBackwardProblem& p, const Parallel& parallel) {
  if (p.dfc2_bias) {
    PreActivationGradProblem sums;
    sums.rows = p.rows, sums.cols = p.out_features, sums.dtype = p.dtype, sums.dy = p.dy, sums.db = p.dfc2_bias;
    kernels.preactivation_grad(sums, parallel);
  }
  if (p.dfc2_weight.data) kernels.gemm(fc2_wgrad_gemm(p), parallel);
  if (!forms_dz(p)) return;
  // The kernel's epilogue always writes the sums, which cost next to nothing. Without a dfc1_bias they go after dz.
  const int64_t bytes = p.hidden * element_size(p.dtype);
  const Scratch memory(ScratchSlot::dz, static_cast<size_t>((p.dfc1_bias ? p.rows : p.rows + 1) * bytes));
  void* const after_dz = memory.as<char>() + p.rows * bytes;
  kernels.gemm(dz_gemm(p, {memory.as<void>(), p.hidden}, p.dfc1_bias ? p.dfc1_bias : after_dz), parallel);
  const ConstMatrix dz{memory.as<void>(), p.hidden, 1};
  if (p.dx.data) kernels.gemm(dgrad_gemm(fc1_shape(p), dz, p.fc1_weight, p.shortcut_grad, p.dx), parallel);
  if (p.dfc1_weight.data) kernels.gemm(wgrad_gemm(fc1_shape(p), dz, p.x, p.dfc1_transposed, p.dfc1_weight), parallel);
}

}  // namespace

void layer_backward(const KernelTable& kernels, const LayerBackwardProblem& p, const Parallel& parallel) {
  if (!kernels.layer_backward(p, parallel)) layer_backward_in_passes(kernels, p, parallel);
}

void mlp_forward(const KernelTable& kernels, const MlpProblem& p, const Parallel& parallel) {
  const int64_t block_rows = mlp_block_rows(p, parallel.caches);
  const Scratch memory(ScratchSlot::hidden, static_cast<size_t>(block_rows * p.hidden * element_size(p.dtype)));
  for (int64_t row = 0; row < p.rows; row += block_rows) {
    const MlpProblem block = rows_of(p, row, std::min(block_rows, p.rows - row));
    kernels.gemm(fc1_gemm(block, {memory.as<void>(), p.hidden}), parallel);
    kernels.gemm(fc2_gemm(block, {memory.as<void>(), p.hidden}), parallel);
  }
}

void mlp_backward(const KernelTable& kernels, const MlpBackwardProblem& p, const Parallel& parallel) {
  if (!kernels.mlp_backward(p, parallel)) mlp_backward_in_products(kernels, p, parallel);
}

}  // namespace fastlane
