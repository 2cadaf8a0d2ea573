#include "network_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "facts.h"
#include "ops/operators.h"
#include "plain_module.h"

namespace fastlane {
namespace {

namespace py = pybind11;
using namespace python;

bool read_plain_linear(PyObject* module, at::Tensor& weight, at::Tensor& bias) {
  return read_linear(plain_dict(module, Torch::get().linear), /*transposed=*/false, weight, bias);
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

// Eager networks rest on these facts (fastlane_ext._plain.NETWORK). A class derived from `network_class` must not
// define one of `network_names` anew. The three objects are never freed.
PyObject *network_facts = nullptr, *network_class = nullptr, *network_names = nullptr;

bool is_as_its_class(PyObject* network) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(network_names); ++i) {
    PyObject* const name = PyTuple_GET_ITEM(network_names, i);
    if (_PyType_Lookup(Py_TYPE(network), name) !=
        _PyType_Lookup(reinterpret_cast<PyTypeObject*>(network_class), name))
      return false;
  }
  return true;
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
    if (!read_plain_linear(linear, weight, bias)) return false;
    weights.push_back(std::move(weight));
    biases.push_back(optional(bias));
    return true;
  }
  bool read_projection(PyObject* projection) {
    at::Tensor weight, bias;
    if (projection != Py_None && !read_plain_linear(projection, weight, bias)) return false;
    // Eager adds what broadcasts.
    const at::Tensor& layer = weights[projections.size()];
    if ((weight.defined() ? weight.sym_size(0) : layer.sym_size(1)) != layer.sym_size(0)) return false;
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
  if (!layers || layers->empty() || keys.layers.in(dict) || keys.run_layer.in(dict)) return false;
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

// Whether somebody wants to see every function that Python calls.
bool are_calls_watched() { return at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing(); }

}  // namespace

void know_networks(const py::tuple& facts, const py::type& kind, const py::tuple& names) {
  network_facts = py::object(facts).release().ptr();
  network_class = py::object(kind).release().ptr();
  network_names = py::object(names).release().ptr();
}

py::object run_plain_layer(const py::handle& x, const py::handle& weight, const py::handle& bias,
                           const py::handle& residual, const py::handle& activation, const py::handle& recompute) {
  HANDLE_TH_ERRORS
  at::Tensor input, w, b, r;
  if (are_calls_watched() || !read_tensor(x.ptr(), input) || !input.defined() || !read_tensor(weight.ptr(), w) ||
      !w.defined() || !read_tensor(bias.ptr(), b) || !read_tensor(residual.ptr(), r) ||
      !PyUnicode_CheckExact(activation.ptr()) || !PyUnicode_IS_ASCII(activation.ptr()) ||
      !PyBool_Check(recompute.ptr()))
    return py::none();
  const std::string name(reinterpret_cast<const char*>(PyUnicode_1BYTE_DATA(activation.ptr())),
                         static_cast<size_t>(PyUnicode_GET_LENGTH(activation.ptr())));
  at::Tensor y;
  {
    const py::gil_scoped_release other_threads_may_run;
    y = call_linear_gelu_residual(input, w, optional(b), optional(r), name, recompute.ptr() == Py_True);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(y)));
  END_HANDLE_TH_ERRORS_PYBIND
}

py::object run_plain_network(const py::handle& network, const py::handle& x) {
  HANDLE_TH_ERRORS
  at::Tensor input;
  PlainNetwork plain;
  if (!network_facts || !read_tensor(x.ptr(), input) || !input.defined() || input.layout() != at::kStrided ||
      input.is_nested() || is_watched() || torch::jit::tracer::isTracing() || !hold(network_facts) ||
      !is_as_its_class(network.ptr()) || !read_network(network.ptr(), plain))
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
