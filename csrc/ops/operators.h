// Typed handles to the operators of schema.cpp. A call goes through the dispatcher and skips the excluded keys.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/types.h"

namespace fastlane {

// The signatures of schema.cpp in C++. These functions are never defined; the handles take their types.
namespace signatures {

at::Tensor linear_gelu_residual(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& residual, std::string_view activation, bool recompute);
at::Tensor linear_gelu_concat(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                              std::string_view activation);
std::tuple<at::Tensor, at::Tensor> linear_gelu_forward(const at::Tensor& x, const at::Tensor& weight,
                                                       const OptionalTensor& bias, const OptionalTensor& residual,
                                                       std::string_view activation, bool concat);
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_gelu_backward(
    const at::Tensor& grad_activated, const OptionalTensor& z, const OptionalTensor& x, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& grad_shortcut, std::string_view activation,
    bool weight_column_major, std::array<bool, 3> output_mask);

at::Tensor mlp_residual(const at::Tensor& x, const at::Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                        const at::Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& residual,
                        std::string_view activation, bool recompute);
std::tuple<at::Tensor, at::Tensor> mlp_forward(const at::Tensor& x, const at::Tensor& fc1_weight,
                                               const OptionalTensor& fc1_bias, const at::Tensor& fc2_weight,
                                               const OptionalTensor& fc2_bias, const OptionalTensor& residual,
                                               std::string_view activation);
MlpGradients mlp_backward(const at::Tensor& grad, const OptionalTensor& z, const OptionalTensor& x,
                          const OptionalTensor& fc1_weight, const OptionalTensor& fc1_bias,
                          const OptionalTensor& fc2_weight, const OptionalTensor& grad_shortcut,
                          std::string_view activation, bool fc1_column_major, bool fc2_column_major,
                          std::array<bool, 5> output_mask);

at::Tensor residual_stack(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                          const OptionalTensors& projections, const OptionalTensors& projection_biases,
                          std::string_view shortcut, std::string_view activation, bool recompute);
std::tuple<at::Tensor, at::Tensor> residual_stack_forward(const at::Tensor& x, at::TensorList weights,
                                                          const OptionalTensors& biases,
                                                          const OptionalTensors& projections,
                                                          const OptionalTensors& projection_biases,
                                                          std::string_view shortcut, std::string_view activation);
std::vector<at::Tensor> residual_stack_backward(const at::Tensor& grad, const OptionalTensor& x,
                                                const OptionalTensors& weights, const OptionalTensors& biases,
                                                const OptionalTensors& projections,
                                                const OptionalTensors& projection_biases, const OptionalTensor& z,
                                                c10::SymIntArrayRef features, std::string_view shortcut,
                                                std::string_view activation, at::IntArrayRef needed,
                                                at::IntArrayRef column_major);

}  // namespace signatures

template <class Name, class Signature>
struct Operator;
template <class Name, class Result, class... Arguments>
struct Operator<Name, Result(Arguments...)> {
  Result operator()(Arguments... arguments) const {
    static const auto handle =
        c10::Dispatcher::singleton().findSchemaOrThrow(Name::text, "").template typed<Result(Arguments...)>();
    return handle.call(std::forward<Arguments>(arguments)...);
  }
};

#define FASTLANE_OPERATOR(name)                             \
  struct NameOf_##name {                                    \
    static constexpr const char* text = "fastlane::" #name; \
  };                                                        \
  constexpr Operator<NameOf_##name, decltype(signatures::name)> call_##name{};

FASTLANE_OPERATOR(linear_gelu_residual)
FASTLANE_OPERATOR(linear_gelu_concat)
FASTLANE_OPERATOR(linear_gelu_forward)
FASTLANE_OPERATOR(linear_gelu_backward)
FASTLANE_OPERATOR(mlp_residual)
FASTLANE_OPERATOR(mlp_forward)
FASTLANE_OPERATOR(mlp_backward)
FASTLANE_OPERATOR(residual_stack)
FASTLANE_OPERATOR(residual_stack_forward)
FASTLANE_OPERATOR(residual_stack_backward)

#undef FASTLANE_OPERATOR

}  // namespace fastlane
