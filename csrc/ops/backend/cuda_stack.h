// A narrow stack on CUDA. Forward is one kernel. Backward is one kernel for every dz, and two for every dW and db.
#pragma once

#include "kernels/problem.h"

namespace fastlane {

bool cuda_is_one_kernel(const StackProblem& p);

// On CUDA a layer's z holds its output (kernels/cuda/narrow/stack.h).
void cuda_stack_forward(const StackProblem& p);
void cuda_stack_backward(const StackProblem& p);

}  // namespace fastlane
