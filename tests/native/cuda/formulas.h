// What the results of kernels are compared with.
#pragma once

#include <vector>

#include "kernels/gelu.h"

namespace fastlane::cuda {

using Doubles = std::vector<double>;

inline double act(Activation a, double z) {
  return a == Activation::none ? z : a == Activation::gelu ? gelu(z) : gelu_tanh(z);
}
inline double slope(Activation a, double z) {
  return a == Activation::none ? 1 : a == Activation::gelu ? gelu_derivative(z) : gelu_tanh_derivative(z);
}

}  // namespace fastlane::cuda
