// A fused module's check at every call (fastlane_ext/fusion/classes.py), without Python in between.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlane {

// Whether fused operations are enabled and every check of a plan (`Plan.checks` of fusion/plan.py) is true of its
// module. After False Python looks closer, and may find that the plan still is true.
bool is_as_planned(const pybind11::handle& module, const pybind11::handle& checks);

}  // namespace fastlane
