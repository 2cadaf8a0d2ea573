// Calls of this package's networks and MLPs without Python in between. They check the children and read the
// parameters from the children's dicts.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlane {

// The modules that compute an activation: the activation's name, their class, their attributes' names and values.
void know_activations(const pybind11::tuple& modules);

// `run_plain_network` and `run_plain_residual_mlp` rest on these arguments: facts (facts.h), the eager class `kind`,
// and the names that a class derived from `kind` must not define anew.
void know_networks(const pybind11::tuple& facts, const pybind11::type& kind, const pybind11::tuple& names);
void know_mlps(const pybind11::tuple& facts, const pybind11::type& kind, const pybind11::tuple& names);

// The output of a network of `fastlane_ext.networks`, as one call of residual_stack. None if a child is not as the
// network built it, or if anything watches Python calls: then Python has to decide.
pybind11::object run_plain_network(const pybind11::handle& network, const pybind11::handle& x);

// The output of a `fastlane_ext.ResidualMLP`, as one call of mlp_residual. None in the same cases.
pybind11::object run_plain_residual_mlp(const pybind11::handle& mlp, const pybind11::handle& x);

}  // namespace fastlane
