#include "plan_call.h"

#include "ops/policy.h"
#include "plain_module.h"

namespace fastlane {
namespace {

using namespace python;

// fastlane_ext._plan.Role.
enum class Role { linear, activation, dropout };
// The fields of fastlane_ext._plan.Child.
enum ChildField : Py_ssize_t { kName, kRole, kKind, kForward, kState, kFields };

bool is_equal(PyObject* a, PyObject* b) {
  if (!a || !b) return false;
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) throw py::error_already_set();
  return equal == 1;
}

bool is_active(PyObject* dropout) {
  const Keys& keys = Keys::get();
  if (keys.training.in(dropout) == Py_False) return false;
  PyObject* const p = keys.p.in(dropout);
  return p && !(PyFloat_CheckExact(p) && PyFloat_AS_DOUBLE(p) == 0);
}

// `state` holds (attribute, value) pairs.
bool has_state(PyObject* dict, PyObject* state) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(state); ++i) {
    PyObject* const pair = PyTuple_GET_ITEM(state, i);
    PyObject* const value = PyDict_GetItemWithError(dict, PyTuple_GET_ITEM(pair, 0));
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    if (!is_equal(value, PyTuple_GET_ITEM(pair, 1))) return false;
  }
  return true;
}

bool is_unchanged(PyObject* child, PyObject* found) {
  const Class expected{PyTuple_GET_ITEM(found, kKind), PyTuple_GET_ITEM(found, kForward)};
  PyObject* const dict = plain_dict(child, expected);
  if (!dict) return false;
  switch (static_cast<Role>(PyLong_AsLong(PyTuple_GET_ITEM(found, kRole)))) {
    case Role::linear: {
      at::Tensor weight, bias;
      // The other kind of linear layer is Conv1D.
      auto* const linear = reinterpret_cast<PyTypeObject*>(Torch::get().linear.kind);
      const bool transposed = !PyType_IsSubtype(Py_TYPE(child), linear);
      return read_linear(dict, transposed, weight, bias);
    }
    case Role::activation: return has_state(dict, PyTuple_GET_ITEM(found, kState));
    case Role::dropout: return !is_active(dict);
  }
  return false;
}

bool has_order(PyObject* children, PyObject* order) {
  if (order == Py_None) return true;
  if (PyDict_Size(children) != PyTuple_GET_SIZE(order)) return false;
  PyObject* name = nullptr;
  Py_ssize_t i = 0;
  for (Py_ssize_t position = 0; PyDict_Next(children, &position, &name, nullptr); ++i)
    if (!is_equal(name, PyTuple_GET_ITEM(order, i))) return false;
  return true;
}

}  // namespace

bool is_unchanged(const py::handle& children, const py::handle& order, const py::handle& found) {
  if (!PyDict_CheckExact(children.ptr()) || !PyTuple_Check(found.ptr())) return false;
  if (policy::why_disabled() || under_global_hooks() || !has_order(children.ptr(), order.ptr())) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(found.ptr()); ++i) {
    PyObject* const entry = PyTuple_GET_ITEM(found.ptr(), i);
    if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) != kFields) return false;
    PyObject* const child = PyDict_GetItemWithError(children.ptr(), PyTuple_GET_ITEM(entry, kName));
    if (!child) {
      if (PyErr_Occurred()) throw py::error_already_set();
      return false;
    }
    if (!is_unchanged(child, entry)) return false;
  }
  return true;
}

}  // namespace fastlane
