// Connects the choice of a Hopper kernel with the files that hold the kernels, one file for each dtype and kind.
#pragma once

#include "kernels/cuda/hopper/hopper.h"

namespace fastlane::cuda {

using HopperLaunch = bool(const GemmProblem&, HopperTile, int multiprocessors, Stream);

HopperLaunch hopper_forward_bf16, hopper_forward_f16, hopper_forward_tf32;
HopperLaunch hopper_dgrad_bf16, hopper_dgrad_f16;
HopperLaunch hopper_through_activation_bf16, hopper_through_activation_f16;

}  // namespace fastlane::cuda
