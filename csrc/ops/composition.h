// The same mathematics in ATen operators. They run if a fused kernel may not, and they make the backward
// differentiable.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/sigmoid.h>

#include "ops/checks/checks.h"
#include "ops/checks/stack.h"

namespace fastlane::composition {

inline std::string_view approximate(Activation activation) {
  TORCH_INTERNAL_ASSERT(activation == Activation::gelu || activation == Activation::gelu_tanh);
  return activation == Activation::gelu_tanh ? "tanh" : "none";
}

inline at::Tensor activated(const at::Tensor& z, Activation activation) {
  if (activation == Activation::quick_gelu) return z * at::sigmoid(z * quick_gelu_constants::scale);
  return activation == Activation::none ? z : at::gelu(z, approximate(activation));
}
// Writes act(z) to `out`, which may be z; its rows may be apart.
inline void activate_into(at::Tensor& out, const at::Tensor& z, Activation activation) {
  // Where gelu_out calls oneDNN, as for float32, it writes elsewhere if the rows of the result are apart
  // (torch 2.13).
  if (out.is_contiguous() && activation != Activation::quick_gelu) {
    at::gelu_out(out, z, approximate(activation));
  } else {
    out.copy_(activated(z, activation));
  }
}

inline at::Tensor activated(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                            Activation activation) {
  return activated(at::linear(x, weight, bias), activation);
}

inline at::Tensor linear_gelu_residual(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& residual, Activation activation) {
  const at::Tensor y = activated(x, weight, bias, activation);
  return residual ? y + *residual : y;
}

inline at::Tensor linear_gelu_concat(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                     Activation activation) {
  return at::cat({x, activated(x, weight, bias, activation)}, -1);
}

inline at::Tensor mlp_residual(const at::Tensor& x, const at::Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                               const at::Tensor& fc2_weight, const OptionalTensor& fc2_bias,
                               const OptionalTensor& residual, Activation activation) {
  return linear_gelu_residual(activated(x, fc1_weight, fc1_bias, activation), fc2_weight, fc2_bias, residual,
                              Activation::none);
}

inline at::Tensor preactivation_grad(const at::Tensor& grad_activated, const at::Tensor& z, Activation activation) {
  if (activation == Activation::quick_gelu) {
    const at::Tensor sigma = at::sigmoid(z * quick_gelu_constants::scale);
    // No factor is 1.702 z, since 1.702 z may overflow where z does not.
    return grad_activated * (sigma + z * (sigma * (1 - sigma)) * quick_gelu_constants::scale);
  }
  return activation == Activation::none ? grad_activated
                                        : at::gelu_backward(grad_activated, z, approximate(activation));
}

// Writes grad_activated ⊙ act′(z) to `dz`, which may be grad_activated.
inline void preactivation_grad_into(at::Tensor& dz, const at::Tensor& grad_activated, const at::Tensor& z,
                                    Activation activation) {
  if (activation == Activation::quick_gelu) {
    dz.copy_(preactivation_grad(grad_activated, z, activation));
  } else {
    at::gelu_backward_out(dz, grad_activated, z, approximate(activation));
  }
}

inline at::Tensor residual_stack(const at::Tensor& x, const StackParameters& p, StackShortcut shortcut,
                                 Activation activation) {
  return stack_by_layer(
      x, p, shortcut,
      [&](const at::Tensor& h, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
          bool is_projection) {
        return linear_gelu_residual(h, weight, bias, residual, is_projection ? Activation::none : activation);
      },
      [&](const at::Tensor& h, const at::Tensor& weight, const OptionalTensor& bias) {
        return linear_gelu_concat(h, weight, bias, activation);
      });
}

}  // namespace fastlane::composition
