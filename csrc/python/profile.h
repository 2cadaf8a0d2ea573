// The profile of `fastlane tune`, and the choice of path, for Python.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace fastlane::python {

// Work, dtype, rows, in_features, out_features, and whether the fused path won.
using ProfilePoint = std::tuple<std::string, std::string, int64_t, int64_t, int64_t, bool>;

// Both throw py::value_error for an unknown work or dtype. set_profile then changes nothing.
void set_profile(const std::vector<ProfilePoint>& points);

// Whether this work takes the fused path. The layers of an MLP and of a stack are taken to be as large as one
// another.
bool fuses(const std::string& work, const std::string& dtype, int64_t rows, int64_t in_features,
           int64_t out_features);

}  // namespace fastlane::python
