// Every layer's dW = dzᵀ h of a narrow stack, and its db, from what the backward kernel wrote. Tensor cores sum
// chunks of rows, then the chunks are added in their order.
#pragma once

#include "kernels/cuda/narrow/fragments.cuh"

namespace fastlane::cuda {

// A block's part of one layer. Warp 2 i + j has the i-th half of dW's rows and the j-th half of its columns.
template <class T, int kWidth, class Warp>
struct WgradBlock {
  using S = Slice<T>;
  static constexpr int kStride = weight_stride(kWidth), kHalf = kWidth / 2, kStage = wgrad_stage(kWidth);
  static constexpr int kRowTiles = kHalf / 16, kSlices = kHalf / S::kCols;

  static __device__ void run(const NarrowStack& p, int layer, int64_t chunk, int64_t chunk_rows) {
    const NarrowLayer& l = p.layers[layer];
    T* const memory = reinterpret_cast<T*>(Warp::shared_memory());
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int first_n = warp / 2 * kHalf, first_k = warp % 2 * kHalf;
    const T* const from_dz = static_cast<const T*>(l.dz);
    const T* const inputs = static_cast<const T*>(layer_input(p, layer));
    const int64_t input_stride = layer_input_stride(p, layer);

    Sums<T> sums[kRowTiles][kSlices * S::kTiles];
#pragma unroll
    for (auto& row : sums)
#pragma unroll
      for (auto& sum : row)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.start(i, 0.0f);

    const int64_t end = (chunk + 1) * chunk_rows < p.rows ? (chunk + 1) * chunk_rows : p.rows;
    const auto begin_copies = [&](int64_t first, int stage) {
      T* const to = memory + stage * kStage;
      begin_to_shared<kWgradRows, kWidth, kStride, kWgradWarps * 32, Warp>(
          to, from_dz + first * l.out_features, end - first, l.out_features, l.out_features, 1);
      begin_to_shared<kWgradRows, kWidth, kStride, kWgradWarps * 32, Warp>(
          to + kWgradRows * kStride, inputs + first * input_stride, end - first, l.in_features, input_stride, 1);
      Warp::commit_copies();
    };
    int stage = 0;
    begin_copies(chunk * chunk_rows, stage);
    for (int64_t first = chunk * chunk_rows; first < end; first += kWgradRows, stage ^= 1) {
      Warp::template await_copies<0>();
      __syncthreads();
      if (first + kWgradRows < end) begin_copies(first + kWgradRows, stage ^ 1);
      const T* const dz = memory + stage * kStage;
      const T* const h = dz + kWgradRows * kStride;
#pragma unroll 1
      for (int row = 0; row < kWgradRows; row += S::kCols) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
          S::template read_a<Warp>(dz + row * kStride + first_n + 16 * i, kStride, a[i]);
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          uint32_t b[S::kTiles][2];
          S::template read_b<true, Warp>(h + row * kStride + first_k + s * S::kCols, kStride, b);
#pragma unroll
          for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) sums[i][s * S::kTiles + j].template multiply_add<Warp>(a[i], b[j]);
        }
      }
#pragma unroll
      for (auto& row : sums)
#pragma unroll
        for (auto& sum : row) sum.round();
    }

    float* const partial = p.partial_dw + (chunk * p.count + layer) * kWidth * kWidth;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kSlices * S::kTiles; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Access<float, 2> pair{sums[i][j][2 * half], sums[i][j][2 * half + 1]};
          store(partial + (first_n + 16 * i + 8 * half + g) * kWidth + first_k + 8 * j + 2 * t, pair);
        }
  }
};

// One block for each chunk of rows and each layer.
template <class T, int kWidth, class Warp>
__global__ void __launch_bounds__(kWgradWarps * 32)
    narrow_wgrad_kernel(const __grid_constant__ NarrowStack p, int64_t chunk_rows) {
  if constexpr (Warp::kMultiplies)
    if (p.layers[blockIdx.y].dweight.data)
      WgradBlock<T, kWidth, Warp>::run(p, static_cast<int>(blockIdx.y), blockIdx.x, chunk_rows);
}

// blockIdx.y is the layer. The first blocks have 32 columns of db each: a thread adds every eighth warp's sum of its
// column, then the column's first thread adds the eight sums. In the other blocks each thread has an element of dW.
// Loads are unrolled, since their latency is the kernel's time.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    narrow_sum_kernel(const __grid_constant__ NarrowStack p, int width, int64_t warps, int64_t chunks) {
  const NarrowLayer& l = p.layers[blockIdx.y];
  const int db_blocks = width / kSumCols, block = static_cast<int>(blockIdx.x);
  double sum = 0;
  if (block >= db_blocks) {
    const int at = (block - db_blocks) * kBlockThreads + threadIdx.y * kSumCols + threadIdx.x;
    const int n = at / width, k = at % width;
    if (!l.dweight.data || n >= l.out_features || k >= l.in_features) return;
    const float* const partial = p.partial_dw + int64_t{blockIdx.y} * width * width + at;
#pragma unroll 8
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * p.count * width * width];
    T* const dweight = static_cast<T*>(l.dweight.data);
    dweight[l.dweight_transposed ? k * l.dweight.row_stride + n : n * l.dweight.row_stride + k] =
        rounded<T>(static_cast<float>(sum));
    return;
  }
  __shared__ double sums[kSumRows][kSumCols];
  const int col = block * kSumCols + threadIdx.x;
  if (!l.db || block * kSumCols >= l.out_features) return;
  const float* const partial = p.partial_db + int64_t{blockIdx.y} * width + col;
#pragma unroll 8
  for (int64_t i = threadIdx.y; i < warps; i += kSumRows) sum += partial[i * p.count * width];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || col >= l.out_features) return;
  for (int y = 1; y < kSumRows; ++y) sum += sums[y][threadIdx.x];
  static_cast<T*>(l.db)[col] = rounded<T>(static_cast<float>(sum));
}

}  // namespace fastlane::cuda
