// Functions that the files of the Autograd key share: reasons to leave the fused path, and early checks.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <string_view>
#include <utility>

#include "ops/checks/checks.h"
#include "ops/policy.h"

namespace fastlane {

// Why a call may not reach the fused kernels, or null.
inline const char* reason_to_compose(at::TensorList tensors) {
  if (const char* reason = policy::why_disabled()) return reason;
  // As at::functorch::maybeCurrentDynamicLayer(), whose header includes one that torch does not ship.
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode))
    return "a torch.func transform is active";
  for (const at::Tensor& t : tensors) {
    if (!t.defined()) continue;
    if (t._fw_grad(/*level=*/0).defined()) return "forward-mode AD";
    // DTensor shards ATen's operators and refuses all others.
    if (policy::is_dtensor(t)) return "a DTensor";
  }
  return nullptr;
}

// Without this check the dispatcher would answer with a page of text, below the Autograd key.
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

// These functions are differentiable, unlike those of dense/layer_calls.h.
namespace differentiation {

// at::flatten has no rule in torch's older vmap, which is_grads_batched uses.
inline at::Tensor flatten_leading(const at::Tensor& t) {
  c10::SymInt rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.sym_size(i);
  return t.reshape_symint({rows, t.sym_size(-1)});
}

// torch cuts a sum to one element by threads, so its bits depend on their number. It does not cut a sum to a row.
inline at::Tensor sum_to_one(const at::Tensor& t) {
  constexpr int64_t kRow = 4096;
  const at::Tensor row = flatten_leading(t).sum(0, /*keepdim=*/false, at::kDouble);
  const c10::SymInt missing = (kRow - row.sym_size(0) % kRow) % kRow;
  const at::Tensor rows = at::constant_pad_nd_symint(row, {0, missing}).view({-1, kRow});
  return rows.sum(0).sum().to(t.scalar_type());
}

inline at::Tensor residual_grad(const at::Tensor& dy, c10::SymIntArrayRef sizes) {
  if (dy.sym_sizes() == sizes) return dy;
  // If columns share memory, the order of torch's sum depends on the threads too.
  const at::Tensor rows = dy.contiguous();
  const bool one_element = std::all_of(sizes.begin(), sizes.end(), [](const c10::SymInt& s) { return s == 1; });
  return one_element && rows.sym_numel() != 1 ? sum_to_one(rows).view_symint(sizes) : at::sum_to(rows, sizes);
}

}  // namespace differentiation

}  // namespace fastlane
