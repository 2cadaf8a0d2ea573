// The checks of an MLP's operators.
#pragma once

#include "ops/checks/checks.h"

namespace fastlane {

// Whether a backward needs dz and z. `mask` flags the gradients: x, fc1's weight and bias, fc2's weight and bias.
struct MlpNeeds {
  bool dz, z;

  MlpNeeds(std::array<bool, 5> mask, Activation activation)
      : dz(mask[0] || mask[1] || mask[2]), z(mask[3] || (dz && activation != Activation::none)) {}
};

inline void check_mlp(const at::Tensor& x, const at::Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                      const at::Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& residual) {
  constexpr char op[] = "mlp_residual";
  check_input(op, x);
  check_parameters(op, {"fc1_weight", "fc1_bias"}, x, fc1_weight, fc1_bias, x.sym_size(-1), "x", x);
  check_parameters(op, {"fc2_weight", "fc2_bias"}, x, fc2_weight, fc2_bias, fc1_weight.sym_size(0), "fc1_weight",
                   fc1_weight);
  if (residual) check_residual(op, x, fc2_weight, *residual);
}

// Checks saved tensors too, for the reason given at check_backward.
inline void check_mlp_backward(const at::Tensor& grad, const OptionalTensor& z, const OptionalTensor& x,
                               const OptionalTensor& fc1_weight, const OptionalTensor& fc1_bias,
                               const OptionalTensor& fc2_weight, const OptionalTensor& grad_shortcut,
                               Activation activation, std::array<bool, 5> mask) {
  constexpr char op[] = "mlp_backward";
  TORCH_CHECK(has_kernel_dtype(grad) && grad.dim() >= 1, op, ": grad has dtype ", grad.scalar_type(), " and shape ",
              grad.sym_sizes(), ", expected a floating-point tensor (..., out_features)");
  check_dense(op, "grad", grad);
  check_memory(op, "grad", grad);
  const MlpNeeds needs(mask, activation);
  const bool recompute = needs.z && !z;
  TORCH_CHECK(x || !(mask[1] || recompute), op, ": x is missing, expected the forward's input");
  TORCH_CHECK(fc1_weight || !(mask[0] || recompute), op, ": fc1_weight is missing, expected the forward's");
  TORCH_CHECK(fc2_weight || !needs.dz, op, ": fc2_weight is missing, expected the forward's");
  const auto check_rows_like_grad = [&](const char* name, const at::Tensor& t, const c10::SymInt& features) {
    check_like(op, name, t, "grad", grad);
    check_rows(op, name, t, grad, features);
  };
  const auto check_weight = [&](const char* name, const at::Tensor& t, const c10::SymInt& out,
                                const c10::SymInt& in) {
    check_like(op, name, t, "grad", grad);
    TORCH_CHECK(t.dim() == 2 && t.sym_size(0) == out && t.sym_size(1) == in, op, ": ", name, " has shape ",
                t.sym_sizes(), ", expected (", out, ", ", in, "); pass what the forward was called with");
  };
  if (x) check_rows_like_grad("x", *x, x->sym_size(-1));
  if (fc1_weight)
    check_weight("fc1_weight", *fc1_weight, fc1_weight->sym_size(0), x ? x->sym_size(-1) : fc1_weight->sym_size(-1));
  if (z) check_rows_like_grad("z", *z, fc1_weight ? fc1_weight->sym_size(0) : z->sym_size(-1));
  const OptionalTensor& has_hidden = z ? z : fc1_weight;
  if (fc2_weight)
    check_weight("fc2_weight", *fc2_weight, grad.sym_size(-1),
                 !has_hidden ? fc2_weight->sym_size(-1) : has_hidden->sym_size(z ? -1 : 0));
  if (fc1_bias && recompute) {
    check_like(op, "fc1_bias", *fc1_bias, "grad", grad);
    TORCH_CHECK(fc1_bias->dim() == 1 && fc1_bias->sym_size(0) == fc1_weight->sym_size(0), op, ": fc1_bias has shape ",
                fc1_bias->sym_sizes(), ", expected (", fc1_weight->sym_size(0),
                ",); pass what the forward was called with");
  }
  if (grad_shortcut && mask[0]) check_rows_like_grad("grad_shortcut", *grad_shortcut, fc1_weight->sym_size(1));
}

// The number of hidden features, from a tensor of the backward that is present.
inline c10::SymInt hidden_features(const OptionalTensor& z, const OptionalTensor& fc1_weight,
                                   const OptionalTensor& fc2_weight) {
  return z ? z->sym_size(-1) : fc2_weight ? fc2_weight->sym_size(1) : fc1_weight->sym_size(0);
}

}  // namespace fastlane
