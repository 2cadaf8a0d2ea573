// An activation as a node of an epilogue's visitor tree.
#pragma once

#include "cutlass/array.h"
#include "device.cuh"

namespace fastlane::cuda::hopper {

struct ActivationArguments {
  Activation activation = Activation::none;
};

// act(z) of a fragment; the branch is outside the loop over its elements.
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
    switch (arguments.activation) {
      case Activation::gelu: return each<ExactGelu>(grad, z);
      case Activation::gelu_tanh: return each<TanhGelu>(grad, z);
      default: return grad;
    }
  }

 private:
  template <class Act>
  static __device__ Fragment each(const Fragment& grad, const Fragment& z) {
    Fragment out;
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = grad[i] * Act::slope(z[i]);
    return out;
  }
};

}  // namespace fastlane::cuda::hopper
