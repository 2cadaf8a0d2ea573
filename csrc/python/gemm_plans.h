// Plans of products, for tests and for whoever wants to see how a product is cut.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>

namespace fastlane {

// The plan of m × k by k × n as a dict: the fields of GemmPlan and GemmFacts, and "text". Strides count elements and
// belong to rows and columns. `caches` holds bytes of L1, of L2 and of the last level. Throws py::value_error if this
// machine has no kernel set `isa` or no kernel takes `dtype`.
pybind11::dict gemm_plan(const std::string& isa, const std::string& dtype, int64_t m, int64_t n, int64_t k,
                         std::array<int64_t, 2> a_strides, std::array<int64_t, 2> b_strides, int64_t threads,
                         std::array<int64_t, 3> caches);

}  // namespace fastlane
