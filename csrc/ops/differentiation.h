// What the files of the Autograd key share: when a call leaves the fused path, and what is refused at once.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <string_view>
#include <utility>

#include "checks.h"
#include "policy.h"

namespace fastlane {

inline std::string_view name_of(Activation activation) {
  switch (activation) {
    case Activation::none: return "none";
    case Activation::gelu: return "gelu";
    case Activation::gelu_tanh: return "gelu_tanh";
  }
  return {};
}

// Why a call may not reach the fused kernels, or null.
inline const char* reason_to_compose(at::TensorList tensors) {
  if (policy::disabled()) return policy::kDisabled;
  // What at::functorch::maybeCurrentDynamicLayer() tells; its header needs one that torch does not ship.
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode))
    return "a torch.func transform is active";
  for (const at::Tensor& t : tensors)
    if (t.defined() && t._fw_grad(/*level=*/0).defined()) return "forward-mode AD";
  return nullptr;
}

// What the dispatcher would answer with a page of its own, below the Autograd key.
inline void check_device(const char* op, const at::Tensor& x) {
  const auto device = x.device();
  TORCH_CHECK(device.is_cpu() || device.is_cuda() || device.is_meta(), op, ": x is on ", device,
              ", expected cpu or cuda; move x and the parameters there");
}
inline void check_backend(const char* op,
                          std::initializer_list<std::pair<const char*, const at::Tensor&>> arguments) {
  for (const auto& [name, t] : arguments)
    if (t.defined()) check_dense(op, name, t);
  check_device(op, arguments.begin()->second);
}

}  // namespace fastlane
