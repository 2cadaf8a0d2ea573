#include "python/plain_module.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

#include "ops/checks/checks.h"

namespace fastlane::python {

PyObject* dict_of(PyObject* object) {
  const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
  if (!dict) PyErr_Clear();
  return dict.ptr();
}

bool is_watched() {
  for (const Key& key : Keys::get().global_hooks)
    if (!key.is_empty_in(Torch::get().module_globals)) return true;
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return true;
  if (!at::impl::torch_function_mode_enabled()) return false;
  for (int64_t i = 0; i < at::impl::PythonTorchFunctionTLS::stack_len(); ++i) {
    PyObject* const mode = at::impl::PythonTorchFunctionTLS::get_stack_at(i)->ptr(getPyInterpreter());
    if (reinterpret_cast<PyObject*>(Py_TYPE(mode)) != Torch::get().device_context) return true;
  }
  return false;
}

PyObject* plain_dict(PyObject* module, PyObject* kind) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != kind) return nullptr;
  const Keys& keys = Keys::get();
  PyObject* const dict = dict_of(module);
  for (const Key& key : keys.hooks)
    if (!key.is_empty_in(dict)) return nullptr;
  for (const Key& key : keys.shadows)
    if (key.in(dict)) return nullptr;
  PyObject* const compiled = keys.compiled_call.in(dict);
  return compiled && compiled != Py_None ? nullptr : dict;
}

bool looks_up_as(PyTypeObject* own, PyObject* kind, Names names) {
  if (reinterpret_cast<PyObject*>(own) == kind) return true;
  for (PyObject* const name : names)
    if (_PyType_Lookup(own, name) != _PyType_Lookup(reinterpret_cast<PyTypeObject*>(kind), name)) return false;
  return true;
}

bool has_none_of(PyObject* dict, Names names) {
  for (PyObject* const name : names)
    if (item(dict, name)) return false;
  return true;
}

bool goes_to_children(PyObject* dict, Names names) {
  const Keys& keys = Keys::get();
  if (!dict || !has_none_of(dict, names)) return false;
  for (const Key* key : {&keys.parameters, &keys.buffers}) {
    PyObject* const others = key->in(dict);
    // Another class derived from dict may return other values than it holds.
    if (!others || !(PyDict_CheckExact(others) || PyODict_CheckExact(others))) return false;
    if (PyDict_Size(others) > 0 && !has_none_of(others, names)) return false;
  }
  return true;
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
  // A plain attribute hides a parameter of the same name.
  if (keys.weight.in(dict) || keys.bias.in(dict)) return false;
  // A class derived from dict may return other values than it holds.
  if (!parameters || !PyDict_CheckExact(parameters)) return false;
  if (!read_tensor(keys.weight.in(parameters), weight) || !weight.defined() || !has_kernel_format(weight) ||
      weight.dim() != 2 || !read_tensor(keys.bias.in(parameters), bias))
    return false;
  // F.linear would broadcast a bias of another shape.
  return !bias.defined() ||
         (has_kernel_format(bias) && bias.dim() == 1 && bias.sym_size(0) == weight.sym_size(transposed ? 1 : 0));
}

}  // namespace fastlane::python
