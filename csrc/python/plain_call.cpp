#include "python/plain_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "kernels/activation.h"
#include "ops/operators.h"
#include "python/facts.h"
#include "python/plain_module.h"

namespace fastlane {
namespace {

namespace py = pybind11;
using namespace python;

bool is_strided(const at::Tensor& t) { return t.layout() == at::kStrided && !t.is_nested(); }

// Reads None as an undefined tensor.
bool read_optional(const py::handle& object, at::Tensor& tensor) {
  return read_tensor(object.ptr(), tensor) && (!tensor.defined() || is_strided(tensor));
}
bool read_required(const py::handle& object, at::Tensor& tensor) { return read_strided_tensor(object.ptr(), tensor); }

// Whether a function mode or a trace has to see every function that Python calls.
bool are_calls_watched() { return at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing(); }

bool hold_or_none(const py::handle& facts) {
  return facts.is_none() || (!c10::impl::TorchDispatchModeTLS::any_modes_set() && hold(facts.ptr()));
}

}  // namespace

std::string_view name_of_activation(PyObject* name) {
  if (name && PyUnicode_CheckExact(name))
    for (const std::string_view known : kActivationNames)
      if (PyUnicode_CompareWithASCIIString(name, known.data()) == 0) return known;
  return {};
}

bool read_strided_tensor(PyObject* object, at::Tensor& tensor) {
  return read_tensor(object, tensor) && tensor.defined() && is_strided(tensor);
}

py::object run_plain_layer(const py::handle& facts, const py::handle& x, const py::handle& weight,
                           const py::handle& bias, const py::handle& residual, const py::handle& activation,
                           const py::handle& recompute) {
  HANDLE_TH_ERRORS
  const std::string_view name = name_of_activation(activation.ptr());
  at::Tensor input, w, b, r;
  if (name.empty() || !PyBool_Check(recompute.ptr()) || !read_required(x, input) || !read_required(weight, w) ||
      !read_optional(bias, b) || !read_optional(residual, r) || are_calls_watched() || !hold_or_none(facts))
    return py::none();
  return without_interpreter([&] {
    return call_linear_gelu_residual(input, w, optional(b), optional(r), name, recompute.ptr() == Py_True);
  });
  END_HANDLE_TH_ERRORS_PYBIND
}

py::object run_plain_mlp(const py::handle& x, const py::handle& fc1_weight, const py::handle& fc1_bias,
                         const py::handle& fc2_weight, const py::handle& fc2_bias, const py::handle& residual,
                         const py::handle& activation, const py::handle& recompute) {
  HANDLE_TH_ERRORS
  const std::string_view name = name_of_activation(activation.ptr());
  at::Tensor input, w1, b1, w2, b2, r;
  if (name.empty() || !PyBool_Check(recompute.ptr()) || !read_required(x, input) || !read_required(fc1_weight, w1) ||
      !read_optional(fc1_bias, b1) || !read_required(fc2_weight, w2) || !read_optional(fc2_bias, b2) ||
      !read_optional(residual, r) || are_calls_watched())
    return py::none();
  return without_interpreter([&] {
    return call_mlp_residual(input, w1, optional(b1), w2, optional(b2), optional(r), name,
                             recompute.ptr() == Py_True);
  });
  END_HANDLE_TH_ERRORS_PYBIND
}

}  // namespace fastlane
