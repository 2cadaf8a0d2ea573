// Which of two paths a CPU call takes: one fused product, or the library's product and one fused pass over it.
#pragma once

#include "../kernels/layer.h"

namespace fastlane {

enum class Path { fused, library };

// FASTLANE_PATH=fused or library forces one; read once. Throws c10::ValueError if it says anything else.
Path forward_path(const LayerShape& shape);
Path backward_path(const LayerShape& shape);

}  // namespace fastlane
