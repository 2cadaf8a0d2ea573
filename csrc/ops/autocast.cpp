// Under autocast the products run in the low precision. A shortcut of another dtype is joined afterwards in the
// promoted dtype, as in eager, so a float32 residual stream stays float32.
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <torch/library.h>

#include "ops/checks/stack.h"
#include "ops/operators.h"

namespace fastlane {
namespace {

template <c10::DeviceType device>
struct Autocast {
  c10::impl::ExcludeDispatchKeyGuard no_autocast{at::autocast::get_autocast_dispatch_key_from_device_type(device)};
  at::ScalarType dtype = at::autocast::get_autocast_dtype(device);

  at::Tensor cast(const at::Tensor& t) const { return at::autocast::cached_cast(dtype, t, device); }
  OptionalTensor cast(const OptionalTensor& t) const { return at::autocast::cached_cast(dtype, t, device); }
};

template <c10::DeviceType device>
at::Tensor linear_gelu_residual(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& residual, std::string_view activation, bool recompute) {
  const Autocast<device> autocast;
  const at::Tensor low_x = autocast.cast(x);
  const bool same_dtype = residual && residual->scalar_type() == low_x.scalar_type();
  const at::Tensor y = call_linear_gelu_residual(low_x, autocast.cast(weight), autocast.cast(bias),
                                                 same_dtype ? residual : OptionalTensor(), activation, recompute);
  return residual && !same_dtype ? y + *residual : y;
}

template <c10::DeviceType device>
at::Tensor linear_gelu_concat(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                              std::string_view activation) {
  const Autocast<device> autocast;
  const at::Tensor low_x = autocast.cast(x);
  if (low_x.scalar_type() == x.scalar_type())
    return call_linear_gelu_concat(x, autocast.cast(weight), autocast.cast(bias), activation);
  const at::Tensor activated =
      call_linear_gelu_residual(low_x, autocast.cast(weight), autocast.cast(bias), {}, activation, false);
  return at::cat({x, activated}, -1);
}

template <c10::DeviceType device>
at::Tensor mlp_residual(const at::Tensor& x, const at::Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                        const at::Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& residual,
                        std::string_view activation, bool recompute) {
  const Autocast<device> autocast;
  const at::Tensor low_x = autocast.cast(x);
  const bool same_dtype = residual && residual->scalar_type() == low_x.scalar_type();
  const at::Tensor y =
      call_mlp_residual(low_x, autocast.cast(fc1_weight), autocast.cast(fc1_bias), autocast.cast(fc2_weight),
                        autocast.cast(fc2_bias), same_dtype ? residual : OptionalTensor(), activation, recompute);
  return residual && !same_dtype ? y + *residual : y;
}

// Eager's residual stream has a wider dtype than the products. So the stack runs layer by layer, each layer with its
// own casts, unless no value wider than the low precision has to be kept.
template <c10::DeviceType device>
at::Tensor residual_stack(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                          const OptionalTensors& projections, const OptionalTensors& projection_biases,
                          std::string_view shortcut_name, std::string_view activation, bool recompute) {
  const StackShortcut shortcut = parse_shortcut(shortcut_name);
  const StackParameters p = stack_parameters(weights, biases, projections, projection_biases);
  if (shortcut == StackShortcut::none || x.scalar_type() == at::autocast::get_autocast_dtype(device)) {
    const Autocast<device> autocast;
    const auto cast = [&](const std::vector<at::Tensor>& tensors) {
      OptionalTensors list;
      for (const at::Tensor& t : tensors) list.push_back(autocast.cast(optional(t)));
      return list;
    };
    std::vector<at::Tensor> low_weights;
    for (const at::Tensor& weight : p.weights) low_weights.push_back(autocast.cast(weight));
    return call_residual_stack(autocast.cast(x), low_weights, cast(p.biases), cast(p.projections),
                               cast(p.projection_biases), shortcut_name, activation, recompute);
  }
  return stack_by_layer(
      x, p, shortcut,
      [&](const at::Tensor& h, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
          bool is_projection) {
        return call_linear_gelu_residual(h, weight, bias, residual, is_projection ? "none" : activation, recompute);
      },
      [&](const at::Tensor& h, const at::Tensor& weight, const OptionalTensor& bias) {
        return call_linear_gelu_concat(h, weight, bias, activation);
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlane, AutocastCPU, m) {
  m.impl("linear_gelu_residual", linear_gelu_residual<at::kCPU>);
  m.impl("linear_gelu_concat", linear_gelu_concat<at::kCPU>);
  m.impl("mlp_residual", mlp_residual<at::kCPU>);
  m.impl("residual_stack", residual_stack<at::kCPU>);
}
TORCH_LIBRARY_IMPL(fastlane, AutocastCUDA, m) {
  m.impl("linear_gelu_residual", linear_gelu_residual<at::kCUDA>);
  m.impl("linear_gelu_concat", linear_gelu_concat<at::kCUDA>);
  m.impl("mlp_residual", mlp_residual<at::kCUDA>);
  m.impl("residual_stack", residual_stack<at::kCUDA>);
}

}  // namespace fastlane
