#include "python/profile.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <iterator>

#include "ops/path.h"
#include "ops/profile.h"
#include "python/dtypes.h"

namespace fastlane::python {
namespace {

namespace py = pybind11;

Work work_named(const std::string& name) {
  const auto* const found = std::find(std::begin(kWorkNames), std::end(kWorkNames), name);
  if (found == std::end(kWorkNames))
    throw py::value_error("work: got '" + name +
                          "', expected layer_forward, layer_backward, mlp_forward, mlp_backward or stack");
  return static_cast<Work>(found - std::begin(kWorkNames));
}

}  // namespace

void set_profile(const std::vector<ProfilePoint>& points) {
  std::vector<MeasuredPoint> measured;
  measured.reserve(points.size());
  for (const auto& [work, dtype, rows, in_features, out_features, fused_wins] : points)
    measured.push_back({work_named(work), {rows, in_features, out_features, parsed_dtype(dtype)}, fused_wins});
  fastlane::set_profile(measured);
}

bool fuses(const std::string& work, const std::string& dtype, int64_t rows, int64_t in_features,
           int64_t out_features) {
  const LayerShape first{rows, in_features, out_features, parsed_dtype(dtype)};
  const LayerShape second{rows, out_features, in_features, first.dtype};
  switch (work_named(work)) {
    case Work::layer_forward: return fuses_forward(first);
    case Work::layer_backward: return fuses_backward(first);
    case Work::mlp_forward: return fuses_mlp_forward(first, second);
    case Work::mlp_backward: return fuses_mlp_backward(first, second);
    case Work::stack: break;
  }
  const StackLayer layer{.in_features = in_features, .out_features = out_features};
  StackProblem stack;
  stack.rows = rows, stack.count = 1, stack.dtype = first.dtype, stack.layers = &layer;
  return fuses_stack(stack);
}

}  // namespace fastlane::python
