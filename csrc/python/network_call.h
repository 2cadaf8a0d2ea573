// The calls of this package's networks and MLPs without Python in between: children are checked and their parameters
// read from their dicts.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlane {

// `run_plain_network` and `run_plain_residual_mlp` take these for granted: facts (facts.h), the eager class, and the
// names that a class derived from it must not define anew.
void know_networks(const pybind11::tuple& facts, const pybind11::type& kind, const pybind11::tuple& names);
void know_mlps(const pybind11::tuple& facts, const pybind11::type& kind, const pybind11::tuple& names);

// The output of a network of `fastlane_ext.networks` as one call of residual_stack; None where a child is not what
// the network was built with, or where anything watches Python calls. Python then looks what is to be done.
pybind11::object run_plain_network(const pybind11::handle& network, const pybind11::handle& x);

// That of a `fastlane_ext.ResidualMLP` as one call of mlp_residual, likewise.
pybind11::object run_plain_residual_mlp(const pybind11::handle& mlp, const pybind11::handle& x);

}  // namespace fastlane
