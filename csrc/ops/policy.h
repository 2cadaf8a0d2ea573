// Whether a call may take the fused path, and the counters that prove which path it took.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <map>
#include <string>

#include "ops/path.h"

namespace fastlane::policy {

// Why every call of this thread runs the eager composition, or null: FASTLANE_DISABLE=1 or a Python block that says
// so. The environment is read once, when it is first needed, as FASTLANE_PATH and FASTLANE_STRICT are.
const char* why_disabled();
// Nests. Returns how many blocks are open in all threads: what is traced now may run in any of them.
int64_t disable(bool on);

// Python's answer whether a tensor is a DTensor. It is asked about tensors with the Python key alone: no other call
// shall wait for the interpreter.
void set_dtensor_test(bool (*test)(const at::Tensor&));
bool is_dtensor(const at::Tensor& t);

// Whether torch's own operators, differentiated by torch, are the path of a call on this tensor.
inline bool runs_torch(const at::Tensor& x) { return x.device().is_cpu() && torch_runs_on_cpu(); }

// Whether calls of this thread are counted from now on; returns whether they were.
bool count(bool on);
void count_forward(Path path);
void count_backward(Path path);

// Tests switch on what FASTLANE_STRICT=1 does.
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
