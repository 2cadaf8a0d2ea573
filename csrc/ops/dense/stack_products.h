// Counts the products of a stack's backward, for fastlane_ext/_flops.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastlane {

// For each layer, the number of products of rows × in × out in a backward that forms the gradients at the positions
// `needed`. `projects` flags the layers that have a projection.
std::vector<int64_t> stack_backward_products(const std::vector<int64_t>& features, const std::vector<bool>& projects,
                                             const std::string& shortcut, const std::string& activation, bool keeps_z,
                                             const std::vector<int64_t>& needed);

}  // namespace fastlane
