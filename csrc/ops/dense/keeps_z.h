// What autograd asks of a stack.
#pragma once

#include "ops/checks/stack.h"

namespace fastlane {

// Whether forward keeps every z for backward. Where they are many, page faults make keeping them dearer than
// computing them again, which the kernel that takes a block of rows through all layers does in cache. In fp32 and
// fp64 the bits are the same; in 16-bit dtypes a kept z is rounded and a computed one is not.
bool keeps_z(const at::Tensor& x, const StackParameters& p, StackShortcut shortcut);

}  // namespace fastlane
