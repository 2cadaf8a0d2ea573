// An activation as a node of an epilogue's visitor tree.
#pragma once

#include "cutlass/numeric_types.h"
#include "kernels/cuda/common/device.cuh"

namespace fastlane::cuda::hopper {

struct ActivationArguments {
  Activation activation = Activation::none;
};

// For results of CUTLASS's type E: Value computes act(z) of a fragment, TimesSlope computes grad ⊙ act′(z) of two
// fragments.
template <class E>
struct ActivationOf {
  using Result = std::conditional_t<std::is_same_v<E, float>, Tf32,
                                    std::conditional_t<std::is_same_v<E, cutlass::half_t>, __half, __nv_bfloat16>>;

  template <class Fragment>
  struct Value {
    using Arguments = ActivationArguments;

    __device__ Fragment operator()(const Fragment& z, const ActivationArguments& arguments) const {
      return with_activation(arguments.activation, [&](auto activation) {
        Fragment out;
#pragma unroll
        for (int i = 0; i < static_cast<int>(Fragment::kElements); ++i)
          out[i] = activation.template value<Result>(z[i]);
        return out;
      });
    }
  };

  template <class Fragment>
  struct TimesSlope {
    using Arguments = ActivationArguments;

    __device__ Fragment operator()(const Fragment& grad, const Fragment& z,
                                   const ActivationArguments& arguments) const {
      return with_activation(arguments.activation, [&](auto activation) {
        Fragment out;
#pragma unroll
        for (int i = 0; i < static_cast<int>(Fragment::kElements); ++i)
          out[i] = grad[i] * activation.template slope<Result>(z[i]);
        return out;
      });
    }
  };
};

}  // namespace fastlane::cuda::hopper
