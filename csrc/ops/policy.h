// Whether a call may take the fused path, and the counters that prove which path it took.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <map>
#include <string>

#include "ops/path.h"

namespace fastlane::policy {

// The reason why every call of this thread runs the eager composition, or null: FASTLANE_DISABLE=1, or a Python block
// of disabled(). FASTLANE_DISABLE, FASTLANE_PATH and FASTLANE_STRICT are read once, at the first use.
const char* why_disabled();
// Blocks nest. Returns how many are open in all threads: a graph traced now may run in any thread.
int64_t disable(bool on);

// `test` asks Python whether a tensor is a DTensor. It is called only for tensors with the Python key, so that no
// other call waits for the interpreter.
void set_dtensor_test(bool (*test)(const at::Tensor&));
bool is_dtensor(const at::Tensor& t);

// Whether a call on this tensor runs torch's own operators, which torch differentiates.
inline bool runs_torch(const at::Tensor& x) { return x.device().is_cpu() && torch_runs_on_cpu(); }

// Sets whether calls of this thread are counted. Returns the setting before.
bool count(bool on);
void count_forward(Path path);
void count_backward(Path path);

bool is_strict();
// Has the effect of FASTLANE_STRICT=1, for tests.
void set_strict(bool on);
// Counts a call that leaves the fused path. Throws under FASTLANE_STRICT=1, naming the reason.
void leave_fused_path(const std::string& reason);

struct Stats {
  std::array<int64_t, kPaths> forward, backward;
  std::map<std::string, int64_t> fallback;
};
Stats stats();
void reset_stats();

}  // namespace fastlane::policy
