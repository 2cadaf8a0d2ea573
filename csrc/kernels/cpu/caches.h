// The sizes of this machine's caches. They decide how much of an operand a task holds.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace fastlane {

struct Caches {
  int64_t l1 = 32 << 10;  // bytes, of one core, for data
  int64_t l2 = 256 << 10;  // of one core
  int64_t last = 8 << 20;  // shared by all cores
};

// FASTLANE_CACHES if that is set, to run what another machine would run. Otherwise asks the system once; a size that
// the system does not tell keeps its modest default.
const Caches& caches();

// The bytes of the three levels from a text such as "32768,524288,33554432". Nothing unless these are three whole
// numbers from 1 on, none larger than the next.
std::optional<Caches> parse_caches(const std::string& text);

}  // namespace fastlane
