// An activation as a node of an epilogue's visitor tree.
#pragma once

#include "cutlass/array.h"
#include "device.cuh"

namespace fastlane::cuda::hopper {

// A product of TF32 has no more digits than one of float16.
using Stored = __half;

struct ActivationArguments {
  Activation activation = Activation::none;
};

// act(z) of a fragment.
template <class T>
struct Activate {
  using Arguments = ActivationArguments;
};
template <int N>
struct Activate<cutlass::Array<float, N>> {
  using Fragment = cutlass::Array<float, N>;

  __device__ Fragment operator()(const Fragment& z, const ActivationArguments& arguments) const {
    return with_activation(arguments.activation, [&](auto activation) {
      Fragment out;
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] = activation.template value<Stored>(z[i]);
      return out;
    });
  }
};

// grad ⊙ act′(z) of fragments.
template <class T>
struct TimesSlope {
  using Arguments = ActivationArguments;
};
template <int N>
struct TimesSlope<cutlass::Array<float, N>> {
  using Fragment = cutlass::Array<float, N>;

  __device__ Fragment operator()(const Fragment& grad, const Fragment& z,
                                 const ActivationArguments& arguments) const {
    return with_activation(arguments.activation, [&](auto activation) {
      Fragment out;
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] = grad[i] * activation.template slope<Stored>(z[i]);
      return out;
    });
  }
};

}  // namespace fastlane::cuda::hopper
