#include "plan_call.h"

#include "ops/policy.h"
#include "plain_module.h"

namespace fastlane {
namespace {

using namespace python;

// fastlane_ext._plan.Role.
enum class Role { linear, activation, dropout };

bool is_active(PyObject* dropout) {
  const Keys& keys = Keys::get();
  if (keys.training.in(dropout) == Py_False) return false;
  PyObject* const p = keys.p.in(dropout);
  return p && !(PyFloat_CheckExact(p) && PyFloat_AS_DOUBLE(p) == 0);
}

bool is_unchanged(PyObject* child, PyObject* found) {
  PyObject *const role = PyTuple_GET_ITEM(found, 1), *const kind = PyTuple_GET_ITEM(found, 2),
                  *const approximate = PyTuple_GET_ITEM(found, 3);
  PyObject* const dict = plain_dict(child, kind);
  if (!dict) return false;
  switch (static_cast<Role>(PyLong_AsLong(role))) {
    case Role::linear: {
      at::Tensor weight, bias;
      return read_linear(dict, weight, bias);
    }
    case Role::activation:
      return approximate == Py_None ||
             PyObject_RichCompareBool(Keys::get().approximate.in(dict), approximate, Py_EQ) == 1;
    case Role::dropout: return !is_active(dict);
  }
  return false;
}

}  // namespace

bool is_unchanged(const py::handle& children, const py::handle& found) {
  constexpr Py_ssize_t kFields = 4;
  if (!PyDict_CheckExact(children.ptr()) || !PyTuple_Check(found.ptr())) return false;
  if (policy::why_disabled() || under_global_hooks()) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(found.ptr()); ++i) {
    PyObject* const entry = PyTuple_GET_ITEM(found.ptr(), i);
    if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) != kFields) return false;
    PyObject* const child = PyDict_GetItemWithError(children.ptr(), PyTuple_GET_ITEM(entry, 0));
    if (!child) {
      if (PyErr_Occurred()) throw py::error_already_set();
      return false;
    }
    if (!is_unchanged(child, entry)) return false;
  }
  return true;
}

}  // namespace fastlane
