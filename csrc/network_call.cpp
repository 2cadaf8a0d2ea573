#include "network_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ops/operators.h"

namespace fastlane {
namespace {

namespace py = pybind11;

// Never freed: the interpreter may be gone before static objects are.
struct Torch {
  PyObject *module_list, *sequential, *linear, *gelu, *identity;
  PyObject* module_globals;  // of torch.nn.modules.module, with the hooks for all modules

  static const Torch& get() {
    static const Torch* const torch = [] {
      const auto attribute = [](const char* module, const char* name) {
        return py::module_::import(module).attr(name).cast<py::object>().release().ptr();
      };
      return new Torch{attribute("torch.nn", "ModuleList"), attribute("torch.nn", "Sequential"),
                       attribute("torch.nn", "Linear"),     attribute("torch.nn", "GELU"),
                       attribute("torch.nn", "Identity"),   attribute("torch.nn.modules.module", "__dict__")};
    }();
    return *torch;
  }
};

// A key of a dict, interned once.
class Key {
 public:
  explicit Key(const char* name) : name_(PyUnicode_InternFromString(name)) {}

  // Borrowed; null where absent.
  PyObject* in(PyObject* dict) const {
    if (!dict || !PyDict_Check(dict)) return nullptr;
    PyObject* const value = PyDict_GetItemWithError(dict, name_);
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  bool is_empty_in(PyObject* dict) const {
    PyObject* const value = in(dict);
    return value && PyDict_Check(value) && PyDict_Size(value) == 0;
  }

 private:
  PyObject* name_;
};

struct Keys {
  Key modules{"_modules"}, parameters{"_parameters"}, layers{"layers"}, projections{"projections"};
  Key shortcut{"shortcut"}, weight{"weight"}, bias{"bias"}, approximate{"approximate"}, forward{"forward"};
  Key hooks[4]{Key("_forward_hooks"), Key("_forward_pre_hooks"), Key("_backward_hooks"), Key("_backward_pre_hooks")};
  Key global_hooks[4]{Key("_global_forward_hooks"), Key("_global_forward_pre_hooks"), Key("_global_backward_hooks"),
                      Key("_global_backward_pre_hooks")};

  static const Keys& get() {
    static const Keys* const keys = new Keys;
    return *keys;
  }
};

// The object's own dict, while the object lives; null where it has none.
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

// Null if the module is not exactly of `kind`, has hooks or a forward of its own.
PyObject* plain_dict(PyObject* module, PyObject* kind) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != kind) return nullptr;
  PyObject* const dict = dict_of(module);
  for (const Key& key : Keys::get().hooks)
    if (!key.is_empty_in(dict)) return nullptr;
  return Keys::get().forward.in(dict) ? nullptr : dict;
}

// A plain tensor or parameter; undefined for None. False for anything else.
bool read_tensor(PyObject* object, at::Tensor& tensor) {
  if (object == Py_None) return true;
  if (!object || !THPVariable_CheckExact(object)) return false;
  tensor = THPVariable_Unpack(object);
  return true;
}

bool read_linear(PyObject* module, at::Tensor& weight, at::Tensor& bias) {
  PyObject* const dict = plain_dict(module, Torch::get().linear);
  PyObject* const parameters = Keys::get().parameters.in(dict);
  // A plain attribute goes before a parameter of its name.
  if (Keys::get().weight.in(dict) || Keys::get().bias.in(dict)) return false;
  return read_tensor(Keys::get().weight.in(parameters), weight) && weight.defined() &&
         read_tensor(Keys::get().bias.in(parameters), bias);
}

// The activation's name; empty where it is none of ours.
std::string_view read_activation(PyObject* module) {
  if (plain_dict(module, Torch::get().identity)) return "none";
  PyObject* const approximate = Keys::get().approximate.in(plain_dict(module, Torch::get().gelu));
  if (!approximate || !PyUnicode_CheckExact(approximate)) return {};
  if (PyUnicode_CompareWithASCIIString(approximate, "none") == 0) return "gelu";
  return PyUnicode_CompareWithASCIIString(approximate, "tanh") == 0 ? "gelu_tanh" : std::string_view();
}

// The children of a ModuleList, if it is one and they still go by 0, 1, 2 …
std::optional<std::vector<PyObject*>> children(PyObject* list) {
  if (!list || reinterpret_cast<PyObject*>(Py_TYPE(list)) != Torch::get().module_list) return std::nullopt;
  PyObject* const modules = Keys::get().modules.in(dict_of(list));
  if (!modules || !PyDict_CheckExact(modules)) return std::nullopt;
  std::vector<PyObject*> result;
  PyObject *name = nullptr, *child = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(modules, &position, &name, &child);) {
    if (!PyUnicode_Check(name) || PyUnicode_CompareWithASCIIString(name, std::to_string(result.size()).c_str()) != 0)
      return std::nullopt;
    result.push_back(child);
  }
  return result;
}

struct PlainNetwork {
  std::string shortcut;  // the network's own may be assigned anew while other threads run
  std::string_view activation;
  std::vector<at::Tensor> weights;
  OptionalTensors biases, projections, projection_biases;

  bool read_layer(PyObject* layer) {
    PyObject* const modules = Keys::get().modules.in(plain_dict(layer, Torch::get().sequential));
    if (!modules || !PyDict_CheckExact(modules) || PyDict_Size(modules) != 2) return false;
    Py_ssize_t position = 0;
    PyObject *linear = nullptr, *last = nullptr;
    PyDict_Next(modules, &position, nullptr, &linear);
    PyDict_Next(modules, &position, nullptr, &last);
    const std::string_view own_activation = read_activation(last);
    if (activation.empty()) activation = own_activation;
    if (own_activation.empty() || own_activation != activation) return false;
    at::Tensor weight, bias;
    if (!read_linear(linear, weight, bias)) return false;
    weights.push_back(std::move(weight));
    biases.push_back(optional(bias));
    return true;
  }
  bool read_projection(PyObject* projection) {
    at::Tensor weight, bias;
    if (projection != Py_None && !read_linear(projection, weight, bias)) return false;
    projections.push_back(optional(weight));
    projection_biases.push_back(optional(bias));
    return true;
  }
};

bool read_network(PyObject* network, PlainNetwork& plain) {
  const Keys& keys = Keys::get();
  PyObject* const dict = dict_of(network);
  PyObject *const modules = keys.modules.in(dict), *const shortcut = keys.shortcut.in(dict);
  if (!shortcut || !PyUnicode_CheckExact(shortcut) || !PyUnicode_IS_ASCII(shortcut)) return false;
  plain.shortcut.assign(reinterpret_cast<const char*>(PyUnicode_1BYTE_DATA(shortcut)),
                        static_cast<size_t>(PyUnicode_GET_LENGTH(shortcut)));
  const auto layers = children(keys.layers.in(modules));
  if (!layers || layers->empty() || keys.layers.in(dict)) return false;
  plain.weights.reserve(layers->size());
  plain.biases.reserve(layers->size());
  for (PyObject* layer : *layers)
    if (!plain.read_layer(layer)) return false;
  if (plain.shortcut != "projection") return true;
  const auto projections = children(keys.projections.in(modules));
  if (!projections || projections->size() != layers->size() || keys.projections.in(dict)) return false;
  for (PyObject* projection : *projections)
    if (!plain.read_projection(projection)) return false;
  return true;
}

}  // namespace

void prepare_network_calls() {
  Torch::get();
  Keys::get();
}

py::object run_plain_network(const py::handle& network, const py::handle& x) {
  HANDLE_TH_ERRORS
  at::Tensor input;
  PlainNetwork plain;
  if (!read_tensor(x.ptr(), input) || !input.defined() || at::impl::torch_function_mode_enabled() ||
      torch::jit::tracer::isTracing() || under_global_hooks() || !read_network(network.ptr(), plain))
    return py::none();
  at::Tensor y;
  {
    const py::gil_scoped_release other_threads_may_run;
    y = call_residual_stack(input, plain.weights, plain.biases, plain.projections, plain.projection_biases,
                            plain.shortcut, plain.activation, /*recompute=*/false);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(y)));
  END_HANDLE_TH_ERRORS_PYBIND
}

}  // namespace fastlane
