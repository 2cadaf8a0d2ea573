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

PyObject* plain_dict(PyObject* module, PyObject* kind) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != kind) return nullptr;
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

bool read_linear(PyObject* dict, at::Tensor& weight, at::Tensor& bias) {
  const Keys& keys = Keys::get();
  PyObject* const parameters = keys.parameters.in(dict);
  // A plain attribute goes before a parameter of its name.
  if (keys.weight.in(dict) || keys.bias.in(dict)) return false;
  return read_tensor(keys.weight.in(parameters), weight) && weight.defined() && has_kernel_format(weight) &&
         read_tensor(keys.bias.in(parameters), bias) && (!bias.defined() || has_kernel_format(bias));
}

}  // namespace fastlane::python
