// Shapes, strides and dtypes without data, for fake tensors and torch.export. They are C++ so that they share the
// checks of ops/checks and load without Python.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/checks/checks.h"
#include "ops/checks/mlp.h"
#include "ops/checks/stack.h"

namespace fastlane {
namespace {

at::Tensor empty(c10::SymIntArrayRef sizes, const at::Tensor& like) {
  return at::empty_symint(sizes, like.options());
}

at::Tensor empty_weight(const c10::SymInt& out_features, const c10::SymInt& in_features, bool column_major,
                        const at::Tensor& like) {
  return column_major ? empty({in_features, out_features}, like).t() : empty({out_features, in_features}, like);
}

at::Tensor linear_gelu_residual(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& residual, std::string_view activation, bool) {
  parse_activation(activation);
  check_layer(x, weight, bias, residual);
  return empty(output_sizes(x, weight.sym_size(0)), x);
}

at::Tensor linear_gelu_concat(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                              std::string_view activation) {
  parse_activation(activation);
  check_linear("linear_gelu_concat", x, weight, bias);
  return empty(output_sizes(x, x.sym_size(-1) + weight.sym_size(0)), x);
}

std::tuple<at::Tensor, at::Tensor> linear_gelu_forward(const at::Tensor& x, const at::Tensor& weight,
                                                       const OptionalTensor& bias, const OptionalTensor& residual,
                                                       std::string_view activation, bool concat) {
  check_no_residual_with_concat(concat, residual);
  at::Tensor y = concat ? linear_gelu_concat(x, weight, bias, activation)
                        : linear_gelu_residual(x, weight, bias, residual, activation, false);
  return {std::move(y), empty(output_sizes(x, weight.sym_size(0)), x)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_gelu_backward(
    const at::Tensor& grad_activated, const OptionalTensor& z, const OptionalTensor& x, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& grad_shortcut, std::string_view activation,
    bool weight_column_major, std::array<bool, 3> output_mask) {
  check_backward(grad_activated, z, x, weight, bias, grad_shortcut, parse_activation(activation), output_mask);
  const auto out_features = grad_activated.sym_size(-1);
  at::Tensor grad_x, grad_weight, grad_bias;
  if (output_mask[0]) grad_x = empty(output_sizes(grad_activated, weight->sym_size(1)), grad_activated);
  if (output_mask[1]) grad_weight = empty_weight(out_features, x->sym_size(-1), weight_column_major, grad_activated);
  if (output_mask[2]) grad_bias = empty({out_features}, grad_activated);
  return {std::move(grad_x), std::move(grad_weight), std::move(grad_bias)};
}

at::Tensor mlp_residual(const at::Tensor& x, const at::Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                        const at::Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& residual,
                        std::string_view activation, bool) {
  parse_activation(activation);
  check_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual);
  return empty(output_sizes(x, fc2_weight.sym_size(0)), x);
}

std::tuple<at::Tensor, at::Tensor> mlp_forward(const at::Tensor& x, const at::Tensor& fc1_weight,
                                               const OptionalTensor& fc1_bias, const at::Tensor& fc2_weight,
                                               const OptionalTensor& fc2_bias, const OptionalTensor& residual,
                                               std::string_view activation) {
  at::Tensor y = mlp_residual(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, activation, false);
  return {std::move(y), empty(output_sizes(x, fc1_weight.sym_size(0)), x)};
}

MlpGradients mlp_backward(const at::Tensor& grad, const OptionalTensor& z, const OptionalTensor& x,
                          const OptionalTensor& fc1_weight, const OptionalTensor& fc1_bias,
                          const OptionalTensor& fc2_weight, const OptionalTensor& grad_shortcut,
                          std::string_view activation, bool fc1_column_major, bool fc2_column_major,
                          std::array<bool, 5> output_mask) {
  check_mlp_backward(grad, z, x, fc1_weight, fc1_bias, fc2_weight, grad_shortcut, parse_activation(activation),
                     output_mask);
  const auto out_features = grad.sym_size(-1);
  at::Tensor grad_x, grad_fc1_weight, grad_fc1_bias, grad_fc2_weight, grad_fc2_bias;
  if (output_mask[0]) grad_x = empty(output_sizes(grad, fc1_weight->sym_size(1)), grad);
  if (output_mask[1] || output_mask[2] || output_mask[3]) {
    const c10::SymInt hidden = hidden_features(z, fc1_weight, fc2_weight);
    if (output_mask[1]) grad_fc1_weight = empty_weight(hidden, x->sym_size(-1), fc1_column_major, grad);
    if (output_mask[2]) grad_fc1_bias = empty({hidden}, grad);
    if (output_mask[3]) grad_fc2_weight = empty_weight(out_features, hidden, fc2_column_major, grad);
  }
  if (output_mask[4]) grad_fc2_bias = empty({out_features}, grad);
  return {std::move(grad_x), std::move(grad_fc1_weight), std::move(grad_fc1_bias), std::move(grad_fc2_weight),
          std::move(grad_fc2_bias)};
}

at::Tensor residual_stack(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                          const OptionalTensors& projections, const OptionalTensors& projection_biases,
                          std::string_view shortcut, std::string_view activation, bool) {
  parse_activation(activation);
  const StackParameters p = stack_parameters(weights, biases, projections, projection_biases);
  return empty(output_sizes(x, check_stack(x, p, parse_shortcut(shortcut))), x);
}

std::tuple<at::Tensor, at::Tensor> residual_stack_forward(const at::Tensor& x, at::TensorList weights,
                                                          const OptionalTensors& biases,
                                                          const OptionalTensors& projections,
                                                          const OptionalTensors& projection_biases,
                                                          std::string_view shortcut, std::string_view activation) {
  at::Tensor y = residual_stack(x, weights, biases, projections, projection_biases, shortcut, activation, false);
  const StackParameters p = stack_parameters(weights, biases, projections, projection_biases);
  return {std::move(y), empty({stack_z_size(x, p)}, x)};
}

std::vector<at::Tensor> residual_stack_backward(const at::Tensor& grad, const OptionalTensor& x,
                                                const OptionalTensors& weights, const OptionalTensors& biases,
                                                const OptionalTensors& projections,
                                                const OptionalTensors& projection_biases, const OptionalTensor& z,
                                                c10::SymIntArrayRef features, std::string_view shortcut_name,
                                                std::string_view activation, at::IntArrayRef needed,
                                                at::IntArrayRef column_major) {
  const StackShortcut shortcut = parse_shortcut(shortcut_name);
  const StackParameters p = saved_stack_parameters(weights, biases, projections, projection_biases);
  check_stack_backward(grad, x, p, z, features, shortcut, parse_activation(activation), needed);
  const auto inputs = stack_inputs(features, shortcut);
  const auto lies_by_columns = stack_flags(column_major, p.layers());
  std::vector<at::Tensor> result;
  for (const int64_t position : needed) {
    if (position == 0) {
      result.push_back(empty(output_sizes(grad, features[0]), grad));
      continue;
    }
    const auto index = static_cast<size_t>(position - 1);
    const size_t list = index / p.layers(), i = index % p.layers();
    result.push_back(list == kWeights || list == kProjections
                         ? empty_weight(features[i + 1], inputs[i], lies_by_columns[index + 1], grad)
                         : empty({features[i + 1]}, grad));
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlane, Meta, m) {
  m.impl("linear_gelu_residual", linear_gelu_residual);
  m.impl("linear_gelu_concat", linear_gelu_concat);
  m.impl("linear_gelu_forward", linear_gelu_forward);
  m.impl("linear_gelu_backward", linear_gelu_backward);
  m.impl("mlp_residual", mlp_residual);
  m.impl("mlp_forward", mlp_forward);
  m.impl("mlp_backward", mlp_backward);
  m.impl("residual_stack", residual_stack);
  m.impl("residual_stack_forward", residual_stack_forward);
  m.impl("residual_stack_backward", residual_stack_backward);
}

}  // namespace fastlane
