// Reads modules from their dicts: whether a child adds nothing to its class, and its parameters.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <pybind11/pybind11.h>

namespace fastlane::python {

namespace py = pybind11;

// Interned strings, borrowed.
using Names = c10::ArrayRef<PyObject*>;
inline Names names_of(PyObject* tuple) {
  return {PySequence_Fast_ITEMS(tuple), static_cast<size_t>(PyTuple_GET_SIZE(tuple))};
}

// A dict's item, borrowed; null where absent.
inline PyObject* item(PyObject* dict, PyObject* name) {
  PyObject* const value = PyDict_GetItemWithError(dict, name);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Never freed: the interpreter may end before static objects do.
struct Torch {
  PyObject *module_list, *sequential, *linear;  // classes of torch.nn
  PyObject* device_context;  // the function mode that sets a default device
  PyObject* module_globals;  // of torch.nn.modules.module; they hold the hooks for all modules

  static const Torch& get() {
    static const Torch* const torch = [] {
      const auto attribute = [](const char* module, const char* name) {
        return py::module_::import(module).attr(name).cast<py::object>().release().ptr();
      };
      return new Torch{attribute("torch.nn", "ModuleList"), attribute("torch.nn", "Sequential"),
                       attribute("torch.nn", "Linear"), attribute("torch.utils._device", "DeviceContext"),
                       attribute("torch.nn.modules.module", "__dict__")};
    }();
    return *torch;
  }
};

// A key of a dict, interned once.
class Key {
 public:
  explicit Key(const char* name) : name_(PyUnicode_InternFromString(name)) {}

  // Borrowed; null where absent.
  PyObject* in(PyObject* dict) const { return dict && PyDict_Check(dict) ? item(dict, name_) : nullptr; }
  PyObject* name() const { return name_; }
  bool is_empty_in(PyObject* dict) const {
    PyObject* const value = in(dict);
    return value && PyDict_Check(value) && PyDict_Size(value) == 0;
  }

 private:
  PyObject* name_;
};

struct Keys {
  Key modules{"_modules"}, parameters{"_parameters"}, buffers{"_buffers"}, layers{"layers"},
      projections{"projections"}, run_layer{"_run_layer"}, fc1{"fc1"}, fc2{"fc2"}, activation{"activation"};
  Key shortcut{"shortcut"}, training{"training"}, p{"p"}, weight{"weight"}, bias{"bias"};
  // nn.Module's call looks these names up on the instance before the class.
  Key shadows[3]{Key("forward"), Key("_call_impl"), Key("_slow_forward")}, compiled_call{"_compiled_call_impl"};
  Key hooks[4]{Key("_forward_hooks"), Key("_forward_pre_hooks"), Key("_backward_hooks"), Key("_backward_pre_hooks")};
  Key global_hooks[4]{Key("_global_forward_hooks"), Key("_global_forward_pre_hooks"), Key("_global_backward_hooks"),
                      Key("_global_backward_pre_hooks")};

  static const Keys& get() {
    static const Keys* const keys = new Keys;
    return *keys;
  }
};

// Call this while the module is imported: a later import could release the interpreter's lock in the middle of a
// call.
inline void prepare() {
  Torch::get();
  Keys::get();
}

// The object's own dict, borrowed while the object lives; null if it has none.
PyObject* dict_of(PyObject* object);

// Whether a hook is registered for all modules, or a mode other than a default device's may be on. Python finds out
// which.
bool is_watched();

// The instance's dict if the module is exactly of this class and its dict adds nothing to a call: no hooks, no
// forward of its own. Null otherwise. Facts (facts.h) tell whether the class itself has changed.
PyObject* plain_dict(PyObject* module, PyObject* kind);

// Whether the class `own` finds the same object as `kind` for each of the names.
bool looks_up_as(PyTypeObject* own, PyObject* kind, Names names);

bool has_none_of(PyObject* dict, Names names);

// Whether each of the names leads to a child in a module with this dict, if there is a child of that name: nn.Module
// looks a name up in the dict, among parameters and among buffers first.
bool goes_to_children(PyObject* dict, Names names);

// Reads a plain tensor or parameter; undefined for None. False for any other object.
bool read_tensor(PyObject* object, at::Tensor& tensor);

// Reads the parameters from a linear layer's dict; if `transposed`, the weight is stored (in, out). False if they are
// no plain tensors that kernels take, have other shapes, or are hidden by attributes.
bool read_linear(PyObject* dict, bool transposed, at::Tensor& weight, at::Tensor& bias);

// Whether `t` is a torch.distributed.tensor.DTensor. Never imports that module.
bool is_dtensor(const at::Tensor& t);

}  // namespace fastlane::python
