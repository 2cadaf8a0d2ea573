// The question that a fused module asks at every call (fastlane_ext/fusion/classes.py), without Python in between.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlane {

// Whether fused operations are enabled and all that a plan rests on (`Plan.checks` of fusion/plan.py) is true of its
// module. False may also mean that Python has to look closer.
bool is_as_planned(const pybind11::handle& module, const pybind11::handle& checks);

}  // namespace fastlane
