#include "kernels/cuda/hopper/gemm.cuh"

namespace fastlane::cuda {

bool hopper_forward_f16(const GemmProblem& problem, HopperTile tile, int multiprocessors, Stream stream) {
  return hopper::run_forward<cutlass::half_t>(problem, tile, multiprocessors, stream);
}

}  // namespace fastlane::cuda
