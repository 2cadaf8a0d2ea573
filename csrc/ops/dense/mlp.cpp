// An MLP's operators. If the backend has a kernel for the whole MLP, it runs; otherwise the MLP runs layer by layer.
#include "ops/checks/mlp.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "kernels/mlp.h"
#include "ops/composition.h"
#include "ops/dense/layer_calls.h"
#include "ops/policy.h"
#include "ops/register.h"
#include "ops/torch_path.h"

namespace fastlane {
namespace {

// The caller leaves `fc2.x` unset: only a backend without a kernel for the whole MLP needs the hidden activations as
// a tensor.
Path forward_rows(const Operands& fc1, Operands& fc2, Activation activation, const at::Tensor& z,
                  const at::Tensor& y) {
  MlpProblem p;
  p.rows = fc1.shape.rows, p.in_features = fc1.shape.in_features, p.hidden = fc1.shape.out_features;
  p.out_features = fc2.shape.out_features, p.dtype = fc1.shape.dtype, p.activation = activation;
  p.x = matrix(fc1.x), p.fc1_weight = weight_of(fc1.weight), p.fc1_bias = data_of(fc1.bias);
  p.fc2_weight = weight_of(fc2.weight), p.fc2_bias = data_of(fc2.bias);
  p.residual = row_major(fc2.residual);
  p.z = mutable_row_major(z), p.y = mutable_row_major(y);
  if (const TakenPath taken = backend_of(y).mlp_forward(p)) return *taken;
  CommonPath common;
  fc2.x = at::empty({p.rows, p.hidden}, y.options());
  common.add(layer_forward(fc1, activation, z, fc2.x));
  common.add(layer_forward(fc2, Activation::none, {}, y));
  return common.path();
}

// z is undefined unless `with_z`.
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& fc1_weight,
                                           const OptionalTensor& fc1_bias, const at::Tensor& fc2_weight,
                                           const OptionalTensor& fc2_bias, const OptionalTensor& residual,
                                           Activation activation, bool with_z) {
  check_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual);
  const c10::OptionalDeviceGuard guard(x.device());
  const int64_t hidden = fc1_weight.size(0), out_features = fc2_weight.size(0);
  at::Tensor y = empty_output(x, out_features), z = with_z ? empty_output(x, hidden) : at::Tensor();
  const Operands fc1 = flatten_operands(x, fc1_weight, fc1_bias, std::nullopt, /*may_be_frozen=*/!with_z);
  const int64_t rows = fc1.shape.rows;
  Operands fc2;
  fc2.weight = operand_weight(fc2_weight, with_z ? std::nullopt : std::optional(rows));
  fc2.shape = {rows, hidden, out_features, fc1.shape.dtype};
  if (fc2_bias) fc2.bias = fc2_bias->contiguous();
  if (residual) fc2.residual = flatten_residual(*residual, x, out_features);
  policy::count_forward(backend_of(x).counted(
      forward_rows(fc1, fc2, activation, with_z ? z.view({rows, hidden}) : z, y.view({rows, out_features}))));
  return {std::move(y), std::move(z)};
}

at::Tensor mlp_residual(const at::Tensor& x, const at::Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                        const at::Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& residual,
                        std::string_view activation_name, bool) {
  const Activation activation = parse_activation(activation_name);
  // Inference tensors skip the Autograd key, which asks this for all other tensors.
  if (const char* reason = policy::why_disabled()) {
    policy::leave_fused_path(reason);
    return composition::mlp_residual(x, plain_weight(fc1_weight), fc1_bias, plain_weight(fc2_weight), fc2_bias,
                                     residual, activation);
  }
  if (policy::runs_torch(x))
    return torch_path::mlp_residual(x, plain_weight(fc1_weight), fc1_bias, plain_weight(fc2_weight), fc2_bias,
                                    residual, activation);
  return std::get<0>(forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, activation, /*with_z=*/false));
}

std::tuple<at::Tensor, at::Tensor> mlp_forward(const at::Tensor& x, const at::Tensor& fc1_weight,
                                               const OptionalTensor& fc1_bias, const at::Tensor& fc2_weight,
                                               const OptionalTensor& fc2_bias, const OptionalTensor& residual,
                                               std::string_view activation) {
  return forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, parse_activation(activation),
                 /*with_z=*/true);
}

// The operands and results of a backward as 2-D tensors; undefined where not needed.
struct MlpBackwardTensors {
  at::Tensor dy, z, x, fc1_weight, fc2_weight, grad_shortcut;
  at::Tensor dx, dfc1_bias, dfc2_bias;
  WeightGradient dfc1_weight, dfc2_weight;
  int64_t hidden = 0;
};

MlpBackwardProblem problem_of(const MlpBackwardTensors& t, Activation activation) {
  MlpBackwardProblem p;
  p.rows = t.dy.size(0), p.hidden = t.hidden, p.out_features = t.dy.size(1);
  p.in_features = t.fc1_weight.defined() ? t.fc1_weight.size(1) : t.x.defined() ? t.x.size(1) : 0;
  p.dtype = dtype_of(t.dy), p.activation = activation;
  p.dy = row_major(t.dy), p.z = row_major(t.z), p.shortcut_grad = row_major(t.grad_shortcut);
  p.x = matrix(t.x), p.fc1_weight = matrix(t.fc1_weight), p.fc2_weight = matrix(t.fc2_weight);
  p.dx = mutable_row_major(t.dx);
  p.dfc1_weight = mutable_row_major(t.dfc1_weight.storage), p.dfc1_transposed = t.dfc1_weight.transposed;
  p.dfc2_weight = mutable_row_major(t.dfc2_weight.storage), p.dfc2_transposed = t.dfc2_weight.transposed;
  p.dfc1_bias = mutable_data_of(t.dfc1_bias), p.dfc2_bias = mutable_data_of(t.dfc2_bias);
  return p;
}

at::Tensor hidden_activations(const at::Tensor& z, Activation activation) {
  if (activation == Activation::none) return z;
  at::Tensor hidden = at::empty_like(z, at::MemoryFormat::Contiguous);
  EpilogueProblem p;
  p.m = z.size(0), p.n = z.size(1), p.dtype = dtype_of(z), p.product = row_major(z);
  p.epilogue.activation = activation, p.epilogue.out = mutable_row_major(hidden);
  backend_of(z).epilogue(p);
  return hidden;
}

Path backward_by_layer(const MlpBackwardTensors& t, const MlpBackwardProblem& p, Activation activation) {
  CommonPath path;
  BackwardTensors fc2;
  fc2.dweight = t.dfc2_weight.storage, fc2.dweight_transposed = t.dfc2_weight.transposed;
  if (fc2.dweight.defined()) fc2.x = hidden_activations(t.z, activation);
  if (forms_dz(p)) fc2.weight = t.fc2_weight, fc2.dx = at::empty({p.rows, p.hidden}, t.dy.options());
  NetworkLayer fc1_layer{activation, t.z, t.dfc1_bias};
  path.add(layer_backward(fc2, {Activation::none, {}, t.dfc2_bias}, t.dy, &fc1_layer));
  if (!forms_dz(p)) return path.path();
  BackwardTensors fc1;
  fc1.x = t.x, fc1.weight = t.fc1_weight, fc1.grad_shortcut = t.grad_shortcut;
  fc1.dx = t.dx, fc1.dweight = t.dfc1_weight.storage, fc1.dweight_transposed = t.dfc1_weight.transposed;
  path.add(layer_backward(fc1, fc1_layer, fc2.dx));
  return path.path();
}

MlpGradients mlp_backward(const at::Tensor& grad, const OptionalTensor& saved_z, const OptionalTensor& x,
                          const OptionalTensor& fc1_weight, const OptionalTensor& fc1_bias,
                          const OptionalTensor& fc2_weight, const OptionalTensor& grad_shortcut,
                          std::string_view activation_name, bool fc1_column_major, bool fc2_column_major,
                          std::array<bool, 5> output_mask) {
  const Activation activation = parse_activation(activation_name);
  check_mlp_backward(grad, saved_z, x, fc1_weight, fc1_bias, fc2_weight, grad_shortcut, activation, output_mask);
  const c10::OptionalDeviceGuard guard(grad.device());
  const MlpNeeds needs(output_mask, activation);
  const auto options = grad.options();
  MlpBackwardTensors t;
  t.dy = with_unit_column_stride(flatten_leading(grad));
  if (needs.z)
    t.z = saved_z ? with_unit_column_stride(flatten_leading(*saved_z)) : computed_z(*x, *fc1_weight, fc1_bias);
  if (needs.z || needs.dz) t.hidden = t.z.defined() ? t.z.size(1) : fc2_weight->size(1);
  if (needs.dz) t.fc2_weight = *fc2_weight;
  at::Tensor grad_x;
  if (output_mask[0]) {
    t.fc1_weight = *fc1_weight;
    grad_x = empty_output(grad, fc1_weight->size(1));
    t.dx = grad_x.view({t.dy.size(0), fc1_weight->size(1)});
    if (grad_shortcut) t.grad_shortcut = with_unit_column_stride(flatten_leading(*grad_shortcut));
  }
  if (output_mask[1]) {
    t.x = flatten_leading(*x);
    t.dfc1_weight = WeightGradient(t.hidden, t.x.size(1), fc1_column_major, options);
  }
  if (output_mask[2]) t.dfc1_bias = at::empty({t.hidden}, options);
  if (output_mask[3]) t.dfc2_weight = WeightGradient(t.dy.size(1), t.hidden, fc2_column_major, options);
  if (output_mask[4]) t.dfc2_bias = at::empty({t.dy.size(1)}, options);
  const MlpBackwardProblem p = problem_of(t, activation);
  const TakenPath taken = backend_of(grad).mlp_backward(p);
  policy::count_backward(backend_of(grad).counted(taken ? *taken : backward_by_layer(t, p, activation)));
  return {std::move(grad_x), std::move(t.dfc1_weight.gradient), std::move(t.dfc1_bias),
          std::move(t.dfc2_weight.gradient), std::move(t.dfc2_bias)};
}

}  // namespace

void register_mlp_operators(torch::Library& m) {
  m.impl("mlp_residual", mlp_residual);
  m.impl("mlp_forward", mlp_forward);
  m.impl("mlp_backward", mlp_backward);
}

}  // namespace fastlane
