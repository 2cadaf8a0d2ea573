#include "ops/dense/stack_products.h"

#include "ops/checks/stack.h"

namespace fastlane {

std::vector<int64_t> stack_backward_products(const std::vector<int64_t>& features, const std::vector<bool>& projects,
                                             const std::string& shortcut, const std::string& activation, bool keeps_z,
                                             const std::vector<int64_t>& needed) {
  const size_t layers = projects.size();
  const std::vector<c10::SymInt> sizes(features.begin(), features.end());
  const StackReads plan(projects, sizes, parse_shortcut(shortcut), parse_activation(activation), keeps_z,
                        stack_flags(needed, layers));
  std::vector<int64_t> products;
  for (size_t i = 0; i < layers; ++i) {
    const StackLayerReads& r = plan.reads[i];
    const StackLayerUse& use = plan.uses[i];
    products.push_back(r.dh + r.forms_z + use.dweight + use.dprojection + (use.projects ? r.dh + r.output : 0));
  }
  return products;
}

}  // namespace fastlane
