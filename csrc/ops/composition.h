// The same mathematics in ATen operators: what runs where a fused kernel may not, and what makes the backward
// differentiable.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/linear.h>

#include "checks.h"
#include "stack.h"

namespace fastlane::composition {

inline std::string_view approximate(Activation activation) {
  return activation == Activation::gelu_tanh ? "tanh" : "none";
}

inline at::Tensor activated(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                            Activation activation) {
  const at::Tensor z = at::linear(x, weight, bias);
  return activation == Activation::none ? z : at::gelu(z, approximate(activation));
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

inline at::Tensor preactivation_grad(const at::Tensor& grad_activated, const at::Tensor& z, Activation activation) {
  return activation == Activation::none ? grad_activated
                                        : at::gelu_backward(grad_activated, z, approximate(activation));
}

inline at::Tensor residual_stack(const at::Tensor& x, const StackParameters& p, StackShortcut shortcut,
                                 Activation activation) {
  const auto optional = [](const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
  at::Tensor h = x;
  for (size_t i = 0; i < p.layers(); ++i) {
    if (shortcut == StackShortcut::concat) {
      h = linear_gelu_concat(h, p.weights[i], optional(p.biases[i]), activation);
      continue;
    }
    OptionalTensor residual;
    if (p.projections[i].defined()) {
      residual = at::linear(h, p.projections[i], optional(p.projection_biases[i]));
    } else if (adds_input(p, i, shortcut)) {
      residual = h;
    }
    h = linear_gelu_residual(h, p.weights[i], optional(p.biases[i]), residual, activation);
  }
  return h;
}

}  // namespace fastlane::composition
