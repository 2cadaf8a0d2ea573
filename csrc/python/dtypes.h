// The names of dtypes in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "kernels/matrix.h"

namespace fastlane {

// Throws py::value_error for a dtype that no kernel takes.
inline DType parsed_dtype(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "float64") return DType::f64;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw pybind11::value_error("dtype: got '" + name + "', expected float32, float64, bfloat16 or float16");
}

}  // namespace fastlane
