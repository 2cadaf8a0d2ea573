// The sizes of this machine's caches. They decide how much of an operand a task holds.
#pragma once

#include <cstdint>

namespace fastlane {

struct Caches {
  int64_t l1 = 32 << 10;  // bytes, of one core, for data
  int64_t l2 = 256 << 10;  // of one core
  int64_t last = 8 << 20;  // shared by all cores
};

// Asks the system once. A size that the system does not tell keeps its modest default.
const Caches& caches();

}  // namespace fastlane
