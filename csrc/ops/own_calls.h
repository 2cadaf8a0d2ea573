#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>

namespace fastlane {

// Autograd and autocast must not see the ATen calls inside an operator: they would differentiate and cast them.
struct OwnCalls {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

}  // namespace fastlane
