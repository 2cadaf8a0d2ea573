// An activation as a node of an epilogue's visitor tree.
#pragma once

#include "cutlass/array.h"
#include "device.cuh"

namespace fastlane::cuda::hopper {

struct ActivationArguments {
  Activation activation = Activation::none;
};

// Of a fragment; the branch is outside the loop over its elements.
template <class T>
struct Activate {
  using Arguments = ActivationArguments;
};
template <int N>
struct Activate<cutlass::Array<float, N>> {
  using Fragment = cutlass::Array<float, N>;

  __device__ Fragment operator()(const Fragment& z, const ActivationArguments& arguments) const {
    switch (arguments.activation) {
      case Activation::gelu: return each<ExactGelu>(z);
      case Activation::gelu_tanh: return each<TanhGelu>(z);
      default: return z;
    }
  }

 private:
  template <class Act>
  static __device__ Fragment each(const Fragment& z) {
    Fragment out;
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = Act::value(z[i]);
    return out;
  }
};

}  // namespace fastlane::cuda::hopper
