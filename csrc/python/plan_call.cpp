#include "python/plan_call.h"

#include "ops/policy.h"
#include "python/facts.h"
#include "python/plain_module.h"

namespace fastlane {
namespace {

using namespace python;

// fastlane_ext.fusion.plan.Role.
enum class Role { linear, transposed_linear, activation, dropout };
// The fields of fastlane_ext.fusion.plan.Child.
enum ChildField : Py_ssize_t { kName, kRole, kKind, kState, kOfClass, kFields };
// The fields of fastlane_ext.fusion.plan.Plan.checks. The order may be None; the class is a type, the rest are
// tuples.
enum CheckField : Py_ssize_t { kFacts, kClass, kLookups, kNames, kOrder, kConstants, kChildren, kCheckFields };

bool is_equal(PyObject* a, PyObject* b) {
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) throw py::error_already_set();
  return equal == 1;
}

// `value` is a fastlane_ext.fusion.activations.Partial.
bool is_same_partial(PyObject* now, PyObject* value) {
  static PyObject* const kind = py::object(py::module_::import("functools").attr("partial")).release().ptr();
  if (reinterpret_cast<PyObject*>(Py_TYPE(now)) != kind || PyTuple_GET_SIZE(value) != 3) return false;
  const py::handle partial(now);
  return partial.attr("func").ptr() == PyTuple_GET_ITEM(value, 0) &&
         is_equal(partial.attr("args").ptr(), PyTuple_GET_ITEM(value, 1)) &&
         is_equal(partial.attr("keywords").ptr(), PyTuple_GET_ITEM(value, 2));
}

bool is_constant(PyObject* value) {
  return PyUnicode_CheckExact(value) || PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value);
}

// As fastlane_ext.fusion.activations.is_same.
bool is_same(PyObject* now, PyObject* value) {
  if (!now) return false;
  if (PyTuple_Check(value)) return is_same_partial(now, value);
  return now == value || (Py_TYPE(now) == Py_TYPE(value) && is_constant(value) && is_equal(now, value));
}

bool is_active(PyObject* dropout) {
  const Keys& keys = Keys::get();
  if (keys.training.in(dropout) == Py_False) return false;
  PyObject* const p = keys.p.in(dropout);
  return p && !(PyFloat_CheckExact(p) && PyFloat_AS_DOUBLE(p) == 0);
}

// `pairs` holds (attribute, value) pairs.
bool has_attributes(PyObject* dict, PyObject* pairs) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(pairs); ++i) {
    PyObject* const pair = PyTuple_GET_ITEM(pairs, i);
    if (!is_same(item(dict, PyTuple_GET_ITEM(pair, 0)), PyTuple_GET_ITEM(pair, 1))) return false;
  }
  return true;
}

bool is_child_unchanged(PyObject* child, PyObject* found) {
  PyObject* const dict = plain_dict(child, PyTuple_GET_ITEM(found, kKind));
  if (!dict) return false;
  at::Tensor weight, bias;
  switch (static_cast<Role>(PyLong_AsLong(PyTuple_GET_ITEM(found, kRole)))) {
    case Role::linear: return read_linear(dict, /*transposed=*/false, weight, bias);
    case Role::transposed_linear: return read_linear(dict, /*transposed=*/true, weight, bias);
    case Role::activation:
      return has_attributes(dict, PyTuple_GET_ITEM(found, kState)) &&
             has_none_of(dict, names_of(PyTuple_GET_ITEM(found, kOfClass)));
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

bool are_children_unchanged(PyObject* children, PyObject* found) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(found); ++i) {
    PyObject* const entry = PyTuple_GET_ITEM(found, i);
    if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) != kFields) return false;
    PyObject* const child = item(children, PyTuple_GET_ITEM(entry, kName));
    if (!child || !is_child_unchanged(child, entry)) return false;
  }
  return true;
}

bool has_all_of(PyObject* dict, Names names) {
  for (PyObject* const name : names)
    if (!item(dict, name)) return false;
  return true;
}

}  // namespace

bool is_as_planned(const py::handle& module, const py::handle& checks) {
  if (!PyTuple_Check(checks.ptr()) || PyTuple_GET_SIZE(checks.ptr()) != kCheckFields) return false;
  const Keys& keys = Keys::get();
  PyObject* const dict = dict_of(module.ptr());
  PyObject* const modules = keys.modules.in(dict);
  // has_order's PyDict_Next does not follow an OrderedDict's order.
  const bool is_plain_dict = modules && PyDict_CheckExact(modules);
  const auto check = [&](CheckField field) { return PyTuple_GET_ITEM(checks.ptr(), field); };
  PyObject* const order = check(kOrder);
  if (!is_plain_dict && !(modules && PyODict_CheckExact(modules) && order == Py_None)) return false;
  const Names names = names_of(check(kNames));
  return !policy::why_disabled() && !is_watched() && hold(check(kFacts)) &&
         looks_up_as(Py_TYPE(module.ptr()), check(kClass), names_of(check(kLookups))) && has_order(modules, order) &&
         goes_to_children(dict, names) && has_all_of(modules, names) && has_attributes(dict, check(kConstants)) &&
         are_children_unchanged(modules, check(kChildren));
}

}  // namespace fastlane
