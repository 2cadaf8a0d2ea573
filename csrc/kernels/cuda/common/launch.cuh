// What the launchers share: the choice of a kernel by dtype, access and activation, and checked launches.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels/cuda/common/device.cuh"

namespace fastlane::cuda {

template <class T, int N>
struct StoredAs {
  using type = T;
  static constexpr int access = N;
};

// Calls f(StoredAs<T, N>, OnDevice<activation>) for the types that the arguments name; N elements fill 16 bytes, or N
// is 1.
template <class F>
void with_types(DType dtype, int64_t access, Activation activation, F f) {
  const auto with_activation = [&](auto stored) {
    switch (activation) {
#define FASTLANE_ACTIVATION(name) \
  case Activation::name: return f(stored, OnDevice<Activation::name>{});
      FASTLANE_ACTIVATIONS(FASTLANE_ACTIVATION)
#undef FASTLANE_ACTIVATION
    }
  };
  const auto with_access = [&](auto one) {
    using T = typename decltype(one)::type;
    access == 1 ? with_activation(one) : with_activation(StoredAs<T, kAccessBytes / int64_t{sizeof(T)}>{});
  };
  switch (dtype) {
    case DType::f32: return with_access(StoredAs<float, 1>{});
    case DType::f64: return with_access(StoredAs<double, 1>{});
    case DType::bf16: return with_access(StoredAs<__nv_bfloat16, 1>{});
    case DType::f16: return with_access(StoredAs<__half, 1>{});
  }
}

inline void check(cudaError_t error, const char* what, const char* file, int line) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastlane_ext: ") + what + ": " + cudaGetErrorString(error) + " (" + file +
                             ":" + std::to_string(line) + ")");
}
#define FASTLANE_CHECK_LAUNCH(kernel) ::fastlane::cuda::check(cudaGetLastError(), kernel, __FILE__, __LINE__)

}  // namespace fastlane::cuda
