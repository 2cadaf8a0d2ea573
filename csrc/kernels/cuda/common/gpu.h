// Properties of a GPU that the choice of a path reads.
#pragma once

namespace fastlane::cuda {

struct Gpu {
  int capability = 0;  // 90 is compute capability 9.0
  int multiprocessors = 0;
};

// Describes the current device; throws std::runtime_error if there is none.
Gpu current_gpu();

}  // namespace fastlane::cuda
