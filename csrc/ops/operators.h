// Typed handles to the operators of schema.cpp. A call goes through the dispatcher and skips the excluded keys.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <string_view>
#include <tuple>

#include "ops/types.h"

namespace fastlane {

inline at::Tensor call_linear_gelu_residual(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                            const OptionalTensor& residual, std::string_view activation,
                                            bool recompute) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastlane::linear_gelu_residual", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                               const OptionalTensor&, std::string_view, bool)>();
  return op.call(x, weight, bias, residual, activation, recompute);
}

inline at::Tensor call_linear_gelu_concat(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                          std::string_view activation) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastlane::linear_gelu_concat", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, std::string_view)>();
  return op.call(x, weight, bias, activation);
}

inline std::tuple<at::Tensor, at::Tensor> call_linear_gelu_forward(const at::Tensor& x, const at::Tensor& weight,
                                                                   const OptionalTensor& bias,
                                                                   const OptionalTensor& residual,
                                                                   std::string_view activation, bool concat) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastlane::linear_gelu_forward", "")
          .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                                    const OptionalTensor&, std::string_view, bool)>();
  return op.call(x, weight, bias, residual, activation, concat);
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> call_linear_gelu_backward(
    const at::Tensor& grad_activated, const OptionalTensor& z, const OptionalTensor& x, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& grad_shortcut, std::string_view activation,
    bool weight_column_major, std::array<bool, 3> output_mask) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastlane::linear_gelu_backward", "")
          .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
              const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
              const OptionalTensor&, const OptionalTensor&, std::string_view, bool, std::array<bool, 3>)>();
  return op.call(grad_activated, z, x, weight, bias, grad_shortcut, activation, weight_column_major, output_mask);
}

inline at::Tensor call_mlp_residual(const at::Tensor& x, const at::Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                                    const at::Tensor& fc2_weight, const OptionalTensor& fc2_bias,
                                    const OptionalTensor& residual, std::string_view activation, bool recompute) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastlane::mlp_residual", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                            const OptionalTensor&, const OptionalTensor&, std::string_view, bool)>();
  return op.call(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, activation, recompute);
}

inline std::tuple<at::Tensor, at::Tensor> call_mlp_forward(
    const at::Tensor& x, const at::Tensor& fc1_weight, const OptionalTensor& fc1_bias, const at::Tensor& fc2_weight,
    const OptionalTensor& fc2_bias, const OptionalTensor& residual, std::string_view activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastlane::mlp_forward", "")
                             .typed<std::tuple<at::Tensor, at::Tensor>(
                                 const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                                 const OptionalTensor&, const OptionalTensor&, std::string_view)>();
  return op.call(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, activation);
}

inline MlpGradients call_mlp_backward(const at::Tensor& grad, const OptionalTensor& z, const OptionalTensor& x,
                                      const OptionalTensor& fc1_weight, const OptionalTensor& fc1_bias,
                                      const OptionalTensor& fc2_weight, const OptionalTensor& grad_shortcut,
                                      std::string_view activation, bool fc1_column_major, bool fc2_column_major,
                                      std::array<bool, 5> output_mask) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastlane::mlp_backward", "")
          .typed<MlpGradients(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                              const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, std::string_view,
                              bool, bool, std::array<bool, 5>)>();
  return op.call(grad, z, x, fc1_weight, fc1_bias, fc2_weight, grad_shortcut, activation, fc1_column_major,
                 fc2_column_major, output_mask);
}

inline at::Tensor call_residual_stack(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                                      const OptionalTensors& projections, const OptionalTensors& projection_biases,
                                      std::string_view shortcut, std::string_view activation, bool recompute) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastlane::residual_stack", "")
          .typed<at::Tensor(const at::Tensor&, at::TensorList, const OptionalTensors&, const OptionalTensors&,
                            const OptionalTensors&, std::string_view, std::string_view, bool)>();
  return op.call(x, weights, biases, projections, projection_biases, shortcut, activation, recompute);
}

inline std::tuple<at::Tensor, at::Tensor> call_residual_stack_forward(
    const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, const OptionalTensors& projections,
    const OptionalTensors& projection_biases, std::string_view shortcut, std::string_view activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastlane::residual_stack_forward", "")
                             .typed<std::tuple<at::Tensor, at::Tensor>(
                                 const at::Tensor&, at::TensorList, const OptionalTensors&, const OptionalTensors&,
                                 const OptionalTensors&, std::string_view, std::string_view)>();
  return op.call(x, weights, biases, projections, projection_biases, shortcut, activation);
}

inline std::vector<at::Tensor> call_residual_stack_backward(
    const at::Tensor& grad, const OptionalTensor& x, const OptionalTensors& weights, const OptionalTensors& biases,
    const OptionalTensors& projections, const OptionalTensors& projection_biases, const OptionalTensor& z,
    c10::SymIntArrayRef features, std::string_view shortcut, std::string_view activation, at::IntArrayRef needed,
    at::IntArrayRef column_major) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastlane::residual_stack_backward", "")
          .typed<std::vector<at::Tensor>(const at::Tensor&, const OptionalTensor&, const OptionalTensors&,
                                         const OptionalTensors&, const OptionalTensors&, const OptionalTensors&,
                                         const OptionalTensor&, c10::SymIntArrayRef, std::string_view,
                                         std::string_view, at::IntArrayRef, at::IntArrayRef)>();
  return op.call(grad, x, weights, biases, projections, projection_biases, z, features, shortcut, activation, needed,
                 column_major);
}

}  // namespace fastlane
