// Packed copies of weights, which fastlane_ext.freeze() makes and its modules own. A call finds a copy by the memory
// of the weight, and uses the copy only while the weight is as it was when the copy was made.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastlane {

// Packs the weight, and lets calls find the copy while the result lives. With `checks_content`, or under
// FASTLANE_STRICT=1, every call also compares the weight's values. Replaces an older copy. Raises as pack_weight
// does, and if the weight does not count its changes.
at::Tensor freeze_weight(const at::Tensor& weight, bool checks_content);

enum class Frozen { absent, used, changed };
// What a call would find for this weight.
Frozen frozen_state(const at::Tensor& weight);

// The copy, or an undefined tensor. policy::leave_fused_path hears of a weight that has changed.
at::Tensor frozen_copy(const at::Tensor& weight);

}  // namespace fastlane
