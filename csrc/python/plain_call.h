// Python's calls of the operators with plain tensors. torch.ops takes 4 µs more, a third of a small layer's time.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string_view>

namespace fastlane {

// An activation's name; empty if `name` is no string, or none of our activations.
std::string_view name_of_activation(PyObject* name);

// Reads a plain tensor or parameter of the strided layout. False for any other object, and for None.
bool read_strided_tensor(PyObject* object, at::Tensor& tensor);

// The tensor that `call` returns. Other Python threads may run during the call.
template <class Call>
pybind11::object without_interpreter(const Call& call) {
  at::Tensor y;
  {
    const pybind11::gil_scoped_release other_threads_may_run;
    y = call();
  }
  return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(std::move(y)));
}

// linear_gelu_residual and mlp_residual. They return None if a tensor is no plain tensor, if another argument is not
// of its usual type, or if anything watches Python calls. `facts` is a tuple (facts.h) or None; with a tuple,
// run_plain_layer also returns None if a fact is no longer true or a dispatch mode is on.
pybind11::object run_plain_layer(const pybind11::handle& facts, const pybind11::handle& x,
                                 const pybind11::handle& weight, const pybind11::handle& bias,
                                 const pybind11::handle& residual, const pybind11::handle& activation,
                                 const pybind11::handle& recompute);
pybind11::object run_plain_mlp(const pybind11::handle& x, const pybind11::handle& fc1_weight,
                               const pybind11::handle& fc1_bias, const pybind11::handle& fc2_weight,
                               const pybind11::handle& fc2_bias, const pybind11::handle& residual,
                               const pybind11::handle& activation, const pybind11::handle& recompute);

}  // namespace fastlane
