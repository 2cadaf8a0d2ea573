#include "plain_module.h"

#include <torch/csrc/autograd/python_variable.h>

#include "ops/checks.h"

namespace fastlane::python {

PyObject* dict_of(PyObject* object) {
  const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
  if (!dict) PyErr_Clear();
  return dict.ptr();
}

bool under_global_hooks() {
  for (const Key& key : Keys::get().global_hooks)
    if (!key.is_empty_in(Torch::get().module_globals)) return true;
  return false;
}

bool has_forward(PyObject* kind, PyObject* forward) {
  static PyObject* const name = PyUnicode_InternFromString("forward");
  const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(kind, name));
  if (!found) throw py::error_already_set();
  return found.ptr() == forward;
}

PyObject* plain_dict(PyObject* module, const Class& expected) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != expected.kind) return nullptr;
  if (!has_forward(expected.kind, expected.forward)) return nullptr;
  PyObject* const dict = dict_of(module);
  for (const Key& key : Keys::get().hooks)
    if (!key.is_empty_in(dict)) return nullptr;
  return Keys::get().forward.in(dict) ? nullptr : dict;
}

bool read_tensor(PyObject* object, at::Tensor& tensor) {
  if (object == Py_None) return true;
  if (!object || !THPVariable_CheckExact(object)) return false;
  tensor = THPVariable_Unpack(object);
  return true;
}

bool is_dtensor(const at::Tensor& t) {
  const py::gil_scoped_acquire interpreter;
  PyObject* const module = PyDict_GetItemString(PyImport_GetModuleDict(), "torch.distributed.tensor");
  if (!module) return false;
  const auto kind = py::getattr(module, "DTensor", py::none());
  const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(t));
  return PyType_Check(kind.ptr()) && PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(kind.ptr()));
}

namespace {

bool has_kernel_format(const at::Tensor& t) { return t.layout() == at::kStrided && has_kernel_dtype(t); }

}  // namespace

bool read_linear(PyObject* dict, bool transposed, at::Tensor& weight, at::Tensor& bias) {
  const Keys& keys = Keys::get();
  PyObject* const parameters = keys.parameters.in(dict);
  // A plain attribute goes before a parameter of its name.
  if (keys.weight.in(dict) || keys.bias.in(dict)) return false;
  if (!read_tensor(keys.weight.in(parameters), weight) || !weight.defined() || !has_kernel_format(weight) ||
      weight.dim() != 2 || !read_tensor(keys.bias.in(parameters), bias))
    return false;
  // F.linear would broadcast another bias.
  return !bias.defined() ||
         (has_kernel_format(bias) && bias.dim() == 1 && bias.sym_size(0) == weight.sym_size(transposed ? 1 : 0));
}

}  // namespace fastlane::python
