// Which of two paths a call takes: one fused product, or the library's product and one fused pass over it.
#pragma once

#include <optional>

#include "../kernels/layer.h"

namespace fastlane {

enum class Path { fused, library };

// What FASTLANE_PATH says; read once. Throws c10::ValueError if that is neither fused nor library.
std::optional<Path> forced_path();

Path cpu_forward_path(const LayerShape& shape);
Path cpu_backward_path(const LayerShape& shape);

}  // namespace fastlane
