#include "policy.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <mutex>

namespace fastlane::policy {
namespace {

bool is_set(const char* variable) {
  const char* text = std::getenv(variable);
  const std::string value = text ? text : "";
  TORCH_CHECK_VALUE(value.empty() || value == "0" || value == "1", variable, ": got '", value,
                    "', expected 0 or 1; unset it for 0");
  return value == "1";
}

std::atomic<int64_t> fused_forward{0};
std::atomic<int64_t> fused_backward{0};
std::atomic<int64_t> library_forward{0};
std::atomic<int64_t> library_backward{0};
std::mutex fallback_mutex;
std::map<std::string, int64_t> fallback;

}  // namespace

bool disabled() {
  static const bool value = is_set("FASTLANE_DISABLE");
  return value;
}

void count_fused_forward() { fused_forward.fetch_add(1, std::memory_order_relaxed); }
void count_fused_backward() { fused_backward.fetch_add(1, std::memory_order_relaxed); }
void count_library_forward() { library_forward.fetch_add(1, std::memory_order_relaxed); }
void count_library_backward() { library_backward.fetch_add(1, std::memory_order_relaxed); }

void leave_fused_path(const std::string& reason) {
  TORCH_CHECK(!is_set("FASTLANE_STRICT"), "FASTLANE_STRICT: this call would leave the fused path: ", reason,
              "; unset FASTLANE_STRICT to let it run in eager PyTorch");
  const std::lock_guard<std::mutex> lock(fallback_mutex);
  ++fallback[reason];
}

Stats stats() {
  const std::lock_guard<std::mutex> lock(fallback_mutex);
  return {fused_forward.load(), fused_backward.load(), library_forward.load(), library_backward.load(), fallback};
}

void reset_stats() {
  const std::lock_guard<std::mutex> lock(fallback_mutex);
  fused_forward = 0;
  fused_backward = 0;
  library_forward = 0;
  library_backward = 0;
  fallback.clear();
}

}  // namespace fastlane::policy
