// Problems that take several kernels of a set, one after the other.
#pragma once

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/parallel.h"
#include "kernels/problem.h"

namespace fastlane {

void layer_backward(const KernelTable& kernels, const LayerBackwardProblem& problem, const Parallel& parallel);
void mlp_forward(const KernelTable& kernels, const MlpProblem& problem, const Parallel& parallel);
void mlp_backward(const KernelTable& kernels, const MlpBackwardProblem& problem, const Parallel& parallel);

}  // namespace fastlane
