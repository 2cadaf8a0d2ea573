#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/narrow/stack.cuh"
#include "kernels/cuda/narrow/wgrad.cuh"
#include "kernels/cuda/common/warp.cuh"

namespace fastlane::cuda {
namespace {

template <class T, int kWidth>
struct Kernels {
  using type = T;
  static constexpr StackShape forward_shape = cuda::forward_shape(sizeof(T));
  static constexpr StackShape backward_shape = cuda::backward_shape(kWidth, sizeof(T));
  static constexpr auto forward = narrow_forward_kernel<T, kWidth, DeviceWarp>;
  static constexpr auto backward = narrow_backward_kernel<T, kWidth, DeviceWarp>;
  static constexpr auto wgrad = narrow_wgrad_kernel<T, kWidth, DeviceWarp>;
};

// Calls f(Kernels<T, kWidth>) for the types that the arguments name.
template <class F>
void with_kernels(DType dtype, int width, F f) {
  const auto with_width = [&](auto zero) {
    using T = decltype(zero);
    if (width == 32) return f(Kernels<T, 32>{});
    if (width == 64) return f(Kernels<T, 64>{});
    if constexpr (!std::is_same_v<T, float>) return f(Kernels<T, 128>{});
  };
  if (dtype == DType::bf16) return with_width(__nv_bfloat16{});
  if (dtype == DType::f16) return with_width(__half{});
  with_width(float{});
}

// A kernel always gets the same limit, since another thread may launch the kernel between this call and the launch.
template <class Kernel>
void allow_shared(Kernel kernel, int64_t bytes, const char* name) {
  const auto limit = static_cast<int>(bytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), name, __FILE__, __LINE__);
}

template <class Kernel>
void launch(Kernel kernel, StackShape shape, const NarrowStack& stack, int64_t layers, int width, DType dtype,
            Stream stream, const char* name) {
  allow_shared(kernel, narrow_shared_bytes(kMaxStackLayers, width, dtype), name);
  const auto blocks = static_cast<unsigned>(narrow_blocks(stack.rows, shape));
  const auto bytes = static_cast<size_t>(narrow_shared_bytes(layers, width, dtype));
  kernel<<<blocks, static_cast<unsigned>(shape.warps * 32), bytes, stream>>>(stack);
  FASTLANE_CHECK_LAUNCH(name);
}

}  // namespace

void narrow_forward(const NarrowStack& stack, int width, DType dtype, Stream stream) {
  with_kernels(dtype, width, [&](auto kernels) {
    using K = decltype(kernels);
    launch(K::forward, K::forward_shape, stack, stack.count, width, dtype, stream, "narrow_forward");
  });
}

void narrow_backward(const NarrowStack& stack, int width, DType dtype, Stream stream) {
  with_kernels(dtype, width, [&](auto kernels) {
    using K = decltype(kernels);
    launch(K::backward, K::backward_shape, stack, stack.count - stack.first, width, dtype, stream, "narrow_backward");
    const WgradGeometry g(stack.rows, stack.count);
    const auto chunks = static_cast<unsigned>(g.chunks), layers = static_cast<unsigned>(stack.count);
    if (stack.partial_dw) {
      const int64_t bytes = narrow_wgrad_shared_bytes(width, dtype);
      allow_shared(K::wgrad, bytes, "narrow_wgrad");
      K::wgrad<<<dim3(chunks, layers), kWgradWarps * 32, static_cast<size_t>(bytes), stream>>>(stack, g.chunk_rows);
      FASTLANE_CHECK_LAUNCH("narrow_wgrad");
    }
    if (!stack.partial_db && !stack.partial_dw) return;
    const int blocks = width / kSumCols + (stack.partial_dw ? width * width / kBlockThreads : 0);
    narrow_sum_kernel<typename K::type>
        <<<dim3(static_cast<unsigned>(blocks), layers), dim3(kSumCols, kSumRows), 0, stream>>>(
            stack, width, narrow_partial_sums(stack.rows, width, dtype), g.chunks);
    FASTLANE_CHECK_LAUNCH("narrow_sum");
  });
}

}  // namespace fastlane::cuda
