#include "launch.cuh"
#include "narrow_stack.cuh"
#include "narrow_wgrad.cuh"
#include "warp.cuh"

namespace fastlane::cuda {
namespace {

template <class T, int kWidth>
struct Kernels {
  using type = T;
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

template <class Kernel>
void launch(Kernel kernel, const NarrowStack& stack, int width, DType dtype, Stream stream, const char* name) {
  // Always the same limit: another thread may launch the kernel between this line and the next.
  const auto limit = static_cast<int>(narrow_shared_bytes(kMaxStackLayers, width, dtype));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), name, __FILE__, __LINE__);
  const auto bytes = static_cast<size_t>(narrow_shared_bytes(stack.count, width, dtype));
  kernel<<<static_cast<unsigned>(narrow_blocks(stack.rows)), kStackWarps * 32, bytes, stream>>>(stack);
  FASTLANE_CHECK_LAUNCH(name);
}

}  // namespace

void narrow_forward(const NarrowStack& stack, int width, DType dtype, Stream stream) {
  with_kernels(dtype, width, [&](auto kernels) {
    launch(decltype(kernels)::forward, stack, width, dtype, stream, "narrow_forward");
  });
}

void narrow_backward(const NarrowStack& stack, int width, DType dtype, Stream stream) {
  with_kernels(dtype, width, [&](auto kernels) {
    using K = decltype(kernels);
    launch(K::backward, stack, width, dtype, stream, "narrow_backward");
    const WgradGeometry g(stack.rows, stack.count);
    const auto chunks = static_cast<unsigned>(g.chunks), layers = static_cast<unsigned>(stack.count);
    if (stack.partial_dw) {
      const auto bytes = static_cast<size_t>(narrow_wgrad_shared_bytes(width, dtype));
      K::wgrad<<<dim3(chunks, layers), kStackWarps * 32, bytes, stream>>>(stack, g.chunk_rows);
      FASTLANE_CHECK_LAUNCH("narrow_wgrad");
    }
    if (!stack.partial_db && !stack.partial_dw) return;
    const int blocks = width / kSumCols + (stack.partial_dw ? width * width / kBlockThreads : 0);
    narrow_sum_kernel<typename K::type>
        <<<dim3(static_cast<unsigned>(blocks), layers), dim3(kSumCols, kSumRows), 0, stream>>>(
            stack, width, narrow_partial_sums(stack.rows), g.chunks);
    FASTLANE_CHECK_LAUNCH("narrow_sum");
  });
}

}  // namespace fastlane::cuda
