// A layer's operators.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <array>

#include "ops/composition.h"
#include "ops/dense/layer_calls.h"
#include "ops/policy.h"
#include "ops/register.h"
#include "ops/torch_path.h"

namespace fastlane {
namespace {

using OutputAndZ = std::tuple<at::Tensor, at::Tensor>;

// z is undefined unless `with_z`.
OutputAndZ forward_residual(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual, Activation activation, bool with_z) {
  check_layer(x, weight, bias, residual);
  const c10::OptionalDeviceGuard guard(x.device());
  at::Tensor y = empty_output(x, weight.size(0)), z = with_z ? empty_output(x, weight.size(0)) : at::Tensor();
  const Operands o = flatten_operands(x, weight, bias, residual, /*may_be_frozen=*/!with_z);
  const std::array<int64_t, 2> flat{o.shape.rows, o.shape.out_features};
  policy::count_forward(backend_of(x).counted(layer_forward(o, activation, with_z ? z.view(flat) : z, y.view(flat))));
  return {std::move(y), std::move(z)};
}

OutputAndZ forward_concat(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                          Activation activation, bool with_z) {
  check_linear("linear_gelu_concat", x, weight, bias);
  const c10::OptionalDeviceGuard guard(x.device());
  const int64_t in_features = x.size(-1), out_features = weight.size(0);
  at::Tensor y = empty_output(x, in_features + out_features),
             z = with_z ? empty_output(x, out_features) : at::Tensor();
  const Operands o = flatten_operands(x, weight, bias, std::nullopt, /*may_be_frozen=*/!with_z);
  const at::Tensor rows = y.view({o.shape.rows, in_features + out_features});
  {
    const OwnCalls own_calls;
    rows.narrow(1, 0, in_features).copy_(o.x);
  }
  policy::count_forward(backend_of(x).counted(layer_forward(
      o, activation, with_z ? z.view({o.shape.rows, out_features}) : z, rows.narrow(1, in_features, out_features))));
  return {std::move(y), std::move(z)};
}

// Inference tensors skip the Autograd key, which asks this for all other tensors.
bool composes_because_disabled() {
  const char* const reason = policy::why_disabled();
  if (reason) policy::leave_fused_path(reason);
  return reason != nullptr;
}

at::Tensor linear_gelu_residual(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& residual, std::string_view activation_name, bool) {
  const Activation activation = parse_activation(activation_name);
  if (composes_because_disabled())
    return composition::linear_gelu_residual(x, plain_weight(weight), bias, residual, activation);
  if (policy::runs_torch(x))
    return torch_path::linear_gelu_residual(x, plain_weight(weight), bias, residual, activation);
  return std::get<0>(forward_residual(x, weight, bias, residual, activation, /*with_z=*/false));
}

at::Tensor linear_gelu_concat(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                              std::string_view activation_name) {
  const Activation activation = parse_activation(activation_name);
  if (composes_because_disabled()) return composition::linear_gelu_concat(x, plain_weight(weight), bias, activation);
  if (policy::runs_torch(x)) return torch_path::linear_gelu_concat(x, plain_weight(weight), bias, activation);
  return std::get<0>(forward_concat(x, weight, bias, activation, /*with_z=*/false));
}

std::tuple<at::Tensor, at::Tensor> linear_gelu_forward(const at::Tensor& x, const at::Tensor& weight,
                                                       const OptionalTensor& bias, const OptionalTensor& residual,
                                                       std::string_view activation, bool concat) {
  check_no_residual_with_concat(concat, residual);
  const Activation parsed = parse_activation(activation);
  return concat ? forward_concat(x, weight, bias, parsed, /*with_z=*/true)
                : forward_residual(x, weight, bias, residual, parsed, /*with_z=*/true);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_gelu_backward(
    const at::Tensor& grad_activated, const OptionalTensor& saved_z, const OptionalTensor& x,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& grad_shortcut,
    std::string_view activation_name, bool weight_column_major, std::array<bool, 3> output_mask) {
  const auto [need_x, need_weight, need_bias] = output_mask;
  const Activation activation = parse_activation(activation_name);
  check_backward(grad_activated, saved_z, x, weight, bias, grad_shortcut, activation, output_mask);
  const c10::OptionalDeviceGuard guard(grad_activated.device());
  const auto options = grad_activated.options();
  BackwardTensors t;
  t.dy = with_unit_column_stride(flatten_leading(grad_activated));
  if (activation != Activation::none)
    t.z = saved_z ? with_unit_column_stride(flatten_leading(*saved_z)) : computed_z(*x, *weight, bias);
  at::Tensor grad_x, grad_weight;
  if (need_x) {
    t.weight = *weight;
    grad_x = empty_output(grad_activated, weight->size(1));
    t.dx = grad_x.view({t.dy.size(0), weight->size(1)});
    if (grad_shortcut) t.grad_shortcut = with_unit_column_stride(flatten_leading(*grad_shortcut));
  }
  if (need_weight) {
    t.x = flatten_leading(*x);
    WeightGradient gradient(t.dy.size(1), t.x.size(1), weight_column_major, options);
    t.dweight = std::move(gradient.storage), t.dweight_transposed = weight_column_major;
    grad_weight = std::move(gradient.gradient);
  }
  if (need_bias) t.db = at::empty({t.dy.size(1)}, options);
  policy::count_backward(backend_of(grad_activated).counted(layer_backward(t, activation)));
  return {std::move(grad_x), std::move(grad_weight), std::move(t.db)};
}

}  // namespace

void register_layer_operators(torch::Library& m) {
  m.impl("linear_gelu_residual", linear_gelu_residual);
  m.impl("linear_gelu_concat", linear_gelu_concat);
  m.impl("linear_gelu_forward", linear_gelu_forward);
  m.impl("linear_gelu_backward", linear_gelu_backward);
}

}  // namespace fastlane
