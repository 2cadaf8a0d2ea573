#include "python/facts.h"

namespace fastlane::python {
namespace {

namespace py = pybind11;

PyObject* absent = nullptr;

// Borrowed; null where absent.
PyObject* now(PyObject* holder, PyObject* name) {
  if (PyType_Check(holder)) return _PyType_Lookup(reinterpret_cast<PyTypeObject*>(holder), name);
  if (PyCell_Check(holder)) return PyCell_GET(holder);
  PyObject* const value = PyDict_GetItemWithError(holder, name);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool has_code(PyObject* function, PyObject* value) {
  const auto is = [&](Py_ssize_t i, PyObject* found) {
    return (found ? found : Py_None) == PyTuple_GET_ITEM(value, i);
  };
  return PyTuple_Check(value) && PyTuple_GET_SIZE(value) == 3 && is(0, PyFunction_GET_CODE(function)) &&
         is(1, PyFunction_GET_DEFAULTS(function)) && is(2, PyFunction_GET_KW_DEFAULTS(function));
}

bool holds(PyObject* fact) {
  if (!PyTuple_Check(fact) || PyTuple_GET_SIZE(fact) != 3) return false;
  PyObject *const holder = PyTuple_GET_ITEM(fact, 0), *const value = PyTuple_GET_ITEM(fact, 2);
  if (PyFunction_Check(holder)) return has_code(holder, value);
  if (!PyType_Check(holder) && !PyCell_Check(holder) && !PyDict_Check(holder)) return false;
  PyObject* const found = now(holder, PyTuple_GET_ITEM(fact, 1));
  return found ? found == value : value == absent;
}

}  // namespace

void set_absent(const py::object& value) {
  Py_XDECREF(absent);
  absent = py::object(value).release().ptr();  // kept at exit: the interpreter may end before static objects do
}

bool hold(PyObject* facts) {
  if (!PyTuple_Check(facts)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(facts); ++i)
    if (!holds(PyTuple_GET_ITEM(facts, i))) return false;
  return true;
}

}  // namespace fastlane::python
