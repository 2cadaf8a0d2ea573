// What the results of kernels are compared with.
#pragma once

#include <vector>

#include "kernels/activation.h"

namespace fastlane::cuda {

using Doubles = std::vector<double>;

inline double act(Activation a, double z) {
  switch (a) {
#define FASTLANE_ACTIVATION(name) \
  case Activation::name: return Definition<Activation::name>::value(z);
    FASTLANE_ACTIVATIONS(FASTLANE_ACTIVATION)
#undef FASTLANE_ACTIVATION
  }
  return NAN;
}
inline double slope(Activation a, double z) {
  switch (a) {
#define FASTLANE_ACTIVATION(name) \
  case Activation::name: return Definition<Activation::name>::derivative(z);
    FASTLANE_ACTIVATIONS(FASTLANE_ACTIVATION)
#undef FASTLANE_ACTIVATION
  }
  return NAN;
}

}  // namespace fastlane::cuda
