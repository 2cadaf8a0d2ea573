#include "python/network_call.h"

#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/operators.h"
#include "python/facts.h"
#include "python/plain_call.h"
#include "python/plain_module.h"

namespace fastlane {
namespace {

namespace py = pybind11;
using namespace python;

bool read_plain_linear(PyObject* module, at::Tensor& weight, at::Tensor& bias) {
  return module && read_linear(plain_dict(module, Torch::get().linear), /*transposed=*/false, weight, bias);
}

// A module that computes an activation: its class, and the attributes that it has then.
struct ActivationModule {
  std::string_view name;
  PyObject* kind;  // never freed
  std::vector<std::pair<Key, std::string>> attributes;

  bool describes(PyObject* module) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != kind) return false;
    PyObject* const dict = dict_of(module);
    return std::all_of(attributes.begin(), attributes.end(), [&](const auto& attribute) {
      PyObject* const value = attribute.first.in(dict);
      return value && PyUnicode_CheckExact(value) &&
             PyUnicode_CompareWithASCIIString(value, attribute.second.c_str()) == 0;
    });
  }
};

std::vector<ActivationModule> activation_modules;

// The activation's name; empty if the module is none of our activations.
std::string_view read_activation(PyObject* module) {
  if (!module) return {};
  for (const ActivationModule& known : activation_modules)
    if (known.describes(module)) return plain_dict(module, known.kind) ? known.name : std::string_view();
  return {};
}

// The children, if `list` is a ModuleList and their names still are 0, 1, 2 …
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

// An eager class, as Python described it.
class EagerClass {
 public:
  void know(const py::tuple& facts, const py::type& kind, const py::tuple& names) {
    facts_ = py::object(facts).release().ptr();
    kind_ = py::object(kind).release().ptr();
    names_ = py::object(names).release().ptr();
  }
  // Whether the module still computes as the eager class did when Python described it.
  bool describes(PyObject* module) const {
    return facts_ && !is_watched() && !torch::jit::tracer::isTracing() && hold(facts_) &&
           looks_up_as(Py_TYPE(module), kind_, names_of(names_));
  }

 private:
  // Never freed.
  PyObject *facts_ = nullptr, *kind_ = nullptr, *names_ = nullptr;
};

EagerClass network_class, mlp_class;

// The module's own children, if each of the names leads to one of them. Null otherwise.
PyObject* own_children(PyObject* dict, Names names) {
  PyObject* const modules = Keys::get().modules.in(dict);
  // A dict of a derived class may return other values than it holds.
  return modules && PyDict_CheckExact(modules) && goes_to_children(dict, names) ? modules : nullptr;
}

struct PlainNetwork {
  std::string shortcut;  // a copy: another thread may assign the network's own anew
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
    // Other sizes may broadcast, and eager would add them.
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
  PyObject* const modules = own_children(dict, keys.layers.name());
  PyObject* const shortcut = keys.shortcut.in(dict);
  if (!shortcut || !PyUnicode_CheckExact(shortcut) || !PyUnicode_IS_ASCII(shortcut)) return false;
  plain.shortcut.assign(reinterpret_cast<const char*>(PyUnicode_1BYTE_DATA(shortcut)),
                        static_cast<size_t>(PyUnicode_GET_LENGTH(shortcut)));
  const auto layers = children(keys.layers.in(modules));
  if (!layers || layers->empty() || keys.run_layer.in(dict)) return false;
  plain.weights.reserve(layers->size());
  plain.biases.reserve(layers->size());
  for (PyObject* layer : *layers)
    if (!plain.read_layer(layer)) return false;
  if (plain.shortcut != "projection") return true;
  const auto projections = children(keys.projections.in(own_children(dict, keys.projections.name())));
  if (!projections || projections->size() != layers->size()) return false;
  for (PyObject* projection : *projections)
    if (!plain.read_projection(projection)) return false;
  return true;
}

}  // namespace

void know_activations(const py::tuple& modules) {
  activation_modules.clear();
  for (const py::handle described : modules) {
    const auto [name, kind, attributes] =
        described.cast<std::tuple<py::str, py::type, std::vector<std::pair<std::string, std::string>>>>();
    ActivationModule& known = activation_modules.emplace_back();
    known.name = name_of_activation(name.ptr());
    known.kind = py::object(kind).release().ptr();
    for (const auto& [attribute, value] : attributes) known.attributes.emplace_back(Key(attribute.c_str()), value);
  }
}

void know_networks(const py::tuple& facts, const py::type& kind, const py::tuple& names) {
  network_class.know(facts, kind, names);
}

void know_mlps(const py::tuple& facts, const py::type& kind, const py::tuple& names) {
  mlp_class.know(facts, kind, names);
}

py::object run_plain_network(const py::handle& network, const py::handle& x) {
  HANDLE_TH_ERRORS
  at::Tensor input;
  PlainNetwork plain;
  if (!read_strided_tensor(x.ptr(), input) || !network_class.describes(network.ptr()) ||
      !read_network(network.ptr(), plain))
    return py::none();
  return without_interpreter([&] {
    return call_residual_stack(input, plain.weights, plain.biases, plain.projections, plain.projection_biases,
                               plain.shortcut, plain.activation, /*recompute=*/false);
  });
  END_HANDLE_TH_ERRORS_PYBIND
}

py::object run_plain_residual_mlp(const py::handle& mlp, const py::handle& x) {
  HANDLE_TH_ERRORS
  const Keys& keys = Keys::get();
  at::Tensor input, weight1, bias1, weight2, bias2;
  if (!read_strided_tensor(x.ptr(), input) || !mlp_class.describes(mlp.ptr())) return py::none();
  PyObject* const dict = dict_of(mlp.ptr());
  PyObject* const modules = own_children(dict, {keys.fc1.name(), keys.fc2.name()});
  const std::string_view activation = name_of_activation(keys.activation.in(dict));
  if (activation.empty() || !modules || !read_plain_linear(keys.fc1.in(modules), weight1, bias1) ||
      !read_plain_linear(keys.fc2.in(modules), weight2, bias2) || input.dim() == 0 ||
      weight2.sym_size(0) != input.sym_size(-1))  // other sizes may broadcast, and eager would add them
    return py::none();
  return without_interpreter([&] {
    return call_mlp_residual(input, weight1, optional(bias1), weight2, optional(bias2), input, activation,
                             /*recompute=*/false);
  });
  END_HANDLE_TH_ERRORS_PYBIND
}

}  // namespace fastlane
