// For a build without CUTLASS, or not for sm_90a.
#include <stdexcept>

#include "kernels/cuda/hopper/hopper.h"

namespace fastlane::cuda {

bool has_hopper_kernels() { return false; }

bool hopper_gemm(const GemmProblem&, HopperKind, HopperTile, int, void*, Stream) {
  throw std::logic_error("fastlane_ext: this build has no Hopper kernels");
}

}  // namespace fastlane::cuda
