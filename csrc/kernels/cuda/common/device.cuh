// What the CUDA kernels share: storage types, accesses of 16 bytes, activations.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/activation.h"
#include "kernels/problem.h"
#include "kernels/cuda/common/gelu16.h"
#include "kernels/cuda/common/geometry.h"

namespace fastlane::cuda {

// Sums and activations of 16-bit values are computed in float.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T>
__device__ T rounded(compute_t<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// N neighbours of a row, read and written at once.
template <class T, int N>
struct alignas(N * sizeof(T)) Access {
  T v[N];
};
template <int N, class T>
__device__ Access<T, N> load(const T* p) {
  return *reinterpret_cast<const Access<T, N>*>(p);
}
template <int N, class T>
__device__ void store(T* p, const Access<T, N>& values) {
  *reinterpret_cast<Access<T, N>*>(p) = values;
}

// Stands for a float result of TF32 operands, which has no more digits than the operands.
struct Tf32 {};

// gelu16.h's polynomial for a type of result. float and double have none.
template <class T>
struct GeluTail {};
template <>
struct GeluTail<__nv_bfloat16> : bits16::Bfloat16Tail {};
template <>
struct GeluTail<__half> : bits16::Float16Tail {};
template <>
struct GeluTail<Tf32> : bits16::Tf32Tail {};
// An elementwise pass waits for memory, and can afford digits that bfloat16 does not need.
template <class T>
using InPass = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, Tf32, T>;
template <class T>
constexpr bool kIsShort = !std::is_floating_point_v<T>;

// An activation and its slope on the GPU, for a result that is stored as T: the definition, or a shorter formula.
template <Activation kActivation>
struct OnDevice {
  template <class T>
  static __device__ compute_t<T> value(compute_t<T> z) {
    return Definition<kActivation>::value(z);
  }
  template <class T>
  static __device__ compute_t<T> slope(compute_t<T> z) {
    return Definition<kActivation>::derivative(z);
  }
};
template <>
struct OnDevice<Activation::gelu> {
  template <class T>
  static __device__ compute_t<T> value(compute_t<T> z) {
    if constexpr (kIsShort<T>)
      return bits16::gelu<GeluTail<T>>(z);
    else
      return Definition<Activation::gelu>::value(z);
  }
  template <class T>
  static __device__ compute_t<T> slope(compute_t<T> z) {
    if constexpr (kIsShort<T>)
      return bits16::gelu_derivative<GeluTail<T>>(z);
    else
      return Definition<Activation::gelu>::derivative(z);
  }
};
template <>
struct OnDevice<Activation::gelu_tanh> {
  template <class T>
  static __device__ compute_t<T> value(compute_t<T> z) {
    if constexpr (kIsShort<T>)
      return bits16::gelu_tanh(z);
    else
      return Definition<Activation::gelu_tanh>::value(z);
  }
  template <class T>
  static __device__ compute_t<T> slope(compute_t<T> z) {
    if constexpr (kIsShort<T>)
      return bits16::gelu_tanh_derivative(z);
    else
      return Definition<Activation::gelu_tanh>::derivative(z);
  }
};

template <>
struct OnDevice<Activation::quick_gelu> {
  template <class T>
  static __device__ compute_t<T> value(compute_t<T> z) {
    if constexpr (kIsShort<T>)
      return bits16::quick_gelu(z);
    else
      return Definition<Activation::quick_gelu>::value(z);
  }
  template <class T>
  static __device__ compute_t<T> slope(compute_t<T> z) {
    if constexpr (kIsShort<T>)
      return bits16::quick_gelu_derivative(z);
    else
      return Definition<Activation::quick_gelu>::derivative(z);
  }
};

// Calls f with OnDevice<activation>, so that the branch is outside the loop over elements.
template <class F>
__device__ auto with_activation(Activation activation, F f) {
  switch (activation) {
#define FASTLANE_ACTIVATION(name) \
  case Activation::name: return f(OnDevice<Activation::name>{});
    FASTLANE_ACTIVATIONS(FASTLANE_ACTIVATION)
#undef FASTLANE_ACTIVATION
  }
  __builtin_unreachable();
}

}  // namespace fastlane::cuda
