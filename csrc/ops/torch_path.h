// Calls on a CPU without vector kernels of ours. After the checks of every path they run torch's own operators, and
// torch differentiates them.
#pragma once

#include <ATen/ops/_unsafe_view.h>

#include "ops/checks/mlp.h"
#include "ops/composition.h"
#include "ops/differentiation.h"

namespace fastlane::torch_path {

// Does not count a stand-in: it means that a graph is traced, not that a call runs.
inline void count(const at::Tensor& x) {
  if (!is_stand_in(x)) policy::count_forward(Path::torch);
}

inline at::Tensor flattened(const at::Tensor& x) { return x.dim() == 2 ? x : differentiation::flatten_leading(x); }

// Restores x's leading sizes. For autograd the result is no view, so a caller may add to it in place.
inline at::Tensor with_leading_sizes(const at::Tensor& rows, const at::Tensor& x) {
  return x.dim() == 2 ? rows : at::_unsafe_view_symint(rows, output_sizes(x, rows.sym_size(1)));
}

// No other code has seen y's memory. Adding in place saves a tensor of y's size, but if a gradient is needed,
// autograd takes 2 µs longer for it.
inline at::Tensor plus(at::Tensor y, const OptionalTensor& residual) {
  constexpr int64_t kSmall = 16384;
  if (!residual) return y;
  if (!is_stand_in(y) && y.numel() <= kSmall && y.requires_grad()) return y + *residual;
  return y.add_(*residual);
}

inline at::Tensor linear_gelu_residual(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& residual, Activation activation) {
  check_layer(x, weight, bias, residual);
  count(x);
  return plus(with_leading_sizes(composition::activated(flattened(x), weight, bias, activation), x), residual);
}

inline at::Tensor linear_gelu_concat(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                     Activation activation) {
  check_linear("linear_gelu_concat", x, weight, bias);
  count(x);
  return with_leading_sizes(composition::linear_gelu_concat(flattened(x), weight, bias, activation), x);
}

inline at::Tensor mlp_residual(const at::Tensor& x, const at::Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                               const at::Tensor& fc2_weight, const OptionalTensor& fc2_bias,
                               const OptionalTensor& residual, Activation activation) {
  check_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual);
  count(x);
  const at::Tensor hidden = composition::activated(flattened(x), fc1_weight, fc1_bias, activation);
  return plus(with_leading_sizes(at::linear(hidden, fc2_weight, fc2_bias), x), residual);
}

inline at::Tensor residual_stack(const at::Tensor& x, const StackParameters& p, StackShortcut shortcut,
                                 Activation activation) {
  check_stack(x, p, shortcut);
  count(x);
  const at::Tensor rows = stack_by_layer(
      flattened(x), p, shortcut,
      [&](const at::Tensor& h, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
          bool is_projection) {
        return plus(composition::activated(h, weight, bias, is_projection ? Activation::none : activation), residual);
      },
      [&](const at::Tensor& h, const at::Tensor& weight, const OptionalTensor& bias) {
        return composition::linear_gelu_concat(h, weight, bias, activation);
      });
  return with_leading_sizes(rows, x);
}

}  // namespace fastlane::torch_path
