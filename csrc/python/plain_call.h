// Calls of the operators with plain tensors from Python. torch.ops takes 4 µs more, a third of a small layer's time.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string_view>

namespace fastlane {

// An activation's name; empty where it is no string, or none of ours.
std::string_view name_of_activation(PyObject* name);

// A plain tensor or parameter of the strided layout. False for anything else, None among it.
bool read_strided_tensor(PyObject* object, at::Tensor& tensor);

// The tensor that `call` returns, while other threads of Python may run.
template <class Call>
pybind11::object without_interpreter(const Call& call) {
  at::Tensor y;
  {
    const pybind11::gil_scoped_release other_threads_may_run;
    y = call();
  }
  return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(std::move(y)));
}

// linear_gelu_residual and mlp_residual. None where an argument is anything else than a plain tensor, where anything
// watches Python calls, or where one of the facts, a tuple (facts.h) or None, no longer holds; with facts, also under
// any mode.
pybind11::object run_plain_layer(const pybind11::handle& facts, const pybind11::handle& x,
                                 const pybind11::handle& weight, const pybind11::handle& bias,
                                 const pybind11::handle& residual, const pybind11::handle& activation,
                                 const pybind11::handle& recompute);
pybind11::object run_plain_mlp(const pybind11::handle& x, const pybind11::handle& fc1_weight,
                               const pybind11::handle& fc1_bias, const pybind11::handle& fc2_weight,
                               const pybind11::handle& fc2_bias, const pybind11::handle& residual,
                               const pybind11::handle& activation, const pybind11::handle& recompute);

}  // namespace fastlane
