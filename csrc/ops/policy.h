// Whether a call may take the fused path, and the counters that prove which path it took.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace fastlane::policy {

// FASTLANE_DISABLE=1: every call runs the eager composition. Read once.
bool disabled();
inline constexpr char kDisabled[] = "FASTLANE_DISABLE is set";

void count_fused_forward();
void count_fused_backward();
// The library's GEMM and one fused pass (path.h).
void count_library_forward();
void count_library_backward();

// Counts a call that leaves the fused path. Throws under FASTLANE_STRICT=1, naming the reason.
void leave_fused_path(const std::string& reason);

struct Stats {
  int64_t fused_forward, fused_backward;
  int64_t library_forward, library_backward;
  std::map<std::string, int64_t> fallback;
};
Stats stats();
void reset_stats();

}  // namespace fastlane::policy
