// The sizes of this machine's caches, from which the kernels choose how much of an operand a task holds.
#pragma once

#include <cstdint>

namespace fastlane {

struct Caches {
  int64_t l2 = 256 << 10;  // bytes, of one core
  int64_t last = 8 << 20;  // shared by all cores
};

// Asked once; what the system does not tell keeps the modest default.
const Caches& caches();

}  // namespace fastlane
