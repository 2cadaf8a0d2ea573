#include "ops/policy.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <utility>

#include "kernels/cpu/caches.h"

namespace fastlane::policy {
namespace {

bool is_set(const char* variable) {
  const char* text = std::getenv(variable);
  const std::string value = text ? text : "";
  TORCH_CHECK_VALUE(value.empty() || value == "0" || value == "1", variable, ": got '", value,
                    "', expected 0 or 1; unset it for 0");
  return value == "1";
}

void check_trace() {
  const char* const text = std::getenv("FASTLANE_TRACE");
  const std::string value = text ? text : "";
  TORCH_CHECK_VALUE(value.empty() || value == "plan", "FASTLANE_TRACE: got '", value,
                    "', expected plan; unset it to print nothing");
}

void check_caches() {
  const char* const text = std::getenv("FASTLANE_CACHES");
  const std::string value = text ? text : "";
  TORCH_CHECK_VALUE(
      value.empty() || parse_caches(value), "FASTLANE_CACHES: got '", value,
      "', expected bytes of L1, L2 and the last level, such as 32768,524288,33554432; unset it to ask the "
      "system");
}

using Counts = std::array<std::atomic<int64_t>, kPaths>;
Counts forward_counts{}, backward_counts{};
thread_local int disabled_blocks = 0;
std::atomic<int64_t> all_disabled_blocks{0};
std::atomic<bool> forced_strict{false};
thread_local bool counts = true;
bool (*dtensor_test)(const at::Tensor&) = nullptr;
std::mutex fallback_mutex;
std::map<std::string, int64_t> fallback;

void add_to(Counts& calls, Path path) {
  if (counts) calls[static_cast<size_t>(path)].fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

const char* why_disabled() {
  static const bool by_variable = is_set("FASTLANE_DISABLE");
  // Wrong values raise at the first call.
  static const bool is_valid = (is_set("FASTLANE_STRICT"), check_trace(), check_caches(), true);
  static_cast<void>(is_valid);
  if (by_variable) return "FASTLANE_DISABLE is set";
  return disabled_blocks > 0 ? "fastlane_ext.disabled() is active" : nullptr;
}
int64_t disable(bool on) {
  const int change = on ? 1 : disabled_blocks > 0 ? -1 : 0;
  disabled_blocks += change;
  return all_disabled_blocks += change;
}

void set_dtensor_test(bool (*test)(const at::Tensor&)) { dtensor_test = test; }
bool is_dtensor(const at::Tensor& t) {
  return t.key_set().has(c10::DispatchKey::Python) && dtensor_test && dtensor_test(t);
}

bool count(bool on) { return std::exchange(counts, on); }
void count_forward(Path path) { add_to(forward_counts, path); }
void count_backward(Path path) { add_to(backward_counts, path); }

void set_strict(bool on) { forced_strict = on; }

bool is_strict() {
  static const bool by_variable = is_set("FASTLANE_STRICT");
  return by_variable || forced_strict;
}

void leave_fused_path(const std::string& reason) {
  TORCH_CHECK(!is_strict(), "FASTLANE_STRICT: this call would leave the fused path: ", reason,
              "; unset FASTLANE_STRICT to let it run in eager PyTorch");
  const std::lock_guard<std::mutex> lock(fallback_mutex);
  ++fallback[reason];
}

Stats stats() {
  const std::lock_guard<std::mutex> lock(fallback_mutex);
  Stats result{{}, {}, fallback};
  std::copy(forward_counts.begin(), forward_counts.end(), result.forward.begin());
  std::copy(backward_counts.begin(), backward_counts.end(), result.backward.begin());
  return result;
}

void reset_stats() {
  const std::lock_guard<std::mutex> lock(fallback_mutex);
  for (Counts* calls : {&forward_counts, &backward_counts})
    for (auto& n : *calls) n = 0;
  fallback.clear();
}

}  // namespace fastlane::policy
