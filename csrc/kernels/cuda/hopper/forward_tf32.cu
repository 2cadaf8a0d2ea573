#include "kernels/cuda/hopper/gemm.cuh"

namespace fastlane::cuda {

bool hopper_forward_tf32(const GemmProblem& problem, HopperTile tile, int multiprocessors, Stream stream) {
  return hopper::run_forward<float>(problem, tile, multiprocessors, stream);
}

}  // namespace fastlane::cuda
