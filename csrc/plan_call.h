// The question that a fused module asks at every call (fastlane_ext/fused_classes.py), without Python in between.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlane {

// Whether fused operations are enabled and the children are what the plan found: `children` is the module's dict of
// them, `order` None or the names that it must have, `found` a tuple of fastlane_ext._plan.Child. False may also mean
// that Python has to look closer.
bool is_unchanged(const pybind11::handle& children, const pybind11::handle& order, const pybind11::handle& found);

}  // namespace fastlane
