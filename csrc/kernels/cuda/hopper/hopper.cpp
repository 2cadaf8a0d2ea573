#include "kernels/cuda/hopper/hopper.h"

#include "kernels/cuda/hopper/launch.h"

namespace fastlane::cuda {
namespace {

// The kernel of a kind, for bf16, f16 and TF32.
HopperLaunch* launch_of(HopperKind kind, DType dtype) {
  const auto by_dtype = [&](HopperLaunch* bf16, HopperLaunch* f16, HopperLaunch* f32) {
    return dtype == DType::bf16 ? bf16 : dtype == DType::f16 ? f16 : dtype == DType::f32 ? f32 : nullptr;
  };
  switch (kind) {
    case HopperKind::forward: return by_dtype(hopper_forward_bf16, hopper_forward_f16, hopper_forward_tf32);
    case HopperKind::dgrad: return by_dtype(hopper_dgrad_bf16, hopper_dgrad_f16, nullptr);
    case HopperKind::through_activation:
      return by_dtype(hopper_through_activation_bf16, hopper_through_activation_f16, nullptr);
    case HopperKind::none: break;
  }
  return nullptr;
}

}  // namespace

bool has_hopper_kernels() { return true; }

bool hopper_gemm(const GemmProblem& problem, HopperKind kind, HopperTile tile, int multiprocessors, void* workspace,
                 Stream stream) {
  if (problem.m == 0 || problem.n == 0) return true;
  HopperLaunch* const launch = launch_of(kind, problem.dtype);
  if (!launch) return false;
  GemmProblem by_tiles = problem;
  void* const column_sums = problem.gradient.column_sums;
  if (column_sums) by_tiles.gradient.column_sums = workspace;
  if (!launch(by_tiles, tile, multiprocessors, stream)) return false;
  if (!column_sums) return true;
  const TileGrid grid(problem, tile);
  sum_rows({workspace, grid.covered_cols}, grid.rows * column_sum_rows(tile), problem.n, problem.dtype, column_sums,
           stream);
  return true;
}

}  // namespace fastlane::cuda
