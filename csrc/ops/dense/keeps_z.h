// Autograd's question about a stack.
#pragma once

#include "ops/checks/stack.h"

namespace fastlane {

// Whether forward keeps every z for backward. If the zs are large, their page faults cost more than computing them
// again: a narrow stack's kernel computes them in cache. In fp32 and fp64 the bits are the same; in 16-bit dtypes a
// kept z is rounded and a computed z is not.
bool keeps_z(const at::Tensor& x, const StackParameters& p, StackShortcut shortcut);

}  // namespace fastlane
