// Which stacks run as one kernel. It takes a block of rows through all layers, instead of all rows through one layer
// after the other.
#pragma once

#include <algorithm>

#include "kernels/cpu/caches.h"
#include "kernels/problem.h"

namespace fastlane {

// Narrow means: every weight stays in L2 beside a block of rows, and all packed weights together are bounded.
// Projections are not counted and may double the packed size.
inline bool is_narrow(const StackProblem& p, const Caches& caches) {
  constexpr int64_t kMaxFeatures = 1024, kMaxBytes = int64_t{16} << 20;
  constexpr int64_t kCopies = 2;  // W for the way back, Wᵀ for the way forward
  const int64_t value_bytes = p.dtype == DType::f64 ? 8 : 4;
  int64_t all_bytes = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    const StackLayer& layer = p.layers[i];
    const int64_t bytes = layer.in_features * layer.out_features * value_bytes;
    if (std::max(layer.in_features, layer.out_features) > kMaxFeatures || bytes > caches.l2 / 4) return false;
    all_bytes += kCopies * bytes;
  }
  return all_bytes <= kMaxBytes;
}

}  // namespace fastlane
