// Whether the facts that fastlane_ext._facts found about classes, functions and globals still are true.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlane::python {

// Python's stand-in for an absent name. The package sets it once, while it is imported.
void set_absent(const pybind11::object& absent);

// Whether all facts, a tuple of (holder, name, value) tuples, still are true.
bool hold(PyObject* facts);

}  // namespace fastlane::python
