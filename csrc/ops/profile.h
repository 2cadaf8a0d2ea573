// Which path was faster on this CPU, as `fastlane tune` measured. fastlane_ext/_profile.py reads the profile's file
// when the package is imported.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/layer.h"

namespace fastlane {

// A stack's forward and backward take one path, so they are measured together.
enum class Work : uint8_t { layer_forward, layer_backward, mlp_forward, mlp_backward, stack };
constexpr int kWorks = 5;
constexpr const char* kWorkNames[kWorks] = {"layer_forward", "layer_backward", "mlp_forward", "mlp_backward",
                                            "stack"};

// The shape of an MLP is its first layer's, the shape of a stack its largest layer's.
struct MeasuredPoint {
  Work work;
  LayerShape shape;
  bool fused_wins;
};

void set_profile(const std::vector<MeasuredPoint>& points);

// Whether the fused path won at the nearest point. Nothing if every point is more than kNear times as large or as
// small in one of its sizes.
constexpr double kNear = 3;
std::optional<bool> fused_won(Work work, const LayerShape& shape);

}  // namespace fastlane
