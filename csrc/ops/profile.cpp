#include "ops/profile.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <list>
#include <mutex>

namespace fastlane {
namespace {

constexpr size_t kDTypes = 4;

struct Point {
  std::array<double, 3> log_sizes;
  bool fused_wins;

  bool operator==(const Point&) const = default;
};
// Points by work and dtype.
using Profile = std::array<std::array<std::vector<Point>, kDTypes>, kWorks>;

std::atomic<const Profile*> current = nullptr;

std::array<double, 3> log_sizes(const LayerShape& shape) {
  const auto log = [](int64_t size) { return std::log2(static_cast<double>(std::max<int64_t>(1, size))); };
  return {log(shape.rows), log(shape.in_features), log(shape.out_features)};
}

}  // namespace

void set_profile(const std::vector<MeasuredPoint>& points) {
  // Another thread may still read an older profile, so each is kept, once: `fastlane tune` sets two in turns for each
  // point.
  static std::mutex mutex;
  static std::list<Profile> profiles;
  Profile profile;
  for (const MeasuredPoint& p : points)
    profile[static_cast<size_t>(p.work)][static_cast<size_t>(p.shape.dtype)].push_back(
        {log_sizes(p.shape), p.fused_wins});
  const std::lock_guard<std::mutex> lock(mutex);
  auto kept = std::find(profiles.begin(), profiles.end(), profile);
  if (kept == profiles.end()) kept = profiles.insert(kept, std::move(profile));
  current = points.empty() ? nullptr : &*kept;
}

std::optional<bool> fused_won(Work work, const LayerShape& shape) {
  const Profile* const profile = current.load(std::memory_order_acquire);
  if (!profile) return std::nullopt;
  static const double near = std::log2(kNear) + 1e-9;  // logarithms are rounded
  const std::array<double, 3> sizes = log_sizes(shape);
  std::optional<bool> result;
  double least = INFINITY;
  for (const Point& p : (*profile)[static_cast<size_t>(work)][static_cast<size_t>(shape.dtype)]) {
    double sum = 0, largest = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const double distance = std::abs(sizes[i] - p.log_sizes[i]);
      sum += distance, largest = std::max(largest, distance);
    }
    if (largest <= near && sum < least) least = sum, result = p.fused_wins;
  }
  return result;
}

}  // namespace fastlane
