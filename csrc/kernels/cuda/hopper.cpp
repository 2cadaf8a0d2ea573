#include "hopper.h"

#include "hopper_launch.h"

namespace fastlane::cuda {

bool has_hopper_kernels() { return true; }

bool hopper_gemm(const GemmProblem& problem, HopperKind kind, HopperTile tile, int multiprocessors, Stream stream) {
  if (problem.m == 0 || problem.n == 0) return true;
  const auto run = [&](HopperLaunch& launch) { return launch(problem, tile, multiprocessors, stream); };
  const bool forward = kind == HopperKind::forward;
  switch (problem.dtype) {
    case DType::bf16: return forward ? run(hopper_forward_bf16) : run(hopper_dgrad_bf16);
    case DType::f16: return forward ? run(hopper_forward_f16) : run(hopper_dgrad_f16);
    case DType::f32: return forward && run(hopper_forward_tf32);
    case DType::f64: break;
  }
  return false;
}

}  // namespace fastlane::cuda
