// Under autocast the products run in the low precision; a shortcut of another dtype is joined afterwards in the
// promoted dtype, as eager does, so that a float32 residual stream stays float32.
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <torch/library.h>

#include "operators.h"

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

}  // namespace

TORCH_LIBRARY_IMPL(fastlane, AutocastCPU, m) {
  m.impl("linear_gelu_residual", linear_gelu_residual<at::kCPU>);
  m.impl("linear_gelu_concat", linear_gelu_concat<at::kCPU>);
}
TORCH_LIBRARY_IMPL(fastlane, AutocastCUDA, m) {
  m.impl("linear_gelu_residual", linear_gelu_residual<at::kCUDA>);
  m.impl("linear_gelu_concat", linear_gelu_concat<at::kCUDA>);
}

}  // namespace fastlane
