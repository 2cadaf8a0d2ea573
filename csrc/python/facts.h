// Whether what fastlane_ext._facts found of classes, functions and globals still is so.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlane::python {

// Python's stand-in for a name that is not there is set once, while the package is imported.
void set_absent(const pybind11::object& absent);

// Whether all facts, a tuple of (holder, name, value), still are true.
bool hold(PyObject* facts);

}  // namespace fastlane::python
