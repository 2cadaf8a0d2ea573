// Calls without Python in between. A network's children are checked and their parameters read from their dicts.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlane {

// `run_plain_network` takes these for granted: facts (facts.h), the class of eager networks, and the names that a
// class derived from it must not define anew.
void know_networks(const pybind11::tuple& facts, const pybind11::type& kind, const pybind11::tuple& names);

// The output of a network of `fastlane_ext.networks` as one call of residual_stack; None where a child is not what
// the network was built with, or where anything watches Python calls. Python then looks what is to be done.
pybind11::object run_plain_network(const pybind11::handle& network, const pybind11::handle& x);

// linear_gelu_residual of plain tensors; None where an argument is anything else or anything watches Python calls.
// torch.ops takes 4 µs more, a third of a small layer's time.
pybind11::object run_plain_layer(const pybind11::handle& x, const pybind11::handle& weight,
                                 const pybind11::handle& bias, const pybind11::handle& residual,
                                 const pybind11::handle& activation, const pybind11::handle& recompute);

}  // namespace fastlane
