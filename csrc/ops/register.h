// Registers the operators' kernels. They are the same functions for every device that has a backend.
#pragma once

#include <torch/library.h>

namespace fastlane {

void register_layer_operators(torch::Library& m);
void register_stack_operators(torch::Library& m);
void register_mlp_operators(torch::Library& m);

}  // namespace fastlane
