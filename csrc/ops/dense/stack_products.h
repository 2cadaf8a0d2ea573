// The products that a stack's backward forms, counted for fastlane_ext/_flops.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastlane {

// For each layer how many products of rows × in × out the backward of the gradients at the positions `needed` takes.
// `projects` says which layers have a projection.
std::vector<int64_t> stack_backward_products(const std::vector<int64_t>& features, const std::vector<bool>& projects,
                                             const std::string& shortcut, const std::string& activation, bool keeps_z,
                                             const std::vector<int64_t>& needed);

}  // namespace fastlane
